"""How well the coarse structures of two brains agree on one grid, whatever their contrasts, and what chance gives.

Ventricles, white matter and cortex of a brain and of the template agree even after an affine alone, so that this
measure tells whether a scan lies where it should. A brain's outline, which counts for most of the mutual information,
does not.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sitreg_lumir.preprocessing.intensity import Mask

_STEP_MM = 3.5  # about the distance of the voxels that are compared
_SMOOTH_MM = 2.0  # standard deviation, against noise and folds that an affine does not match
_WINDOW_MM = 26.0  # a ventricle and what surrounds it
_RIM_MM = 4.0  # of the brains, left out
_FLAT = 1e-8  # product of the variances of windows that show nothing; intensities have a range of about 1


@dataclass(frozen=True)
class StructureMatch:
    """How well coarse structures agree.

    Attributes:
        correlation: mean squared local correlation of the intensities within both brains, 0..1, higher is better; NaN
            where the brains do not overlap.
        by_chance: the larger correlation of the first brain and the second one upside down or back to front. Brains at
            their places agree two to six times as well; for what is no brain, or lies wrongly, both values are alike.
    """

    correlation: float
    by_chance: float


def structure_match(
    first: NDArray[Any], first_brain: Mask, second: NDArray[Any], second_brain: Mask, spacing: float
) -> StructureMatch:
    """Measures how well the coarse structures of two brains agree.

    Args:
        first: ``(X, Y, Z)``, axes along the model's world (RAS), any unit.
        first_brain: bool, ``(X, Y, Z)``.
        second: ``(X, Y, Z)``, on the grid of ``first``, any contrast and unit.
        second_brain: bool, ``(X, Y, Z)``.
        spacing: of the voxels, mm.
    """
    (first, first_brain), (second, second_brain) = (
        _coarse(image, brain, spacing) for image, brain in ((first, first_brain), (second, second_brain))
    )
    step = spacing * _stride(spacing)
    chance = [
        local_correlation(first, first_brain, np.flip(second, axis), np.flip(second_brain, axis), step)
        for axis in (1, 2)
    ]
    known = [value for value in chance if np.isfinite(value)]
    return StructureMatch(local_correlation(first, first_brain, second, second_brain, step), max(known, default=np.nan))


def _stride(spacing: float) -> int:
    return max(1, round(_STEP_MM / spacing))


def _coarse(image: NDArray[Any], brain: Mask, spacing: float) -> tuple[NDArray[np.float64], Mask]:
    """The image, smoothed within its brain, and the brain, on a coarser grid; intensities with a range of about 1."""
    values, weights = np.where(brain, image, 0).astype(np.float64), brain.astype(np.float64)
    smooth, share = (ndimage.gaussian_filter(volume, _SMOOTH_MM / spacing, truncate=3) for volume in (values, weights))
    part = (slice(None, None, _stride(spacing)),) * 3
    smooth, share, brain = smooth[part], share[part], brain[part]
    smooth = np.divide(smooth, share, out=np.zeros_like(smooth), where=brain)
    if brain.any():
        low, high = np.percentile(smooth[brain], (1, 99))
        smooth = np.where(brain, (smooth - low) / max(high - low, 1e-9), 0)
    return smooth, brain


def local_correlation(
    first: NDArray[Any], first_brain: Mask, second: NDArray[Any], second_brain: Mask, step: float
) -> float:
    """Mean squared local correlation within both brains without their rim; NaN where they do not overlap.

    Args:
        first: ``(X, Y, Z)``, any unit.
        first_brain: bool, ``(X, Y, Z)``.
        second: ``(X, Y, Z)``.
        second_brain: bool, ``(X, Y, Z)``.
        step: of the voxels, mm.
    """
    both = first_brain & second_brain
    inner = ndimage.binary_erosion(both, iterations=max(1, round(_RIM_MM / step)))
    if not inner.any():
        return float("nan")
    box = tuple(slice(int(at.min()), int(at.max()) + 1) for at in np.nonzero(both))
    first, second = first[box].astype(np.float64), second[box].astype(np.float64)
    both, inner = both[box], inner[box]
    size = max(3, 2 * round(_WINDOW_MM / step / 2 - 0.5) + 1)
    share = np.maximum(ndimage.uniform_filter(both.astype(np.float64), size, mode="constant"), 1e-9)

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean over the window's voxels within both brains."""
        averaged: NDArray[np.float64] = ndimage.uniform_filter(np.where(both, values, 0), size, mode="constant") / share
        return averaged

    means = mean(first), mean(second)
    covariance = mean(first * second) - means[0] * means[1]
    variances = mean(first * first) - means[0] ** 2, mean(second * second) - means[1] ** 2
    squared = covariance**2 / (variances[0] * variances[1] + _FLAT)
    return float(np.mean(np.minimum(squared, 1)[inner]))
