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
        diffusion_weight: of the fields' smoothness.
        stage_weight: of each earlier stage's loss (deep supervision).
        window: of the LNCC, voxels.
        augmentation: of the views that the network sees in training.
        recompute: compute activations again in the backward pass: less memory, more time, the same numbers; ``auto``
            does so where the memory that is free does not suffice otherwise.
        coarse_epochs: so many epochs at the beginning see the images at half resolution, where a step costs about a
            sixth; the weights go on to the full one.
        coarse_window: of the LNCC in these epochs, voxels of half resolution; None: ``window``.
        stage_every: the losses of earlier stages count in every so many-th step only, with so many times the weight:
            the same gradient on average, and less work.
        one_direction: compare pairs on the fixed grid alone. Images come in both orders, so that both directions
            learn; a step computes less. Triplets always compare on both grids.
        final_rate_share: share of the learning rate that is left at the end of training; below 1, the rate falls
            along half a cosine over the Trainer's ``max_epochs``.
        sigma: of MIND's patches, voxels.

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
