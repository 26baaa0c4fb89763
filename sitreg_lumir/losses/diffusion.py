"""Diffusion: the smoothness of a field."""

from collections.abc import Sequence

from torch import Tensor

from sitreg_lumir.deform import ops


def diffusion(disp: Tensor, voxel_size: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Mean squared gradient of a field, by forward differences.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels.
        voxel_size: of each axis; only ratios matter.

    Returns:
        a scalar, no unit.

    Source: Balakrishnan et al., VoxelMorph, IEEE TMI 2019.
    """
    return ops.diffusion(disp, voxel_size)
