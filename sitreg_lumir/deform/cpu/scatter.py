"""Compiled loops that add to places chosen by a field: the gradients of inversion, composition and look-ups.

Each task is a tile of neighbouring rows. Tiles that could touch the same place get different colours, and one
colour runs after the other: no two threads meet, and each place is added to in an order that the data alone decide.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.cpu.lookups import (
    clamp_slope,
    locate,
    locate_row,
    slopes,
    slopes_at,
    solve,
    strides_of,
    trilinear,
)
from sitreg_lumir.deform.cpu.threads import compiled

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
    for tile in range(first, last):
        batch, x0, x1, y0, y1 = tile_range(tile, shape)
        for axis in range(2):
            i = np.uintp(batch * 3 + axis) * size + np.uintp((x0 * shape[1] + y0) * shape[2])
            lowest = highest = field[i]
            for x in range(x0, x1):
                for y in range(y0, y1):
                    i = np.uintp(batch * 3 + axis) * size + np.uintp((x * shape[1] + y) * shape[2])
                    for z in range(shape[2]):
                        value = field[i + np.uintp(z)]
                        lowest = min(lowest, value)
                        highest = max(highest, value)
            extrema[tile, 2 * axis], extrema[tile, 2 * axis + 1] = lowest, highest


@compiled
def _rows_touched(reach: Any, shape: Any) -> Any:
    """First and last row along x, then along y, that look-ups at positions within ``reach`` touch."""
    box = np.empty(4, np.int64)
    for side in range(4):
        last = shape[side // 2] - 1
        position = reach[side] + (-0.01 if side % 2 == 0 else 1.01)  # rounding, and a cell's upper corners
        position = position if position > 0 else 0.0
        box[side] = np.int64(position) if position < last else last
    return box


@compiled
def colour_tiles(shape: Any, grid: Any, relative: Any, extrema: Any) -> Any:
    """A colour per tile of ``grid`` such that tiles of one colour add to different rows of ``shape``.

    ``extrema[k]`` are those of the k-th field of a chain, the first applied field first; each is looked up where
    the ones before it lead. In order, each tile takes the lowest colour that no tile it could meet has.
    """
    tiles = extrema.shape[1]
    along_x, along_y = (grid[0] + TILE - 1) // TILE, (grid[1] + TILE - 1) // TILE
    boxes = np.empty((tiles, 4), np.int64)
    colours = np.zeros(tiles, np.int64)
    for tile in range(tiles):
        batch, x0, x1, y0, y1 = tile_range(tile, grid)
        reach = extrema[0, tile].copy()
        if relative:
            reach += np.array([x0, x1 - 1, y0, y1 - 1])
        box = _rows_touched(reach, shape)
        boxes[tile] = box
        for link in range(1, len(extrema)):
            lowest, highest = np.full(2, np.inf), np.full(2, -np.inf)
            for x in range(box[0] // TILE, box[1] // TILE + 1):
                for y in range(box[2] // TILE, box[3] // TILE + 1):
                    other = extrema[link, (batch * along_x + x) * along_y + y]
                    lowest, highest = np.minimum(lowest, other[::2]), np.maximum(highest, other[1::2])
            reach[::2] += lowest
            reach[1::2] += highest
            box = _rows_touched(reach, shape)
            boxes[tile, ::2] = np.minimum(boxes[tile, ::2], box[::2])
            boxes[tile, 1::2] = np.maximum(boxes[tile, 1::2], box[1::2])
        taken = np.zeros(tiles + 1, np.bool_)
        for other in range(batch * along_x * along_y, tile):
            a, b = boxes[tile], boxes[other]
            if a[0] <= b[1] and b[0] <= a[1] and a[2] <= b[3] and b[2] <= a[3]:
                taken[colours[other]] = True
        while taken[colours[tile]]:
            colours[tile] += 1
    return colours


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
def pulled_slopes(disp: Any, i: Any, size: Any, strides: Any, wx: Any, wy: Any, wz: Any,
                   gx: Any, gy: Any, gz: Any) -> Any:  # fmt: skip
    """Derivatives at a position of the field's product with the fixed vector ``g``."""
    sx, sy, sz = strides
    i0, i1, i2 = i, i + size, i + size + size
    j, k, m = sy, sx, sx + sy
    jz, kz, mz = j + sz, k + sz, m + sz
    return slopes(
        gx * disp[i0] + gy * disp[i1] + gz * disp[i2],
        gx * disp[i0 + sz] + gy * disp[i1 + sz] + gz * disp[i2 + sz],
        gx * disp[i0 + j] + gy * disp[i1 + j] + gz * disp[i2 + j],
        gx * disp[i0 + jz] + gy * disp[i1 + jz] + gz * disp[i2 + jz],
        gx * disp[i0 + k] + gy * disp[i1 + k] + gz * disp[i2 + k],
        gx * disp[i0 + kz] + gy * disp[i1 + kz] + gz * disp[i2 + kz],
        gx * disp[i0 + m] + gy * disp[i1 + m] + gz * disp[i2 + m],
        gx * disp[i0 + mz] + gy * disp[i1 + mz] + gz * disp[i2 + mz],
        wx, wy, wz,
    )  # fmt: skip


