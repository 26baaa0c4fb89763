"""Compiled look-ups of images and feature maps, and their gradients.

Fields come as flat arrays of contiguous ``(B, C, X, Y, Z)`` tensors, ``shape`` as ``(X, Y, Z)``. A loop works on
the tasks ``first`` to ``last``: rows along the last axis. Indices into arrays are unsigned, which spares a test
for negative ones.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.threads import compiled


@compiled
def strides_of(shape: Any) -> Any:
    """Index distance to the next voxel along each axis, 0 along axes of one voxel."""
    return (
        np.uintp(shape[1] * shape[2] if shape[0] > 1 else 0),
        np.uintp(shape[2] if shape[1] > 1 else 0),
        np.uintp(1 if shape[2] > 1 else 0),
    )


@compiled
def _along(position: Any, size: Any) -> Any:
    """Index of the voxel below a clamped position, and the weight of the voxel above (NaN counts as 0)."""
    real = type(position)
    inside = min(real(size - 1), max(real(0), position))
    lower = min(np.int64(inside), max(size - 2, 0))
    return lower, inside - real(lower)


@compiled
def locate(px: Any, py: Any, pz: Any, shape: Any) -> Any:
    """The cell of a position: flat index of its lowest corner, and the weights of the upper corners."""
    ix, wx = _along(px, shape[0])
    iy, wy = _along(py, shape[1])
    iz, wz = _along(pz, shape[2])
    return np.uintp((ix * shape[1] + iy) * shape[2] + iz), wx, wy, wz


@compiled
def clamp_derivative(position: Any, size: Any) -> Any:
    """Derivative of the clamp: 1 strictly between the first and the last voxel, else 0."""
    real = type(position)
    return real(1) if real(0) < position < real(size - 1) else real(0)


@compiled
def trilinear(values: Any, i: Any, strides: Any, wx: Any, wy: Any, wz: Any) -> Any:
    """The weighted mean of the eight corners of the cell at index ``i``."""
    sx, sy, sz = strides
    j, k, m = i + sy, i + sx, i + sx + sy
    a = values[i] + wz * (values[i + sz] - values[i])
    b = values[j] + wz * (values[j + sz] - values[j])
    c = values[k] + wz * (values[k + sz] - values[k])
    d = values[m] + wz * (values[m + sz] - values[m])
    a += wy * (b - a)
    c += wy * (d - c)
    return a + wx * (c - a)


@compiled
def gradients(
    v000: Any, v001: Any, v010: Any, v011: Any, v100: Any, v101: Any, v110: Any, v111: Any, wx: Any, wy: Any, wz: Any
) -> Any:
    """Derivatives along the three axes of the trilinear interpolant of eight corners."""
    d00, d01, d10, d11 = v001 - v000, v011 - v010, v101 - v100, v111 - v110
    a00, a01, a10, a11 = v000 + wz * d00, v010 + wz * d01, v100 + wz * d10, v110 + wz * d11
    e0, e1 = a01 - a00, a11 - a10
    b0, b1 = a00 + wy * e0, a10 + wy * e1
    f0, f1 = d00 + wy * (d01 - d00), d10 + wy * (d11 - d10)
    return b1 - b0, e0 + wx * (e1 - e0), f0 + wx * (f1 - f0)


@compiled
def gradients_at(values: Any, i: Any, strides: Any, wx: Any, wy: Any, wz: Any) -> Any:
    """Derivatives of :func:`trilinear` by x, y and z."""
    sx, sy, sz = strides
    j, k, m = i + sy, i + sx, i + sx + sy
    return gradients(
        values[i], values[i + sz], values[j], values[j + sz], values[k], values[k + sz], values[m], values[m + sz],
        wx, wy, wz,
    )  # fmt: skip


@compiled
def locate_row(row: Any, shape: Any, points: Any, grid: Any, relative: Any, cells: Any, at: Any, weights: Any) -> Any:
    """Cells, positions and weights of one row of points; ``relative`` ones count from their own grid index."""
    real = points.dtype.type
    area = grid[0] * grid[1]
    size = np.uintp(area * grid[2])
    batch, x, y = row // area, row // grid[1] % grid[0], row % grid[1]
    i = np.uintp(batch * 3) * size + np.uintp(row % area * grid[2])
    own = real(1) if relative else real(0)
    for z in range(grid[2]):
        k = np.uintp(z)
        px, py, pz = points[i + k], points[i + k + size], points[i + k + size + size]
        px, py, pz = px + own * real(x), py + own * real(y), pz + own * real(z)
        at[0, k], at[1, k], at[2, k] = px, py, pz
        cells[k], weights[0, k], weights[1, k], weights[2, k] = locate(px, py, pz, shape)


@compiled
def lookup(
    first: Any,
    last: Any,
    shape: Any,
    values: Any,
    channels: Any,
    points: Any,
    grid: Any,
    relative: Any,
    out: Any,
) -> None:
    """Rows of ``values`` (of ``shape``) at points (on ``grid``)."""
    strides = strides_of(shape)
    size, count = np.uintp(shape[0] * shape[1] * shape[2]), np.uintp(grid[0] * grid[1] * grid[2])
    cells = np.empty(grid[2], np.uintp)
    at, weights = np.empty((3, grid[2]), points.dtype), np.empty((3, grid[2]), points.dtype)
    for row in range(first, last):
        locate_row(row, shape, points, grid, relative, cells, at, weights)
        batch = row // (grid[0] * grid[1])
        i = np.uintp(row % (grid[0] * grid[1]) * grid[2])
        for channel in range(batch * channels, (batch + 1) * channels):
            start, to = np.uintp(channel) * size, np.uintp(channel) * count + i
            for z in range(grid[2]):
                k = np.uintp(z)
                cell = start + cells[k]
                out[to + k] = trilinear(values, cell, strides, weights[0, k], weights[1, k], weights[2, k])


@compiled
def lookup_gradient(
    first: Any, last: Any, shape: Any, values: Any, channels: Any, points: Any, grid: Any, relative: Any,
    grad: Any, grad_points: Any,
) -> None:  # fmt: skip
    """Rows of the gradient of :func:`lookup` with respect to the points."""
    strides = strides_of(shape)
    size, count = np.uintp(shape[0] * shape[1] * shape[2]), np.uintp(grid[0] * grid[1] * grid[2])
    cells = np.empty(grid[2], np.uintp)
    at, weights = np.empty((3, grid[2]), points.dtype), np.empty((3, grid[2]), points.dtype)
    total = np.empty((3, grid[2]), points.dtype)
    for row in range(first, last):
        locate_row(row, shape, points, grid, relative, cells, at, weights)
        batch = row // (grid[0] * grid[1])
        i = np.uintp(row % (grid[0] * grid[1]) * grid[2])
        total[:] = 0
        for channel in range(batch * channels, (batch + 1) * channels):
            start, to = np.uintp(channel) * size, np.uintp(channel) * count + i
            for z in range(grid[2]):
                k = np.uintp(z)
                cell = start + cells[k]
                dx, dy, dz = gradients_at(values, cell, strides, weights[0, k], weights[1, k], weights[2, k])
                total[0, k] += grad[to + k] * dx
                total[1, k] += grad[to + k] * dy
                total[2, k] += grad[to + k] * dz
        for axis in range(3):
            to = np.uintp(batch * 3 + axis) * count + i
            for z in range(grid[2]):
                k = np.uintp(z)
                grad_points[to + k] = total[axis, k] * clamp_derivative(at[axis, k], shape[axis])


@compiled
def _share_inside(position: Any, size: Any) -> Any:
    """What a look-up with zeros outside sees of an axis of ones (NaN sees nothing)."""
    real = type(position)
    last = real(size - 1)
    share = real(1) if real(0) <= position <= last else real(1) - max(-position, position - last)
    return share if share > real(0) else real(0)


@compiled
def inside_mask(first: Any, last: Any, shape: Any, mask: Any, points: Any, grid: Any, relative: Any, kept: Any) -> None:
    """Rows of where a mask (0 and 1, int8), trilinear with zeros outside, is almost 1 at points (on ``grid``)."""
    strides = strides_of(shape)
    size = np.uintp(shape[0] * shape[1] * shape[2])
    cells = np.empty(grid[2], np.uintp)
    at, weights = np.empty((3, grid[2]), points.dtype), np.empty((3, grid[2]), points.dtype)
    for row in range(first, last):
        locate_row(row, shape, points, grid, relative, cells, at, weights)
        start, to = np.uintp(row // (grid[0] * grid[1])) * size, np.uintp(row * grid[2])
        for z in range(grid[2]):
            k = np.uintp(z)
            share = _share_inside(at[0, k], shape[0]) * _share_inside(at[1, k], shape[1])
            share *= _share_inside(at[2, k], shape[2])
            value = trilinear(mask, start + cells[k], strides, weights[0, k], weights[1, k], weights[2, k])
            kept[to + k] = share * value >= 1 - 1e-3
