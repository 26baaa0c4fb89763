"""Dice, HD95, landmark error and folded volume exactly as the LUMIR evaluation defines them.

Volumes are ``(X, Y, Z)`` on the fixed grid, fields ``(3, X, Y, Z)`` in voxels: ``warped(x) = moving(x + disp(x))``.

Source: the LUMIR evaluation of Learn2Reg 2025; Liu et al., On finite difference Jacobian computation, IJCV 2024.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric

from sitreg_lumir.deform.ops import ndv_map
from sitreg_lumir.deform.sums import exact_sum
from sitreg_lumir.measures.surface import robust_hausdorff

Volume = NDArray[Any] | Tensor
Floats = NDArray[np.float64]

METRICS = ("dsc", "hd95", "hd95_mm", "tre", "tre_mm", "ndv")
CONTRASTS = ("T1-T1", "T1-T2")
_SLAB = 16  # planes of which ndv holds the determinants at once


def warp_nearest(volume: Volume, disp: Volume) -> NDArray[Any]:
    """Labels pulled through a field: ``volume(floor(x + disp(x) + 0.5))``, 0 where ``x + disp(x)`` is outside.

    Args:
        volume: ``(X, Y, Z)``, moving grid.
        disp: ``(3, X, Y, Z)``, voxels, fixed grid.

    Returns:
        ``(X, Y, Z)`` of the dtype of ``volume``, fixed grid. Outside means below 0 or above n-1, however little.
    """
    source, field = _numpy(volume), _field(disp)
    inside = np.ones(field.shape[1:], dtype=bool)
    index = np.zeros(field.shape[1:], dtype=np.intp)
    for axis, size in enumerate(source.shape):
        grid = np.arange(field.shape[1 + axis], dtype=np.float64)
        position = field[axis] + grid.reshape([-1 if other == axis else 1 for other in range(3)])
        inside &= (position >= 0) & (position <= size - 1)
        nearest = np.floor(np.clip(position, 0, size - 1) + 0.5).astype(np.intp)
        index = index * size + np.minimum(nearest, size - 1)
    warped: NDArray[Any] = source.ravel()[index]
    warped[~inside] = 0
    return warped


def dsc(fixed: Volume, moving: Volume, warped: Volume, labels: Iterable[int]) -> Floats:
    """Dice overlap of the fixed and the warped labels, one value per label.

    Args:
        fixed: ``(X, Y, Z)`` integers.
        moving: the unwarped labels; they only decide which labels count.
        warped: the moving labels on the fixed grid.
        labels: to be scored, in this order; 0 is a label like any other.

    Returns:
        fractions; nan for a label that is absent from ``fixed`` or from ``moving``.

    Examples:
        >>> fixed, moving = np.zeros((2, 4, 4, 4), int)
        >>> fixed[1:3], moving[2:] = 1, 1
        >>> sitreg_lumir.dsc(fixed, moving, moving, [0, 1])
        array([0.5, 0.5])
    """
    a, b, both = _numpy(fixed), _numpy(warped), _numpy(moving)
    in_fixed, in_moving, in_warped = _counts(a), _counts(both), _counts(b)
    common = _counts(a[a == b])
    values = [
        2 * common.get(label, 0) / (in_fixed[label] + in_warped.get(label, 0))
        if label in in_fixed and label in in_moving
        else np.nan
        for label in labels
    ]
    return np.array(values, dtype=np.float64)


def hd95(
    fixed: Volume,
    moving: Volume,
    warped: Volume,
    labels: Iterable[int],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Floats:
    """Surface distance that 95 % of the surface area keeps (both ways, the larger), one value per label.

    Args:
        fixed, moving, warped, labels: as for :func:`dsc`.
        spacing: voxel size of each axis; ones give voxels, mm give mm.

    Returns:
        distances; nan as for :func:`dsc`, inf for a label of which nothing is left in ``warped``.
    """
    a, b = _numpy(fixed), _numpy(warped)
    in_both = _counts(a).keys() & _counts(_numpy(moving)).keys()
    boxes_a, boxes_b = _boxes(a), _boxes(b)
    values = []
    for label in labels:
        if label not in in_both:
            values.append(np.nan)
        elif label not in boxes_b:
            values.append(np.inf)
        else:
            box = _union(boxes_a[label], boxes_b[label])
            values.append(robust_hausdorff(a[box] == label, b[box] == label, spacing))
    return np.array(values, dtype=np.float64)


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
    a, b = _centroids(_numpy(fixed_landmarks)), _centroids(_numpy(warped_landmarks))
    if not a or not a.keys() <= b.keys():
        return float("nan")
    scale = np.asarray(spacing, dtype=np.float64)
    return float(np.mean([np.linalg.norm((b[label] - a[label]) * scale) for label in a]))


def ndv(disp: Volume, mask: Volume | None = None) -> float:
    """Folded volume in percent of the foreground.

    Args:
        disp: ``(3, X, Y, Z)``, voxels, fixed grid.
        mask: ``(X, Y, Z)``, where the fixed image is above 0 (the 2025 evaluation); None: everywhere. The
            outermost voxels never count.

    Returns:
        percent; nan if the mask is empty.
    """
    field = torch.as_tensor(disp)
    _field(disp)
    inner = (slice(1, -1),) * 3
    weight = torch.ones(()) if mask is None else torch.as_tensor(_numpy(mask)[inner] > 0)
    weight = weight.to(field.device).expand([size - 2 for size in field.shape[1:]])
    volume = 0.0
    for start in range(0, weight.shape[0], _SLAB):
        slab = field[None, :, start : start + _SLAB + 2].double()
        volume += float(exact_sum(ndv_map(slab)[0, 0] * weight[start : start + _SLAB]))
    voxels = float(exact_sum(weight))
    return 100 * volume / voxels if voxels else float("nan")


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
        fixed_labels, moving_labels: ``(X, Y, Z)`` integers, or None: neither Dice nor HD95.
        fixed_landmarks, moving_landmarks: the same for the landmark error.
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
        a, b = _numpy(fixed_labels), _numpy(moving_labels)
        if labels is None:
            labels = sorted(_counts(a).keys() & _counts(b).keys())
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


def values_outside(labels: Sequence[int], *maps: Volume) -> set[int]:
    """The values of label maps ``(X, Y, Z)`` that are none of ``labels``: what is not scored."""
    return set().union(*(_counts(_numpy(volume)).keys() for volume in maps)) - set(labels)


class RegistrationScores(Metric):
    """Means of :func:`score_pair` over pairs, apart for their contrasts and groups; processes add up exactly.

    Args:
        contrasts: names reported one by one; pairs of other contrasts count under ``other``.
        groups: names of groups, in which a pair counts as well as under its contrasts.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    infinite: Tensor

    def __init__(self, contrasts: Sequence[str] = CONTRASTS, groups: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.contrasts, self.groups = (*contrasts, "other"), tuple(groups)
        shape = (len(self.contrasts) + len(self.groups), len(METRICS))
        for name in ("sums", "counts", "infinite"):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        disp: Tensor,
        *,
        group: str,
        contrasts: str | None = None,
        fixed_labels: Volume | None = None,
        moving_labels: Volume | None = None,
        fixed_landmarks: Volume | None = None,
        moving_landmarks: Volume | None = None,
        fixed_mask: Volume | None = None,
        labels: Sequence[int] | None = None,
        voxel_size: float | Sequence[float] = 1.0,
        metrics: Sequence[str] | None = None,
    ) -> None:
        """Scores one pair.

        Args:
            disp, fixed_labels and so on: as for :func:`score_pair`.
            group: that the pair counts in; one that is not in ``groups`` counts as its contrasts.
            contrasts: that the pair counts under as well; by default ``group`` says them.
        """
        scores = score_pair(
            disp,
            fixed_labels=fixed_labels,
            moving_labels=moving_labels,
            fixed_landmarks=fixed_landmarks,
            moving_landmarks=moving_landmarks,
            fixed_mask=fixed_mask,
            labels=labels,
            voxel_size=voxel_size,
            metrics=metrics,
        )
        row = group if contrasts is None else contrasts
        rows = [self.contrasts.index(row if row in self.contrasts else "other")]
        if group in self.groups:
            rows.append(len(self.contrasts) + self.groups.index(group))
        for column, name in enumerate(METRICS):
            value = scores.get(name, float("nan"))
            if not np.isnan(value):
                self.sums[rows, column] += value
                self.counts[rows, column] += 1
                self.infinite[rows, column] += float(np.isinf(value))

    def compute(self) -> dict[str, Tensor]:
        """Means over the pairs that have a value; rows and scores without any pair are left out.

        Returns:
            ``<score>/<contrasts>`` and ``<score>/<group>`` for each of ``METRICS``, ``ndv`` (and where there are
            groups ``hd95``) over all pairs, ``gap`` (Dice of the first contrasts minus that of the second), and,
            where a mean is infinite, ``<score>_infinite/<row>``: of how many pairs.
        """
        result: dict[str, Tensor] = {}
        for row, name_of_row in enumerate((*self.contrasts, *self.groups)):
            for column, name in enumerate(METRICS):
                if self.counts[row, column] > 0:
                    result[f"{name}/{name_of_row}"] = self.sums[row, column] / self.counts[row, column]
                if self.infinite[row, column] > 0:
                    result[f"{name}_infinite/{name_of_row}"] = self.infinite[row, column].clone()
        every = slice(len(self.contrasts))  # each pair once
        for name in ("ndv", "hd95") if self.groups else ("ndv",):
            column = METRICS.index(name)
            if self.counts[every, column].sum() > 0:
                result[name] = self.sums[every, column].sum() / self.counts[every, column].sum()
        pair = [f"dsc/{contrasts}" for contrasts in self.contrasts[:2]]
        if all(name in result for name in pair):
            result["gap"] = result[pair[0]] - result[pair[1]]
        return result


