"""Compiled look-ups of feature maps whose channels lie innermost in memory, as convolutions like them on a CPU.

Values come as flat arrays of ``(B, X, Y, Z, C)``; points, rows and tiles are those of ``lookups`` and ``scatter``. The
processor works on several channels of one voxel at once; the arithmetic of each number is the same as there.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.lookups import clamp_derivative, gradients, locate_row, strides_of
from sitreg_lumir.deform.backends.cpu.scatter import tile_range
from sitreg_lumir.deform.backends.cpu.threads import compiled


@compiled
def lookup(
    first: Any, last: Any, shape: Any, values: Any, channels: Any, points: Any, grid: Any, relative: Any, out: Any
) -> None:
    """Rows of ``values`` (of ``shape``) at points (on ``grid``)."""
    sx, sy, sz = strides_of(shape)
    count = np.uintp(channels)
    sx, sy, sz = sx * count, sy * count, sz * count
    cells = np.empty(grid[2], np.uintp)
    at, weights = np.empty((3, grid[2]), points.dtype), np.empty((3, grid[2]), points.dtype)
    for row in range(first, last):
        locate_row(row, shape, points, grid, relative, cells, at, weights)
        start = np.uintp(row // (grid[0] * grid[1]) * shape[0] * shape[1] * shape[2])
        for z in range(grid[2]):
            k = np.uintp(z)
            i = (start + cells[k]) * count
            to = (np.uintp(row * grid[2]) + k) * count
            wx, wy, wz = weights[0, k], weights[1, k], weights[2, k]
            for channel in range(channels):
                j = i + np.uintp(channel)
                a = values[j] + wz * (values[j + sz] - values[j])
                b = values[j + sy] + wz * (values[j + sy + sz] - values[j + sy])
                c = values[j + sx] + wz * (values[j + sx + sz] - values[j + sx])
                d = values[j + sx + sy] + wz * (values[j + sx + sy + sz] - values[j + sx + sy])
                a += wy * (b - a)
                c += wy * (d - c)
                out[to + np.uintp(channel)] = a + wx * (c - a)


@compiled
def lookup_gradient(
    first: Any, last: Any, shape: Any, values: Any, channels: Any, points: Any, grid: Any, relative: Any,
    grad: Any, grad_points: Any,
) -> None:  # fmt: skip
    """Rows of the gradient of :func:`lookup` with respect to the points, ``(B, 3, ...)``."""
    sx, sy, sz = strides_of(shape)
    count = np.uintp(channels)
    sx, sy, sz = sx * count, sy * count, sz * count
    voxels = np.uintp(grid[0] * grid[1] * grid[2])
    cells = np.empty(grid[2], np.uintp)
    at, weights = np.empty((3, grid[2]), points.dtype), np.empty((3, grid[2]), points.dtype)
    parts = np.empty((3, channels), points.dtype)
    for row in range(first, last):
        locate_row(row, shape, points, grid, relative, cells, at, weights)
        batch = row // (grid[0] * grid[1])
        start = np.uintp(batch * shape[0] * shape[1] * shape[2])
        first_to = np.uintp(batch * 3) * voxels + np.uintp(row % (grid[0] * grid[1]) * grid[2])
        for z in range(grid[2]):
            k = np.uintp(z)
            i = (start + cells[k]) * count
            of = (np.uintp(row * grid[2]) + k) * count
            wx, wy, wz = weights[0, k], weights[1, k], weights[2, k]
            for channel in range(channels):
                c = np.uintp(channel)
                j = i + c
                dx, dy, dz = gradients(
                    values[j], values[j + sz], values[j + sy], values[j + sy + sz],
                    values[j + sx], values[j + sx + sz], values[j + sx + sy], values[j + sx + sy + sz],
                    wx, wy, wz,
                )  # fmt: skip
                parts[0, c], parts[1, c], parts[2, c] = grad[of + c] * dx, grad[of + c] * dy, grad[of + c] * dz
            for axis in range(3):
                total = parts[axis, 0]
                for channel in range(1, channels):
                    total += parts[axis, np.uintp(channel)]
                to = first_to + np.uintp(axis) * voxels + k
                grad_points[to] = total * clamp_derivative(at[axis, k], shape[axis])


@compiled
def scatter_lookup(
    first: Any, last: Any, tiles: Any, shape: Any, channels: Any, points: Any, grid: Any, relative: Any,
    grad: Any, grad_values: Any,
) -> None:  # fmt: skip
    """Tiles of the gradient of :func:`lookup` with respect to the values."""
    unit = grad.dtype.type(1)
    sx, sy, sz = strides_of(shape)
    count = np.uintp(channels)
    sx, sy, sz = sx * count, sy * count, sz * count
    cells = np.empty(grid[2], np.uintp)
    at, weights = np.empty((3, grid[2]), points.dtype), np.empty((3, grid[2]), points.dtype)
    for task in range(first, last):
        batch, x0, x1, y0, y1 = tile_range(tiles[task], grid)
        start = np.uintp(batch * shape[0] * shape[1] * shape[2])
        for x in range(x0, x1):
            for y in range(y0, y1):
                row = (batch * grid[0] + x) * grid[1] + y
                locate_row(row, shape, points, grid, relative, cells, at, weights)
                for z in range(grid[2]):
                    k = np.uintp(z)
                    i = (start + cells[k]) * count
                    of = (np.uintp(row * grid[2]) + k) * count
                    wx, wy, wz = weights[0, k], weights[1, k], weights[2, k]
                    for corner in range(8):
                        share = (wx if corner & 4 else unit - wx) * (wy if corner & 2 else unit - wy)
                        share *= wz if corner & 1 else unit - wz
                        j = i
                        if corner & 4:
                            j += sx
                        if corner & 2:
                            j += sy
                        if corner & 1:
                            j += sz
                        for channel in range(channels):
                            c = np.uintp(channel)
                            grad_values[j + c] += share * grad[of + c]
