"""All scores of one pair of images.

Source: the LUMIR evaluation of Learn2Reg 2025.
"""

from collections.abc import Sequence

import numpy as np

from sitreg_lumir.metrics.dsc import dsc
from sitreg_lumir.metrics.hd95 import hd95
from sitreg_lumir.metrics.labels import Floats, Volume, as_volume, count_labels, warp_nearest
from sitreg_lumir.metrics.ndv import ndv
from sitreg_lumir.metrics.tre import tre

METRICS = ("dsc", "hd95", "hd95_mm", "tre", "tre_mm", "ndv")


def score_pair(
    disp: Volume,
    *,
    fixed_labels: Volume | None = None,
    moving_labels: Volume | None = None,
    fixed_landmarks: Volume | None = None,
    moving_landmarks: Volume | None = None,
    fixed_mask: Volume | None = None,
    labels: Sequence[int] | None = None,
    voxel_size: float | Sequence[float] = 1.0,
    metrics: Sequence[str] | None = None,
) -> dict[str, float]:
    """All scores of one pair that its files allow.

    Args:
        disp: ``(3, X, Y, Z)``, voxels, fixed grid.
        fixed_labels: ``(X, Y, Z)`` integers, or None: neither Dice nor HD95.
        moving_labels: ``(X, Y, Z)`` integers, or None.
        fixed_landmarks: ``(X, Y, Z)`` integers, or None: no landmark error.
        moving_landmarks: ``(X, Y, Z)`` integers, or None.
        fixed_mask: ``(X, Y, Z)``, for :func:`ndv`.
        labels: exactly these are scored (0 too, if listed). None: those that are in both label maps, 0 included.
        voxel_size: mm, one number or one per axis.
        metrics: those of ``dsc``, ``hd95``, ``tre`` and ``ndv`` that are wanted; None: all.

    Returns:
        ``ndv`` (percent); with labels ``dsc``, ``hd95`` (voxels), ``hd95_mm``: means over the labels that are
        not nan, an infinite HD95 stays infinite, and ``dsc/<label>``, ``hd95/<label>`` (voxels); with landmarks
        ``tre`` (voxels), ``tre_mm``.
    """
    size = np.broadcast_to(np.asarray(voxel_size, dtype=np.float64), (3,))
    scores: dict[str, float] = {}
    wanted = set(METRICS) if metrics is None else {name for name in METRICS if name.removesuffix("_mm") in metrics}
    if fixed_labels is not None and moving_labels is not None and wanted & {"dsc", "hd95"}:
        a, b = as_volume(fixed_labels), as_volume(moving_labels)
        if labels is None:
            labels = sorted(count_labels(a).keys() & count_labels(b).keys())
        warped = warp_nearest(b, disp)
        if "dsc" in wanted:
            overlap = dsc(a, b, warped, labels)
            scores["dsc"] = _mean(overlap)
        if "hd95" in wanted:
            distance = hd95(a, b, warped, labels)
            even = bool((size == size[0]).all())
            distance_mm = distance * size[0] if even else hd95(a, b, warped, labels, tuple(size))
            scores |= {"hd95": _mean(distance), "hd95_mm": _mean(distance_mm)}
        if "dsc" in wanted:
            scores |= {f"dsc/{label}": float(value) for label, value in zip(labels, overlap, strict=True)}
        if "hd95" in wanted:
            scores |= {f"hd95/{label}": float(value) for label, value in zip(labels, distance, strict=True)}
    if fixed_landmarks is not None and moving_landmarks is not None and "tre" in wanted:
        warped = warp_nearest(moving_landmarks, disp)
        scores |= {"tre": tre(fixed_landmarks, warped), "tre_mm": tre(fixed_landmarks, warped, tuple(size))}
    return scores | ({"ndv": ndv(disp, fixed_mask)} if "ndv" in wanted else {})


def _mean(values: Floats) -> float:
    """Mean without nan; nan if nothing is left, inf if one value is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
