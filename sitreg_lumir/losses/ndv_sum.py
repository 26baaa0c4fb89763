"""The volume that a field folds, as a loss."""

from torch import Tensor

from sitreg_lumir.deform import ops


def ndv_sum(disp: Tensor) -> Tensor:
    """Volume that a field folds, summed over all inner voxels and the batch, voxels^3."""
    return ops.ndv_sum(disp)
