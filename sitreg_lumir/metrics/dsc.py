"""Dice overlap of labels, as the LUMIR evaluation defines it."""

from collections.abc import Iterable

import numpy as np

from sitreg_lumir.metrics.labels import Floats, Volume, as_volume, count_labels


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
    a, b, both = as_volume(fixed), as_volume(warped), as_volume(moving)
    in_fixed, in_moving, in_warped = count_labels(a), count_labels(both), count_labels(b)
    common = count_labels(a[a == b])
    values = [
        2 * common.get(label, 0) / (in_fixed[label] + in_warped.get(label, 0))
        if label in in_fixed and label in in_moving
        else np.nan
        for label in labels
    ]
    return np.array(values, dtype=np.float64)
