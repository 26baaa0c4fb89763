"""The LightningModules, one per variant: each names its own defaults, and what the network sees of an image."""

from typing import Any

from sitreg_lumir.network.mind import Mind
from sitreg_lumir.train.registration import RegistrationModule as RegistrationModule


class RawRegistration(RegistrationModule):
    """The baseline: SITReg on raw intensities; sizes and rates of the authors' public LUMIR configuration.

    Examples:
        >>> module = sitreg_lumir.RawRegistration(features=[4, 4], head_features=[4, 4])
        >>> module.network.architecture["in_channels"]
        1
    """

    def __init__(
        self,
        features: list[int] = [12, 32, 64, 128, 128, 128],  # noqa: B006 (read only)
        head_features: list[int] = [12, 64, 128, 256, 256, 256],  # noqa: B006
        learning_rate: float = 4e-4,
        **others: Any,
    ) -> None:
        super().__init__(None, features, head_features, learning_rate, input_transform=None, **others)


class MindRegistration(RegistrationModule):
    """SITReg on MIND features: trained on one contrast, robust on others.

    Args:
        features: channels of the encoder, finest level first.
        head_features: channels of the control point heads, finest level first.
        learning_rate: of Adam.
        sigma: of MIND's patches, voxels.
        **others: as :class:`~sitreg_lumir.train.registration.RegistrationModule` takes them.

    Examples:
        >>> module = sitreg_lumir.MindRegistration(features=[4, 4], head_features=[4, 4])
        >>> fixed, moving = torch.rand(2, 1, 1, 8, 10, 6)
        >>> disp, disp_inv = module(fixed=fixed, moving=moving)
        >>> disp.shape, module.network.architecture["in_channels"]
        (torch.Size([1, 3, 8, 10, 6]), 6)
    """

    def __init__(
        self,
        features: list[int] = [12, 32, 64, 128, 128, 128],  # noqa: B006 (read only)
        head_features: list[int] = [12, 64, 128, 256, 256, 256],  # noqa: B006
        learning_rate: float = 4e-4,
        sigma: float = 0.5,
        **others: Any,
    ) -> None:
        super().__init__(None, features, head_features, learning_rate, input_transform=Mind(sigma), **others)
