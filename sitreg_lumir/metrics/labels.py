"""Label maps and fields as arrays, and labels warped as the LUMIR evaluation warps them.

Volumes are ``(X, Y, Z)`` on the fixed grid, fields ``(3, X, Y, Z)`` in voxels: ``warped(x) = moving(x + disp(x))``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

LARGEST_COUNTED = 1 << 20
"""Up to this label, arrays of one entry for each label are made; beyond it labels are numbered first."""

Volume = NDArray[Any] | Tensor
Floats = NDArray[np.float64]


def warp_nearest(volume: Volume, disp: Volume) -> NDArray[Any]:
    """Labels pulled through a field: ``volume(floor(x + disp(x) + 0.5))``, 0 where ``x + disp(x)`` is outside.

    Args:
        volume: ``(X, Y, Z)``, moving grid.
        disp: ``(3, X, Y, Z)``, voxels, fixed grid.

    Returns:
        ``(X, Y, Z)`` of the dtype of ``volume``, fixed grid. Outside means below 0 or above n-1, however little.
    """
    source, field = as_volume(volume), as_field(disp)
    inside = np.ones(field.shape[1:], dtype=bool)
    index = np.zeros(field.shape[1:], dtype=np.intp)
    for axis, size in enumerate(source.shape):
        grid = np.arange(field.shape[1 + axis], dtype=np.float64)
        position = field[axis] + grid.reshape([-1 if index_of_axis == axis else 1 for index_of_axis in range(3)])
        inside &= (position >= 0) & (position <= size - 1)
        nearest = np.floor(np.clip(position, 0, size - 1) + 0.5).astype(np.intp)
        index = index * size + np.minimum(nearest, size - 1)
    warped: NDArray[Any] = source.ravel()[index]
    warped[~inside] = 0
    return warped


def values_outside(labels: Sequence[int], *maps: Volume) -> set[int]:
    """The values of label maps ``(X, Y, Z)`` that are none of ``labels``: what is not scored."""
    return set().union(*(count_labels(as_volume(volume)).keys() for volume in maps)) - set(labels)


def count_labels(labels: NDArray[Any]) -> dict[int, int]:
    """Number of voxels of each label that occurs."""
    if labels.size and labels.max() > LARGEST_COUNTED:
        present, times = np.unique(labels, return_counts=True)
        return dict(zip(present.tolist(), times.tolist(), strict=True))
    counts = np.bincount(labels.ravel())
    return {int(label): int(counts[label]) for label in np.flatnonzero(counts)}


def as_volume(volume: Volume) -> NDArray[Any]:
    """A volume ``(X, Y, Z)`` as an array; else ValueError."""
    array = volume.detach().cpu().numpy() if isinstance(volume, Tensor) else np.asarray(volume)
    if array.ndim != 3:
        raise ValueError(f"volume must be (X, Y, Z), got {array.shape}")
    return array


def as_field(disp: Volume) -> NDArray[Any]:
    """A field ``(3, X, Y, Z)`` as an array; else ValueError."""
    array = disp.detach().cpu().numpy() if isinstance(disp, Tensor) else np.asarray(disp)
    if array.ndim != 4 or array.shape[0] != 3:
        raise ValueError(f"disp must be (3, X, Y, Z), got {array.shape}")
    return array
