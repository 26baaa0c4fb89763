"""HD95, the robust Hausdorff distance of labels, as the LUMIR evaluation defines it."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sitreg_lumir.metrics.labels import LARGEST_COUNTED, Floats, Volume, as_volume, count_labels
from sitreg_lumir.metrics.surface import robust_hausdorff


def hd95(
    fixed: Volume,
    moving: Volume,
    warped: Volume,
    labels: Iterable[int],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Floats:
    """Surface distance that 95 % of the surface area keeps (both ways, the larger), one value per label.

    Args:
        fixed: ``(X, Y, Z)`` integers.
        moving: the unwarped labels; they only decide which labels count.
        warped: the moving labels on the fixed grid.
        labels: to be scored, in this order.
        spacing: voxel size of each axis; ones give voxels, mm give mm.

    Returns:
        distances; nan as for :func:`dsc`, inf for a label of which nothing is left in ``warped``.
    """
    a, b = as_volume(fixed), as_volume(warped)
    in_both = count_labels(a).keys() & count_labels(as_volume(moving)).keys()
    boxes_a, boxes_b = _bounding_boxes(a), _bounding_boxes(b)
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


def _bounding_boxes(labels: NDArray[Any]) -> dict[int, tuple[slice, ...]]:
    """Bounding box of each label that occurs; that of 0 is the whole volume."""
    objects: Iterable[tuple[int, Any]]
    if labels.max() > LARGEST_COUNTED:
        present, numbers = np.unique(labels, return_inverse=True)
        objects = zip(present.tolist(), ndimage.find_objects(1 + numbers.reshape(labels.shape)), strict=True)
    else:
        objects = enumerate(ndimage.find_objects(labels), start=1)
    boxes = {label: box for label, box in objects if box is not None}
    if (labels == 0).any():
        boxes[0] = tuple(slice(0, size) for size in labels.shape)
    return boxes


def _union(first: tuple[slice, ...], second: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
