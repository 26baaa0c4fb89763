"""LNCC, the local normalised cross-correlation of two images, within their masks."""

from torch import Tensor

from sitreg_lumir.deform import ops
from sitreg_lumir.deform.ops import warp, warp_mask


def lncc(
    image_1: Tensor,
    image_2: Tensor,
    mask_1: Tensor | None = None,
    mask_2: Tensor | None = None,
    window: int = 11,
) -> Tensor:
    """Minus the mean squared local correlation of two images, in [-1, 0]; lower is better.

    Both images are multiplied by both masks; masked voxels and the outside enter the windows as zeros, and the
    mean is over all voxels.

    Args:
        image_1: ``(B, 1, X, Y, Z)``.
        image_2: the same shape.
        mask_1: ``(B, 1, X, Y, Z)``, bool or 0/1, or None.
        mask_2: the same.
        window: width of the cube, voxels.

    Returns:
        a scalar.

    Source: Avants et al., Symmetric diffeomorphic image registration with cross-correlation, MedIA 2008.
    """
    masks = [mask.bool() for mask in (mask_1, mask_2) if mask is not None]
    both = masks[0] & masks[-1] if masks else None
    return -ops.lncc(image_1, image_2, both, window)


def warped_lncc(
    disp: Tensor,
    fixed: Tensor,
    moving: Tensor,
    fixed_mask: Tensor | None = None,
    moving_mask: Tensor | None = None,
    window: int = 11,
) -> Tensor:
    """:func:`lncc` of the fixed and the warped moving image; the mask also leaves out what was outside.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels, fixed grid.
        fixed: ``(B, 1, X, Y, Z)``.
        moving: the same shape.
        fixed_mask: 0/1 or bool, or None.
        moving_mask: the same; without masks nothing is left out.
        window: voxels.
    """
    warped_mask = None if moving_mask is None else warp_mask(moving_mask, disp)
    return lncc(warp(moving, disp), fixed, warped_mask, fixed_mask, window)
