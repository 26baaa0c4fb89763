"""Compiled loop for the gradient of a convolution's weights, in vectors, right for volumes of any size.

Volumes have their channels innermost in memory. Products are added up in the volumes' type along a few rows only, and
those sums in float64; which rows belong together depends on the shape alone, so the number of threads changes nothing.

A window's numbers at one x and y lie side by side in memory: a *run*. A *tile* is what a few registers hold of a run.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.threads import compiled
from sitreg_lumir.deform.backends.cpu.vectors import REGISTER, put, voxel, wide

OUTPUTS, REGISTERS = 4, 3  # outputs, and registers of a run, whose sums stay in the processor while products are added
AT_ONCE = 192  # so many results of a plane, or a row more, stay in the nearest cache
LONGEST = 1024  # so many products, or ``AT_ONCE`` more, are added up in the volumes' type


def tiles_of_windows(kernel: int, channels: int, itemsize: int) -> int:
    """How many tiles a window has."""
    return kernel**2 * -(-kernel * channels // (REGISTERS * (REGISTER // itemsize)))


@compiled
def weight_gradient(
    first: Any, last: Any, values: Any, grads: Any, kernel: Any, stride: Any, padding: Any, planes: Any, tiles: Any,
    totals: Any,
) -> None:  # fmt: skip
    """Per part, so many ``planes`` of results, the sums of products of each output with each input of its window.

    Args:
        first: task to begin with; each of ``ceil(B * I / planes)`` parts has a task for every ``tiles`` tiles.
        last: task to end before.
        values: what was convolved, ``(B, X, Y, Z, C)``.
        grads: with respect to the result, ``(B, I, J, K, N)``, in the same type.
        kernel: width of the window along each axis, voxels.
        stride: of the windows, voxels.
        padding: zeros before and behind each axis, voxels.
        planes: of a part.
        tiles: of a task.
        totals: ``(parts, N, kernel^3 * C)``, float64; windows are ordered by x, y, z, channel.
    """
    batch, size_i, size_j, size_k, outputs = grads.shape
    channels, width = values.shape[4], REGISTERS * (REGISTER // values.itemsize)
    run = kernel * channels
    tiles_of_run = (run + width - 1) // width
    all_tiles = kernel * kernel * tiles_of_run
    tasks = (all_tiles + tiles - 1) // tiles
    blocks = (outputs + OUTPUTS - 1) // OUTPUTS
    rows = (AT_ONCE + size_k - 1) // size_k
    heights = (rows - 1) * stride + kernel
    length = (values.shape[3] + 2 * padding) * channels
    lines = np.zeros(kernel * heights * length + width, values.dtype)
    by_output = np.zeros(blocks * rows * size_k * OUTPUTS, values.dtype)
    sums = np.zeros((tiles, blocks * OUTPUTS * width), values.dtype)
    for task in range(first, last):
        part, tile_0 = task // tasks, task % tasks * tiles
        tile_1 = min(tile_0 + tiles, all_tiles)
        total, added = totals[part], 0
        for plane in range(part * planes, min((part + 1) * planes, batch * size_i)):
            item, i = plane // size_i, plane % size_i
            for j0 in range(0, size_j, rows):
                j1 = min(j0 + rows, size_j)
                _copy_lines(values[item], i * stride - padding, j0 * stride - padding, kernel, heights, padding, lines)
                _copy_outputs(grads[item, i], j0, j1, by_output)
                for tile in range(tile_0, tile_1):
                    x_y = tile // tiles_of_run
                    start = (x_y // kernel * heights + x_y % kernel) * length + tile % tiles_of_run * width
                    steps = stride * length, stride * channels
                    _add_products(lines, start, steps, by_output, blocks, (j1 - j0, size_k), sums[tile - tile_0])
                added += (j1 - j0) * size_k
                if added >= LONGEST:
                    _move_sums(sums, tile_0, tile_1, tiles_of_run, run, total)
                    added = 0
        _move_sums(sums, tile_0, tile_1, tiles_of_run, run, total)


@compiled
def _copy_lines(volume: Any, x0: Any, y0: Any, planes: Any, heights: Any, padding: Any, lines: Any) -> None:
    """Copies the lines along z that windows cover, from ``x0`` and ``y0`` on; zeros outside the volume."""
    size_x, size_y, size_z, channels = volume.shape
    numbers = size_z * channels
    flat, fours = volume.reshape(volume.size), np.uintp(numbers // 4 * 4)
    to = np.uintp(padding * channels)
    for plane in range(planes):
        for height in range(heights):
            x, y = x0 + plane, y0 + height
            if 0 <= x < size_x and 0 <= y < size_y:
                of = np.uintp((x * size_y + y) * numbers)
                for number in range(np.uintp(0), fours, np.uintp(4)):
                    put(lines, to + number, voxel(flat, of + number))
                for number in range(fours, np.uintp(numbers)):
                    lines[to + number] = flat[of + number]
            else:
                for number in range(np.uintp(0), np.uintp(numbers)):
                    lines[to + number] = 0
            to += np.uintp(numbers + 2 * padding * channels)


@compiled
def _copy_outputs(plane: Any, j0: Any, j1: Any, by_output: Any) -> None:
    """Copies rows of ``plane``, ``(J, K, N)``, four outputs beside each other: ``(N / 4, rows, K, 4)``."""
    size_k, outputs = plane.shape[1:]
    block = (j1 - j0) * size_k * OUTPUTS
    for j in range(j0, j1):
        for k in range(size_k):
            to = ((j - j0) * size_k + k) * OUTPUTS
            for n in range(outputs):
                by_output[n // OUTPUTS * block + to + n % OUTPUTS] = plane[j, k, n]


@compiled
def _move_sums(sums: Any, tile_0: Any, tile_1: Any, tiles_of_run: Any, run: Any, total: Any) -> None:
    """Adds tiles' sums to the total, and clears them."""
    width = REGISTERS * (REGISTER // sums.itemsize)
    for tile in range(tile_0, tile_1):
        start = tile % tiles_of_run * width
        to, numbers = tile // tiles_of_run * run + start, min(width, run - start)
        for n in range(len(total)):
            for number in range(numbers):
                total[n, to + number] += sums[tile - tile_0, n * width + number]
    sums[:] = 0


@compiled
def _add_products(lines: Any, start: Any, steps: Any, by_output: Any, blocks: Any, shape: Any, sums: Any) -> None:
    """Adds the products of rows of outputs, ``shape``, with a tile of the windows that they belong to."""
    width = np.uintp(REGISTER // lines.itemsize)
    two_widths, rest = width + width, np.uintp(1)
    three_widths = two_widths + width
    j = np.uintp(0)
    for block in range(np.uintp(0), np.uintp(blocks), np.uintp(1)):
        a = block * np.uintp(OUTPUTS) * three_widths
        b, c, d = a + three_widths, a + three_widths + three_widths, a + three_widths + three_widths + three_widths
        a0, a1, a2 = wide(sums, a), wide(sums, a + width), wide(sums, a + two_widths)
        b0, b1, b2 = wide(sums, b), wide(sums, b + width), wide(sums, b + two_widths)
        c0, c1, c2 = wide(sums, c), wide(sums, c + width), wide(sums, c + two_widths)
        d0, d1, d2 = wide(sums, d), wide(sums, d + width), wide(sums, d + two_widths)
        for row in range(shape[0]):
            i = np.uintp(start + row * steps[0])
            for _ in range(shape[1]):
                e0, e1, e2 = wide(lines, i), wide(lines, i + width), wide(lines, i + two_widths)
                f = by_output[j]
                a0, a1, a2 = a0 + f * e0, a1 + f * e1, a2 + f * e2
                f = by_output[j + rest]
                b0, b1, b2 = b0 + f * e0, b1 + f * e1, b2 + f * e2
                f = by_output[j + np.uintp(2)]
                c0, c1, c2 = c0 + f * e0, c1 + f * e1, c2 + f * e2
                f = by_output[j + np.uintp(3)]
                d0, d1, d2 = d0 + f * e0, d1 + f * e1, d2 + f * e2
                i += np.uintp(steps[1])
                j += np.uintp(OUTPUTS)
        put(sums, a, a0), put(sums, a + width, a1), put(sums, a + two_widths, a2)
        put(sums, b, b0), put(sums, b + width, b1), put(sums, b + two_widths, b2)
        put(sums, c, c0), put(sums, c + width, c1), put(sums, c + two_widths, c2)
        put(sums, d, d0), put(sums, d + width, d1), put(sums, d + two_widths, d2)
