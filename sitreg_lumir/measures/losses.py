"""What training minimises: local correlation, smoothness, folding, and agreement around a cycle.

Images are ``(B, 1, X, Y, Z)`` in [0, 1], fields ``(B, 3, X, Y, Z)`` in voxels. All sums are in float32 or
float64, outside autocast.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sitreg_lumir.deform import ops
from sitreg_lumir.deform.ops import compose, mask_at, warp, warp_mask
from sitreg_lumir.deform.sums import exact_mean


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


def similarity(
    disp: Tensor, fixed: Tensor, moving: Tensor, fixed_mask: Tensor | None = None, moving_mask: Tensor | None = None,
    window: int = 11,
) -> Tensor:  # fmt: skip
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


def diffusion(disp: Tensor, voxel_size: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Mean squared slope of a field, by forward differences.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels.
        voxel_size: of each axis; only ratios matter.

    Returns:
        a scalar, no unit.

    Source: Balakrishnan et al., VoxelMorph, IEEE TMI 2019.
    """
    return ops.diffusion(disp, voxel_size)


def ndv_sum(disp: Tensor) -> Tensor:
    """Volume that a field folds, summed over all inner voxels and the batch, voxels^3."""
    return ops.ndv_sum(disp)


def group_consistency(
    disps: Sequence[Tensor], disps_inv: Sequence[Tensor], masks: Sequence[Tensor] | None = None,
    voxel_size: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:  # fmt: skip
    """How far the maps around a cycle of three images miss the identity, both ways round.

    Pair k has image k as moving and image k+1 (cyclically) as fixed.

    Args:
        disps: the three pairs' fields, each on the grid of image k+1, ``(B, 3, X, Y, Z)``, voxels.
        disps_inv: the three inverse fields, each on the grid of image k.
        masks: the three images' masks ``(B, 1, X, Y, Z)``; a voxel counts where each look-up hits the mask of
            the field's grid. None: where it stays in the volume.
        voxel_size: of each axis.

    Returns:
        a scalar: mean squared distance, in units of half the longest side of the field of view.

    Source: Gu et al., Pair-wise and group-wise consistency, 2020; weight from SITReg's LUMIR configuration.
    """
    if masks is None:
        masks = [torch.ones_like(disp[:, :1]) for disp in disps]
    forward = _cycle_error(
        [disps[0], disps[1], disps[2]], [masks[1], masks[2], masks[0]], voxel_size
    )  # forward_1 o forward_2 o forward_3
    inverse = _cycle_error(
        [disps_inv[2], disps_inv[1], disps_inv[0]], [masks[2], masks[1], masks[0]], voxel_size
    )  # inverse_3 o inverse_2 o inverse_1
    return (forward + inverse) / 2


def cycle_mask(disps: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Where every look-up of a chain ``disps[0] o disps[1] o ...`` hits the mask of that field's grid, bool."""
    chain = disps[-1].detach()
    valid = masks[-1].bool()
    for index in range(len(disps) - 2, -1, -1):
        valid = valid & mask_at(masks[index], chain, relative=True)
        if index:
            chain = compose(*[disp.detach() for disp in disps[index:]])
    return valid


def _cycle_error(disps: Sequence[Tensor], masks: Sequence[Tensor], voxel_size: Sequence[float]) -> Tensor:
    cycle = compose(*disps)
    size = torch.as_tensor(voxel_size, dtype=torch.float64)
    extent = float((size * torch.tensor(cycle.shape[2:])).max())
    unit = (2 * size / extent).to(cycle)[:, None, None, None]
    squared = (cycle * unit).square().sum(dim=1, keepdim=True)
    return exact_mean(squared * cycle_mask(disps, masks)).to(squared.dtype)
