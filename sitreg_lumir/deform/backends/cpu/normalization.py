"""Compiled loops of group normalisation with ReLU: statistics right at any size, then one pass over the values.

Values are flat arrays of float32, float64, or bfloat16 as its bits in uint16 (then the arithmetic is float32). They
consist of ``items`` of one length, each with statistics of its own; items are cut into *rows*, and a task is a row.
How long rows are does not depend on the threads, so nor do results. Sums run in float64, over values that have 24 bits.

Processors add several numbers at once, so loops go through an item in steps of ``lanes`` values that are kept apart:
what belongs to a channel comes in arrays with a number per lane, and sums come by lane. With the channels innermost in
memory, an item is a volume and ``lanes`` a multiple of the channels; else an item is one channel of a volume.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.threads import compiled, numba

_extending: Any = numba.extending
_types: Any = numba.types


def number(value: Any) -> Any:
    """A stored value as the number that it stands for; in compiled loops only."""
    raise NotImplementedError("compiled loops only")


def stored(value: Any, like: Any) -> Any:
    """A number as it is stored among values such as ``like``; in compiled loops only."""
    raise NotImplementedError("compiled loops only")


def _same(value: Any) -> Any:
    return value


def _from_bfloat16(value: Any) -> Any:
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


def _cast(value: Any, like: Any) -> Any:
    return type(like)(value)


def _to_bfloat16(value: Any, like: Any) -> Any:
    """Rounded to the nearest, ties to the even one."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_extending.overload(number, inline="always")  # type: ignore[untyped-decorator]
def _number(value: Any) -> Any:
    return _from_bfloat16 if isinstance(value, _types.Integer) else _same


@_extending.overload(stored, inline="always")  # type: ignore[untyped-decorator]
def _stored(value: Any, like: Any) -> Any:
    return _to_bfloat16 if isinstance(like, _types.Integer) else _cast


@compiled
def row_range(row: Any, size: Any, length: Any) -> Any:
    """The item that a row lies in, and its first value and end, for items of ``size`` values."""
    rows = (size + length - 1) // length
    item = row // rows
    start = item * size + row % rows * length
    return item, start, min(start + length, (item + 1) * size)


@compiled
def sums(first: Any, last: Any, values: Any, size: Any, length: Any, totals: Any) -> None:
    """Sums and sums of squares of rows.

    Args:
        first: row to begin with.
        last: row to end before.
        values: ``items * size``.
        size: of an item.
        length: of a row, a multiple of the lanes.
        totals: ``(rows, 2, lanes)``, float64.
    """
    lanes = totals.shape[2]
    for row in range(first, last):
        _, begin, end = row_range(row, size, length)
        plain, squares = totals[row, 0], totals[row, 1]
        plain[:] = 0
        squares[:] = 0
        for start in range(begin, end, lanes):
            for lane in range(min(lanes, end - start)):
                value = np.float64(number(values[np.uintp(start) + np.uintp(lane)]))
                plain[lane] += value
                squares[lane] += value * value


@compiled
def normalize(
    first: Any, last: Any, values: Any, size: Any, length: Any, means: Any, scales: Any, shifts: Any, out: Any
) -> None:
    """Rows of ``max((value - mean) * scale + shift, 0)``; ``out`` may be ``values``.

    Args:
        first: row to begin with.
        last: row to end before.
        values: ``items * size``.
        size: of an item.
        length: of a row, a multiple of the lanes.
        means: ``(items, lanes)``, in the type of the arithmetic.
        scales: the same.
        shifts: the same.
        out: like ``values``.
    """
    lanes = means.shape[1]
    zero = means.dtype.type(0)
    for row in range(first, last):
        item, begin, end = row_range(row, size, length)
        mean, scale, shift = means[item], scales[item], shifts[item]
        for start in range(begin, end, lanes):
            for lane in range(min(lanes, end - start)):
                i = np.uintp(start) + np.uintp(lane)
                result = (number(values[i]) - mean[lane]) * scale[lane] + shift[lane]
                out[i] = stored(zero if result <= zero else result, out[i])  # a NaN stays one


@compiled
def gradient_sums(
    first: Any, last: Any, values: Any, grads: Any, size: Any, length: Any, means: Any, scales: Any, shifts: Any,
    totals: Any,
) -> None:  # fmt: skip
    """Per row, the sums of the gradient where the result is positive, and of that times ``value - mean``.

    Args:
        first: row to begin with.
        last: row to end before.
        values: of :func:`normalize`.
        grads: with respect to its results, in the same order.
        size: of an item.
        length: of a row, a multiple of the lanes.
        means: ``(items, lanes)``.
        scales: the same.
        shifts: the same.
        totals: ``(rows, 2, lanes)``, float64.
    """
    lanes = means.shape[1]
    zero = means.dtype.type(0)
    for row in range(first, last):
        item, begin, end = row_range(row, size, length)
        mean, scale, shift = means[item], scales[item], shifts[item]
        plain, products = totals[row, 0], totals[row, 1]
        plain[:] = 0
        products[:] = 0
        for start in range(begin, end, lanes):
            for lane in range(min(lanes, end - start)):
                i = np.uintp(start) + np.uintp(lane)
                centred = number(values[i]) - mean[lane]
                grad = number(grads[i]) if centred * scale[lane] + shift[lane] > zero else zero
                plain[lane] += np.float64(grad)
                products[lane] += np.float64(grad) * np.float64(centred)


@compiled
def gradient(
    first: Any, last: Any, values: Any, grads: Any, size: Any, length: Any, means: Any, scales: Any, shifts: Any,
    offsets: Any, factors: Any, out: Any,
) -> None:  # fmt: skip
    """Rows of the gradient with respect to the values: ``scale * grad - offset - factor * (value - mean)``.

    ``grad`` counts where the result is positive. ``out`` may be ``grads``.

    Args:
        first: row to begin with.
        last: row to end before.
        values: of :func:`normalize`.
        grads: with respect to its results, in the same order.
        size: of an item.
        length: of a row, a multiple of the lanes.
        means: ``(items, lanes)``.
        scales: the same.
        shifts: the same.
        offsets: the same: what the mean of the values contributes.
        factors: the same: what their variance contributes.
        out: like ``values``.
    """
    lanes = means.shape[1]
    zero = means.dtype.type(0)
    for row in range(first, last):
        item, begin, end = row_range(row, size, length)
        mean, scale, shift, offset, factor = means[item], scales[item], shifts[item], offsets[item], factors[item]
        for start in range(begin, end, lanes):
            for lane in range(min(lanes, end - start)):
                i = np.uintp(start) + np.uintp(lane)
                centred = number(values[i]) - mean[lane]
                grad = number(grads[i]) if centred * scale[lane] + shift[lane] > zero else zero
                out[i] = stored(scale[lane] * grad - offset[lane] - factor[lane] * centred, out[i])


@compiled
def sum_and_difference(first: Any, last: Any, left: Any, right: Any, length: Any) -> None:
    """Rows of ``length`` values: the sums take the place of the first array's, the differences of the second's."""
    begin, end = first * length, min(last * length, len(left))
    for index in range(begin, end):
        i = np.uintp(index)
        a, b = number(left[i]), number(right[i])
        left[i], right[i] = stored(a + b, left[i]), stored(a - b, right[i])