def _numpy(volume: Volume) -> NDArray[Any]:
    array = volume.detach().cpu().numpy() if isinstance(volume, Tensor) else np.asarray(volume)
    if array.ndim != 3:
        raise ValueError(f"volume must be (X, Y, Z), got {array.shape}")
    return array


def _field(disp: Volume) -> NDArray[Any]:
    array = disp.detach().cpu().numpy() if isinstance(disp, Tensor) else np.asarray(disp)
    if array.ndim != 4 or array.shape[0] != 3:
        raise ValueError(f"disp must be (3, X, Y, Z), got {array.shape}")
    return array


def _counts(labels: NDArray[Any]) -> dict[int, int]:
    """Number of voxels of each label that occurs."""
    counts = np.bincount(labels.ravel())
    return {int(label): int(counts[label]) for label in np.flatnonzero(counts)}


def _boxes(labels: NDArray[Any]) -> dict[int, tuple[slice, ...]]:
    """Bounding box of each label that occurs; that of 0 is the whole volume."""
    boxes = {i: box for i, box in enumerate(ndimage.find_objects(labels), start=1) if box is not None}
    if (labels == 0).any():
        boxes[0] = tuple(slice(0, size) for size in labels.shape)
    return boxes


def _union(first: tuple[slice, ...], second: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))


def _centroids(landmarks: NDArray[Any]) -> dict[int, Floats]:
    """Centre of mass of each non-zero label, voxels."""
    where = np.nonzero(landmarks)
    labels = landmarks[where].astype(np.int64)
    if not len(labels):
        return {}
    counts = np.bincount(labels)
    sums = [np.bincount(labels, weights=axis) for axis in where]
    return {int(label): np.array([axis[label] for axis in sums]) / counts[label] for label in np.flatnonzero(counts)}


def _mean(values: Floats) -> float:
    """Mean without nan; nan if nothing is left, inf if one value is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