@compiled
def scatter_compose(
    first: Any, last: Any, tiles: Any, shape: Any, grad: Any, disps: Any, grads: Any, needed: Any
) -> None:
    """Tiles of the composition's gradient: goes back through the chain and adds to each field's gradient."""
    strides = strides_of(shape)
    size = np.uintp(shape[0] * shape[1] * shape[2])
    lookups = len(disps) - 1
    at, pulled = np.empty((lookups, 3, shape[2]), grad.dtype), np.empty((3, shape[2]), grad.dtype)
    for task in range(first, last):
        batch, x0, x1, y0, y1 = tile_range(tiles[task], shape)
        start = np.uintp(batch * 3) * size
        for x in range(x0, x1):
            for y in range(y0, y1):
                origin = start + np.uintp((x * shape[1] + y) * shape[2])
                _row_of_positions(disps, shape, start, origin, x, y, at)
                for axis in range(3):
                    for z in range(shape[2]):
                        pulled[axis, z] = grad[origin + np.uintp(axis) * size + np.uintp(z)]
                for outer in range(lookups):
                    disp, target, add = disps[outer], grads[outer], needed[outer]
                    for z in range(shape[2]):
                        k = np.uintp(z)
                        px, py, pz = at[outer, 0, k], at[outer, 1, k], at[outer, 2, k]
                        gx, gy, gz = pulled[0, k], pulled[1, k], pulled[2, k]
                        cell, wx, wy, wz = locate(px, py, pz, shape)
                        cell += start
                        hx, hy, hz = pulled_slopes(disp, cell, size, strides, wx, wy, wz, gx, gy, gz)
                        if add:
                            add_to_corners(target, cell, strides, wx, wy, wz, gx)
                            add_to_corners(target, cell + size, strides, wx, wy, wz, gy)
                            add_to_corners(target, cell + size + size, strides, wx, wy, wz, gz)
                        pulled[0, k] = gx + hx * clamp_slope(px, shape[0])
                        pulled[1, k] = gy + hy * clamp_slope(py, shape[1])
                        pulled[2, k] = gz + hz * clamp_slope(pz, shape[2])
                if needed[lookups]:
                    target = grads[lookups]
                    for axis in range(3):
                        for z in range(shape[2]):
                            target[origin + np.uintp(axis) * size + np.uintp(z)] = pulled[axis, z]


@compiled
def _row_of_positions(disps: Any, shape: Any, start: Any, origin: Any, x: Any, y: Any, at: Any) -> None:
    """Where one row of voxels looks up each field of a chain but the last one, voxels."""
    real = at.dtype.type
    strides = strides_of(shape)
    size = np.uintp(shape[0] * shape[1] * shape[2])
    inner = disps[len(disps) - 1]
    now = at[len(disps) - 2]
    for z in range(shape[2]):
        i = origin + np.uintp(z)
        now[0, z], now[1, z], now[2, z] = (
            real(x) + inner[i],
            real(y) + inner[i + size],
            real(z) + inner[i + size + size],
        )
    for outer in range(len(disps) - 2, 0, -1):
        disp, now, after = disps[outer], at[outer], at[outer - 1]
        for z in range(shape[2]):
            k = np.uintp(z)
            px, py, pz = now[0, k], now[1, k], now[2, k]
            cell, wx, wy, wz = locate(px, py, pz, shape)
            cell += start
            after[0, k] = px + trilinear(disp, cell, strides, wx, wy, wz)
            after[1, k] = py + trilinear(disp, cell + size, strides, wx, wy, wz)
            after[2, k] = pz + trilinear(disp, cell + size + size, strides, wx, wy, wz)


@compiled
def scatter_invert(
    first: Any, last: Any, tiles: Any, shape: Any, grad: Any, disp: Any, inverse: Any, grad_disp: Any
) -> None:
    """Tiles of the inversion's gradient: solves ``(I + J^T) lambda = grad`` and adds ``-lambda`` where it looked."""
    real = grad.dtype.type
    strides = strides_of(shape)
    size = np.uintp(shape[0] * shape[1] * shape[2])
    for task in range(first, last):
        batch, x0, x1, y0, y1 = tile_range(tiles[task], shape)
        start = np.uintp(batch * 3) * size
        for x in range(x0, x1):
            for y in range(y0, y1):
                i = start + np.uintp((x * shape[1] + y) * shape[2])
                for z in range(shape[2]):
                    px, py, pz = (
                        real(x) + inverse[i],
                        real(y) + inverse[i + size],
                        real(z) + inverse[i + size + size],
                    )
                    cell, wx, wy, wz = locate(px, py, pz, shape)
                    cell += start
                    ax, ay, az = slopes_at(disp, cell, strides, wx, wy, wz)
                    bx, by, bz = slopes_at(disp, cell + size, strides, wx, wy, wz)
                    cx, cy, cz = slopes_at(disp, cell + size + size, strides, wx, wy, wz)
                    inside = clamp_slope(px, shape[0])
                    ax, bx, cx = real(1) + inside * ax, inside * bx, inside * cx  # first row of I + J^T
                    inside = clamp_slope(py, shape[1])
                    ay, by, cy = inside * ay, real(1) + inside * by, inside * cy
                    inside = clamp_slope(pz, shape[2])
                    az, bz, cz = inside * az, inside * bz, real(1) + inside * cz
                    gx, gy, gz = grad[i], grad[i + size], grad[i + size + size]
                    lx, ly, lz = solve(ax, bx, cx, ay, by, cy, az, bz, cz, -gx, -gy, -gz)
                    add_to_corners(grad_disp, cell, strides, wx, wy, wz, lx)
                    add_to_corners(grad_disp, cell + size, strides, wx, wy, wz, ly)
                    add_to_corners(grad_disp, cell + size + size, strides, wx, wy, wz, lz)
                    i += np.uintp(1)


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
