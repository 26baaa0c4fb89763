"""Intensities of a template: the robust mean of many scans at each voxel, sharpened, and how sharp it is.

Arrays of scans hold NaN where a scan shows no brain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sitreg_lumir.average.options import Average
from sitreg_lumir.preprocessing.intensity import HIGHEST, SMALLEST, Mask

Floats = NDArray[np.float32]

TRIMMED = 10  # of so many values the highest and the lowest are left out
SHARPEN_MM = 2.0  # standard deviation of the Gaussian whose difference is added
MEDIAN = np.float32(128)  # of each scan's brain, before the mean
_RIM_MM = 4.0  # of the brain's border, where the gradient is that of the outline


@dataclass(frozen=True, eq=False)
class MeanImage:
    """The mean of many scans on one grid.

    Attributes:
        image: ``(X, Y, Z)`` float32, 0..255, exactly 0 outside the brain and at least 1 inside.
        unsharpened: the same before sharpening.
        deviation: ``(X, Y, Z)`` float32, standard deviation between the scans, units of ``image``.
        brain: bool, ``(X, Y, Z)``: where at least half of the scans show brain.
    """

    image: Floats
    unsharpened: Floats
    deviation: Floats
    brain: Mask


def mean_image(
    scans: Sequence[Floats],
    region: Mask,
    average: Average,
    sharpen: float,
    spacing: NDArray[np.float64],
) -> MeanImage:
    """The robust mean of scans, whatever their order.

    Args:
        scans: ``(N,)`` float32 each, values at the voxels of ``region``, NaN where there is no brain.
        region: bool, ``(X, Y, Z)``.
        average: ``trimmed`` leaves out a tenth of the values at each end, voxel by voxel; ``mean``; or ``median``.
        sharpen: how much of the difference from a smoothed image is added; 0 adds nothing.
        spacing: voxel size, mm.
    """
    values, deviation, share = _average_of(scans, average)
    brain = np.zeros(region.shape, np.bool_)
    brain[region] = share >= 0.5
    brain = _without_islands(brain)
    in_region = brain[region]
    averaged = np.zeros(region.shape, np.float32)
    averaged[brain] = values[in_region]
    scale = np.float32(255 / np.percentile(averaged[brain], HIGHEST))
    unsharpened = np.where(brain, np.clip(averaged * scale, SMALLEST, 255), np.float32(0))
    spread = np.zeros(region.shape, np.float32)
    spread[brain] = deviation[in_region] * scale
    return MeanImage(sharpened(unsharpened, brain, sharpen, spacing), unsharpened, spread, brain)


def sharpened(image: Floats, brain: Mask, amount: float, spacing: NDArray[np.float64]) -> Floats:
    """Unsharp masking within a brain: ``image + amount * (image - Gaussian of 2 mm * image)``, 1..255 inside."""
    if amount == 0:
        return image
    sigma = SHARPEN_MM / spacing
    smooth = ndimage.gaussian_filter(np.where(brain, image, np.float32(0)).astype(np.float64), sigma)
    weight = ndimage.gaussian_filter(brain.astype(np.float64), sigma)
    difference = image - np.divide(smooth, weight, out=np.zeros_like(smooth), where=brain)
    result: Floats = np.where(brain, np.clip(image + amount * difference, SMALLEST, 255), 0).astype(np.float32)
    return result


def sharpness(image: Floats, deviation: Floats, brain: Mask, spacing: NDArray[np.float64]) -> dict[str, float]:
    """How sharp a mean image is, within the brain 4 mm below its surface.

    Args:
        image: ``(X, Y, Z)``.
        deviation: between scans, units of ``image``.
        brain: bool.
        spacing: voxel size, mm.

    Returns:
        ``gradient_per_mm``: mean gradient magnitude by central differences, in shares of the image's robust range (1st
        to 99th percentile), higher is sharper; ``deviation``: mean standard deviation between scans, shares of that
        range, lower is better aligned.
    """
    inner = ndimage.distance_transform_edt(np.pad(brain, 1), sampling=spacing)[1:-1, 1:-1, 1:-1] > _RIM_MM
    if not inner.any():
        inner = brain
    low, high = (float(value) for value in np.percentile(image[inner], (1, 99)))
    span = max(high - low, 1e-6)
    gradient = [np.gradient(image.astype(np.float64), step, axis=axis) for axis, step in enumerate(spacing)]
    return {
        "gradient_per_mm": float(np.sqrt(sum(part[inner] ** 2 for part in gradient)).mean() / span),
        "deviation": float(deviation[inner].astype(np.float64).mean() / span),
    }


def _average_of(scans: Sequence[Floats], average: Average) -> tuple[Floats, Floats, Floats]:
    """Average, standard deviation and share of the scans that are not NaN, ``(N,)`` each; part by part in memory."""
    size = scans[0].size
    results = [np.empty(size, np.float32) for _ in range(3)]
    step = max(1, (1 << 24) // len(scans))
    for start in range(0, size, step):
        part = slice(start, start + step)
        values = np.sort(np.stack([scan[part] for scan in scans]), axis=0).astype(np.float64)  # NaN comes last
        count = (~np.isnan(values)).sum(axis=0)
        rank, known = np.arange(len(scans))[:, None], np.maximum(count, 1)
        left_out = {"trimmed": count // TRIMMED, "mean": np.zeros_like(count), "median": (known - 1) // 2}[average]
        kept = (rank >= left_out) & (rank < count - left_out)
        number = np.maximum(kept.sum(axis=0), 1)
        present = np.where(rank < count, values, 0)
        mean = present.sum(axis=0) / known
        results[0][part] = np.where(kept, present, 0).sum(axis=0) / number
        results[1][part] = np.sqrt(np.where(rank < count, (present - mean) ** 2, 0).sum(axis=0) / known)
        results[2][part] = count / len(scans)
    return results[0], results[1], results[2]


def _without_islands(brain: Mask) -> Mask:
    """The largest connected piece."""
    pieces, count = ndimage.label(brain)
    if count > 1:
        brain = pieces == 1 + int(np.bincount(pieces.ravel())[1:].argmax())
    return np.asarray(brain, np.bool_)
