"""Group consistency: the maps around a cycle of three images should be the identity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sitreg_lumir.deform.ops import compose, mask_at
from sitreg_lumir.deform.sums import exact_mean


def group_consistency(
    disps: Sequence[Tensor],
    disps_inv: Sequence[Tensor],
    masks: Sequence[Tensor] | None = None,
    voxel_size: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """How far the maps around a cycle of three images miss the identity, both ways round.

    Pair k has image k as moving and image k+1 (cyclically) as fixed.

    Args:
        disps: the three pairs' fields, each on the grid of image k+1, ``(B, 3, X, Y, Z)``, voxels.
        disps_inv: the three inverse fields, each on the grid of image k.
        masks: the three images' masks ``(B, 1, X, Y, Z)``; a voxel counts where each look-up falls inside the mask of
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
    """Where every look-up of ``disps[0] o disps[1] o ...`` falls inside the mask of that field's grid, bool."""
    composed = disps[-1].detach()
    valid = masks[-1].bool()
    for index in range(len(disps) - 2, -1, -1):
        valid = valid & mask_at(masks[index], composed, relative=True)
        if index:
            composed = compose(*[disp.detach() for disp in disps[index:]])
    return valid


def _cycle_error(disps: Sequence[Tensor], masks: Sequence[Tensor], voxel_size: Sequence[float]) -> Tensor:
    cycle = compose(*disps)
    size = torch.as_tensor(voxel_size, dtype=torch.float64)
    extent = float((size * torch.tensor(cycle.shape[2:])).max())
    unit = (2 * size / extent).to(cycle)[:, None, None, None]
    squared = (cycle * unit).square().sum(dim=1, keepdim=True)
    return exact_mean(squared * cycle_mask(disps, masks)).to(squared.dtype)
