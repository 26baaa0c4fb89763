"""The order in which compiled loops add to places chosen by a field, and the gradient of look-ups, which do so.

Each task is a tile of neighbouring rows. Tiles that could touch the same place get different colours, and one
colour runs after the other: no two threads meet, and each place is added to in an order that the data alone decide.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.lookups import locate_row, strides_of
from sitreg_lumir.deform.backends.cpu.threads import compiled

TILE = 8  # rows along each of the first two axes


@compiled
def tile_range(tile: Any, shape: Any) -> Any:
    """Batch item and the ranges ``x0, x1, y0, y1`` of a tile's rows."""
    along_x, along_y = (shape[0] + TILE - 1) // TILE, (shape[1] + TILE - 1) // TILE
    batch, x, y = tile // (along_x * along_y), tile // along_y % along_x * TILE, tile % along_y * TILE
    return batch, x, min(x + TILE, shape[0]), y, min(y + TILE, shape[1])


@compiled
def tile_extrema(first: Any, last: Any, shape: Any, field: Any, extrema: Any) -> None:
    """Per tile, the smallest and largest first component, then those of the second."""
    size = np.uintp(shape[0] * shape[1] * shape[2])
    lowest, highest = np.empty(shape[2], field.dtype), np.empty(shape[2], field.dtype)  # per place along the rows
    for tile in range(first, last):
        batch, x0, x1, y0, y1 = tile_range(tile, shape)
        for axis in range(2):
            lowest[:], highest[:] = np.inf, -np.inf
            for x in range(x0, x1):
                for y in range(y0, y1):
                    i = np.uintp(batch * 3 + axis) * size + np.uintp((x * shape[1] + y) * shape[2])
                    for z in range(shape[2]):
                        value = field[i + np.uintp(z)]
                        lowest[z] = value if value < lowest[z] else lowest[z]
                        highest[z] = value if value > highest[z] else highest[z]
            for z in range(1, shape[2]):
                lowest[0], highest[0] = min(lowest[0], lowest[z]), max(highest[0], highest[z])
            extrema[tile, 2 * axis], extrema[tile, 2 * axis + 1] = lowest[0], highest[0]


@compiled
def _touch_rows(reach: Any, shape: Any, box: Any) -> None:
    """First and last row along x, then along y, that look-ups at positions within ``reach`` touch."""
    for limit in range(4):
        last = shape[limit // 2] - 1
        position = reach[limit] + (-0.01 if limit % 2 == 0 else 1.01)  # rounding, and a cell's upper corners
        position = position if position > 0 else 0.0
        box[limit] = np.int64(position) if position < last else last


@compiled
def colour_tiles(shape: Any, grid: Any, relative: Any, extrema: Any) -> Any:
    """A colour per tile of ``grid`` such that tiles of one colour add to different rows of ``shape``.

    ``extrema[k]`` are those of the k-th of the composed fields, the first applied one first; each is looked up where
    the ones before it lead. In order, each tile takes the lowest colour that no tile it could meet has.
    """
    tiles = extrema.shape[1]
    along_x, along_y = (grid[0] + TILE - 1) // TILE, (grid[1] + TILE - 1) // TILE
    boxes, box = np.empty((tiles, 4), np.int64), np.empty(4, np.int64)
    reach, change = np.empty(4, np.float64), np.empty(4, np.float64)
    colours, taken = np.zeros(tiles, np.int64), np.zeros(tiles + 1, np.bool_)
    for tile in range(tiles):
        batch, x0, x1, y0, y1 = tile_range(tile, grid)
        for limit, row in enumerate((x0, x1 - 1, y0, y1 - 1)):
            reach[limit] = extrema[0, tile, limit] + (row if relative else 0)
        _touch_rows(reach, shape, box)
        _touch_rows(reach, shape, boxes[tile])
        for link in range(1, len(extrema)):
            change[0] = change[2] = np.inf
            change[1] = change[3] = -np.inf
            for x in range(box[0] // TILE, box[1] // TILE + 1):
                for y in range(box[2] // TILE, box[3] // TILE + 1):
                    _widen(change, extrema[link, (batch * along_x + x) * along_y + y])
            for limit in range(4):
                reach[limit] += change[limit]
            _touch_rows(reach, shape, box)
            _widen(boxes[tile], box)
        taken[:] = False
        for earlier in range(batch * along_x * along_y, tile):
            a, b = boxes[tile], boxes[earlier]
            if a[0] <= b[1] and b[0] <= a[1] and a[2] <= b[3] and b[2] <= a[3]:
                taken[colours[earlier]] = True
        while taken[colours[tile]]:
            colours[tile] += 1
    return colours


@compiled
def _widen(limits: Any, further: Any) -> None:
    """Lets lower limits (0 and 2) and upper ones (1 and 3) take in others."""
    for axis in range(2):
        limits[2 * axis] = min(limits[2 * axis], further[2 * axis])
        limits[2 * axis + 1] = max(limits[2 * axis + 1], further[2 * axis + 1])


@compiled
def add_to_corners(target: Any, i: Any, strides: Any, wx: Any, wy: Any, wz: Any, value: Any) -> Any:
    """Adds a value to the corners of a cell, in shares of the trilinear weights."""
    sx, sy, sz = strides
    j, k, m = i + sy, i + sx, i + sx + sy
    upper = value * wx
    lower = value - upper
    lower_y, upper_y = lower * wy, upper * wy
    a, b, c, d = lower - lower_y, lower_y, upper - upper_y, upper_y
    az, bz, cz, dz = a * wz, b * wz, c * wz, d * wz
    target[i] += a - az
    target[i + sz] += az
    target[j] += b - bz
    target[j + sz] += bz
    target[k] += c - cz
    target[k + sz] += cz
    target[m] += d - dz
    target[m + sz] += dz


@compiled
def scatter_lookup(
    first: Any, last: Any, tiles: Any, shape: Any, channels: Any, parts: Any, points: Any, grid: Any, relative: Any,
    grad: Any, grad_values: Any,
) -> None:  # fmt: skip
    """Tiles of the gradient of :func:`lookup` with respect to the values; a task does one part of the channels."""
    strides = strides_of(shape)
    size, count = np.uintp(shape[0] * shape[1] * shape[2]), np.uintp(grid[0] * grid[1] * grid[2])
    cells = np.empty(grid[2], np.uintp)
    at, weights = np.empty((3, grid[2]), points.dtype), np.empty((3, grid[2]), points.dtype)
    for task in range(first, last):
        batch, x0, x1, y0, y1 = tile_range(tiles[task // parts], grid)
        part = task % parts
        begin, end = (
            batch * channels + part * channels // parts,
            batch * channels + (part + 1) * channels // parts,
        )
        for x in range(x0, x1):
            for y in range(y0, y1):
                locate_row((batch * grid[0] + x) * grid[1] + y, shape, points, grid, relative, cells, at, weights)
                i = np.uintp((x * grid[1] + y) * grid[2])
                for channel in range(begin, end):
                    start, origin = np.uintp(channel) * size, np.uintp(channel) * count + i
                    for z in range(grid[2]):
                        k = np.uintp(z)
                        cell = start + cells[k]
                        value = grad[origin + k]
                        add_to_corners(grad_values, cell, strides, weights[0, k], weights[1, k], weights[2, k], value)
