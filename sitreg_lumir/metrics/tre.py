"""TRE, the distance between landmarks, as the LUMIR evaluation defines it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.metrics.labels import Floats, Volume, as_volume


def tre(fixed_landmarks: Volume, warped_landmarks: Volume, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> float:
    """Mean distance between the centroids of landmark labels, over all non-zero labels of the fixed volume.

    With the unwarped moving landmarks it is the error before registration.

    Args:
        fixed_landmarks: ``(X, Y, Z)`` integers, each landmark a small blob of its own value.
        warped_landmarks: the same shape, after :func:`warp_nearest`.
        spacing: voxel size of each axis; ones give voxels, mm give mm.

    Returns:
        a distance; nan if a landmark has vanished or there is none.
    """
    a, b = _centroids(as_volume(fixed_landmarks)), _centroids(as_volume(warped_landmarks))
    if not a or not a.keys() <= b.keys():
        return float("nan")
    scale = np.asarray(spacing, dtype=np.float64)
    return float(np.mean([np.linalg.norm((b[label] - a[label]) * scale) for label in a]))


def _centroids(landmarks: NDArray[Any]) -> dict[int, Floats]:
    """Centre of mass of each non-zero label, voxels."""
    where = np.nonzero(landmarks)
    labels, numbers, counts = np.unique(landmarks[where], return_inverse=True, return_counts=True)
    centres = np.array([np.bincount(numbers.ravel(), weights=axis, minlength=len(labels)) for axis in where]) / counts
    return dict(zip(map(int, labels), centres.T, strict=True))
