"""The LightningModules, one per variant: each names what the network sees of an image."""

from typing import Any

from sitreg_lumir.network.mind import Mind
from sitreg_lumir.train.registration import FEATURES, HEAD_FEATURES, LEARNING_RATE
from sitreg_lumir.train.registration import RegistrationModule as RegistrationModule


class RawRegistration(RegistrationModule):
    """The baseline: SITReg on raw intensities; sizes and rates of the authors' public LUMIR configuration.

    Args:
        *args: see :class:`RegistrationModule`, from ``features`` on.
        **kwargs: see :class:`RegistrationModule`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(None, *args, input_transform=None, **kwargs)  # type: ignore[misc]


class MindRegistration(RegistrationModule):
    """SITReg on MIND features: trained on one contrast, robust on others.

    Args:
        features: channels of the encoder, finest level first.
        head_features: channels of the control point heads, finest level first.
        learning_rate: of Adam.
        *args: see :class:`RegistrationModule`, from ``diffusion_weight`` on.
        sigma: of MIND's patches, voxels.
        **kwargs: see :class:`RegistrationModule`.
    """

    def __init__(  # the first arguments are repeated: subclasses pass them by position
        self,
        features: list[int] = FEATURES,
        head_features: list[int] = HEAD_FEATURES,
        learning_rate: float = LEARNING_RATE,
        *args: Any,
        sigma: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(  # type: ignore[misc]
            None, features, head_features, learning_rate, *args, input_transform=Mind(sigma), **kwargs
        )
