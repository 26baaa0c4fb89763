"""The LightningModules, one per variant: each names its own defaults, and what the network sees of an image."""

from typing import Any

from sitreg_lumir.network.mind import Mind
from sitreg_lumir.train.registration import RegistrationModule as RegistrationModule


class RawRegistration(RegistrationModule):
    """The baseline: SITReg on raw intensities; sizes and rates of the authors' public LUMIR configuration.

    Args:
        *args: see :class:`RegistrationModule`, from ``features`` on.
        **kwargs: see :class:`RegistrationModule`.

    Examples:
        >>> module = sitreg_lumir.RawRegistration(features=[4, 4], head_features=[4, 4])
        >>> module.network.architecture["in_channels"]
        1
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(None, *args, input_transform=None, **kwargs)  # type: ignore[misc]


class MindRegistration(RegistrationModule):
    """SITReg on MIND features: trained on one contrast, robust on others.

    Args:
        *args: see :class:`RegistrationModule`, from ``features`` on.
        sigma: of MIND's patches, voxels.
        **kwargs: see :class:`RegistrationModule`.

    Examples:
        >>> module = sitreg_lumir.MindRegistration(features=[4, 4], head_features=[4, 4])
        >>> fixed, moving = torch.rand(2, 1, 1, 8, 10, 6)
        >>> disp, disp_inv = module(fixed=fixed, moving=moving)
        >>> disp.shape, module.network.architecture["in_channels"]
        (torch.Size([1, 3, 8, 10, 6]), 6)
    """

    def __init__(self, *args: Any, sigma: float = 0.5, **kwargs: Any) -> None:
        super().__init__(None, *args, input_transform=Mind(sigma), **kwargs)  # type: ignore[misc]
