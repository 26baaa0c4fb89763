"""B-spline upsampling of control points in compiled loops, and its gradient."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitreg_lumir.deform.backends.cpu import grids
from sitreg_lumir.deform.backends.cpu.arrays import array
from sitreg_lumir.deform.backends.cpu.threads import run
from sitreg_lumir.deform.bspline import upsampling_matrix


def upsample_control_points(control_points: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """Control points (level voxels) -> field (full-resolution voxels) on a grid of ``shape``."""
    batch, channels = control_points.shape[:2]
    field = control_points.new_empty(batch * channels, *shape)
    tables = [table for size in shape for table in taps(size, factor, control_points.dtype)]
    run(
        grids.upsample,
        batch * channels * shape[0],
        array(control_points.flatten(0, 1)),
        factor,
        *tables,
        array(field),
    )
    return field.view(batch, channels, *shape)


def upsample_control_points_adjoint(grad: Tensor, factor: int) -> Tensor:
    """Gradient of :func:`upsample_control_points` with respect to the control points."""
    batch, channels, *shape = grad.shape
    taps_x, taps_y, taps_z = (taps(size, factor, grad.dtype) for size in shape)
    level = [-(-size // factor) for size in shape]
    planes = grad.new_empty(batch * channels, shape[0], *level[1:])
    run(
        grids.reduce_planes,
        batch * channels * shape[0],
        array(grad.flatten(0, 1)),
        *taps_y,
        *taps_z,
        array(planes),
    )
    result = grad.new_empty(batch * channels, *level)
    run(grids.reduce_volumes, batch * channels * level[0], array(planes), factor, *taps_x, array(result))
    return result.view(batch, channels, *level)


@lru_cache(maxsize=64)
def taps(size: int, factor: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """``(size, 4)`` indices of the control points each sample of one axis depends on, and their weights."""
    matrix = upsampling_matrix(size, factor, dtype, torch.device("cpu")).numpy()
    first = np.minimum((matrix != 0).argmax(axis=1), max(matrix.shape[1] - 4, 0))
    index = first[:, None] + np.arange(4)
    exists = index < matrix.shape[1]
    index = np.minimum(index, matrix.shape[1] - 1)
    weights = np.where(exists, np.take_along_axis(matrix, index, axis=1), 0).astype(matrix.dtype)
    return index, weights
