"""Interleaved copies of fields: all components of a voxel are read, or added to, in one step.

A copy is a flat array of ``(B, X, Y, Z, 4)``, its last component 0 or unused. The loops go along rows, two voxels at
once (see ``vectors``). Buffers for a row have room for an even number of voxels; the spare one behind an odd row
looks where the last one does, with weights of 0, and its vector is 0 at first.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.grids import blend_row, upsample_rows
from sitreg_lumir.deform.backends.cpu.lookups import clamp_derivative, locate
from sitreg_lumir.deform.backends.cpu.threads import compiled
from sitreg_lumir.deform.backends.cpu.vectors import columns, fetch, first_voxel, put, second_voxel, voxel, voxels

FOUR = np.uintp(4)


@compiled
def interleave(first: Any, last: Any, shape: Any, field: Any, copy: Any) -> None:
    """Planes of a field's copy."""
    area = shape[1] * shape[2]
    size = np.uintp(shape[0] * area)
    for plane in range(first, last):
        i = np.uintp((plane // shape[0] * 3 * shape[0] + plane % shape[0]) * area)
        to_vectors(field, i, size, area, area, copy, np.uintp(plane * area) * FOUR)


@compiled
def separate(first: Any, last: Any, shape: Any, copy: Any, field: Any) -> None:
    """Planes of the field that a copy stands for."""
    area = shape[1] * shape[2]
    size = np.uintp(shape[0] * area)
    for plane in range(first, last):
        i = np.uintp((plane // shape[0] * 3 * shape[0] + plane % shape[0]) * area)
        from_vectors(copy, np.uintp(plane * area) * FOUR, area, field, i, size)


@compiled
def clear(first: Any, last: Any, shape: Any, copy: Any) -> None:
    """Planes of zeros."""
    numbers = 4 * shape[1] * shape[2]
    for i in range(first * numbers, last * numbers):
        copy[np.uintp(i)] = 0


@compiled
def upsample_interleaved(
    first: Any, last: Any, control_points: Any, factor: Any, index_x: Any, weights_x: Any, index_y: Any,
    weights_y: Any, index_z: Any, weights_z: Any, shape: Any, copy: Any,
) -> None:  # fmt: skip
    """Planes of an interleaved field on a grid of ``shape`` from ``control_points`` ``(B * 3, x, y, z)``."""
    size_x, size_y, size_z = shape
    _, _, level_y, level_z = control_points.shape
    scale = copy.dtype.type(factor)
    plane = np.empty((level_y, level_z), copy.dtype)
    rows = np.empty((3, level_y, size_z), copy.dtype)
    line = np.empty(3 * size_z, copy.dtype)
    for task in range(first, last):
        batch, x = task // size_x, task % size_x
        for c in range(3):
            upsample_rows(
                control_points[3 * batch + c], index_x[x], scale * weights_x[x], index_z, weights_z, plane, rows[c]
            )
        for y in range(size_y):
            index, weights = index_y[y], weights_y[y]
            for c in range(3):
                part = line[c * size_z : (c + 1) * size_z]
                blend_row(rows[c, index[0]], rows[c, index[1]], rows[c, index[2]], rows[c, index[3]], weights, part)
            to = np.uintp((task * size_y + y) * size_z) * FOUR
            to_vectors(line, np.uintp(0), np.uintp(size_z), size_z, size_z, copy, to)


@compiled
def to_vectors(field: Any, i: Any, size: Any, length: Any, room: Any, vectors: Any, to: Any) -> None:
    """Interleaves voxels, from index ``i`` on, of a field whose components lie ``size`` apart; zeros up to ``room``."""
    for place in range(length):
        k, j = i + np.uintp(place), to + np.uintp(place) * FOUR
        vectors[j] = field[k]
        vectors[j + np.uintp(1)] = field[k + size]
        vectors[j + np.uintp(2)] = field[k + size + size]
        vectors[j + np.uintp(3)] = 0
    for number in range(4 * length, 4 * room):
        vectors[to + np.uintp(number)] = 0


@compiled
def from_vectors(vectors: Any, of: Any, length: Any, field: Any, i: Any, size: Any) -> None:
    """What :func:`to_vectors` does, backwards."""
    whole = length // 4 * 4
    for place in range(0, whole, 4):
        k, j = i + np.uintp(place), of + np.uintp(place) * FOUR
        a, b = voxel(vectors, j), voxel(vectors, j + FOUR)
        c, d = voxel(vectors, j + FOUR + FOUR), voxel(vectors, j + FOUR + FOUR + FOUR)
        x, y, z = columns(a, b, c, d)
        put(field, k, x)
        put(field, k + size, y)
        put(field, k + size + size, z)
    for place in range(whole, length):
        k, j = i + np.uintp(place), of + np.uintp(place) * FOUR
        field[k], field[k + size] = vectors[j], vectors[j + np.uintp(1)]
        field[k + size + size] = vectors[j + np.uintp(2)]


@compiled
def room_for(shape: Any) -> Any:
    """Voxels of a buffer for a row."""
    return shape[2] + shape[2] % 2


@compiled
def row_at(row: Any, shape: Any) -> Any:
    """``x`` and ``y`` of a row, the index of its first voxel in a field, and that of its batch item in a copy."""
    area = shape[0] * shape[1]
    batch, place = row // area, row % area
    i, start = (batch * 3 * area + place) * shape[2], batch * area * shape[2] * 4
    return place // shape[1], place % shape[1], np.uintp(i), np.uintp(start)


@compiled
def find_cells(x: Any, y: Any, disp: Any, i: Any, size: Any, shape: Any, start: Any, cells: Any, weights: Any) -> None:
    """Where a row of displacements leads to: the cells in a copy, and the weights of their upper corners."""
    real = disp.dtype.type
    for z in range(shape[2]):
        k = np.uintp(z)
        j = i + k
        px, py, pz = real(x) + disp[j], real(y) + disp[j + size], real(z) + disp[j + size + size]
        cell, weights[0, k], weights[1, k], weights[2, k] = locate(px, py, pz, shape)
        cells[k] = start + cell * FOUR
    for z in range(shape[2], len(cells)):
        cells[z] = cells[z - 1]
        weights[0, z] = weights[1, z] = weights[2, z] = 0


@compiled
def find_clamp_derivatives(x: Any, y: Any, disp: Any, i: Any, size: Any, shape: Any, free: Any) -> None:
    """Derivatives of the clamp, along the three axes, where a row of displacements leads to: 0 or 1."""
    real = disp.dtype.type
    for z in range(shape[2]):
        j, k = i + np.uintp(z), np.uintp(z) * FOUR
        free[k] = clamp_derivative(real(x) + disp[j], shape[0])
        free[k + np.uintp(1)] = clamp_derivative(real(y) + disp[j + size], shape[1])
        free[k + np.uintp(2)] = clamp_derivative(real(z) + disp[j + size + size], shape[2])
        free[k + np.uintp(3)] = 0


@compiled
def steps_of(shape: Any) -> Any:
    """Index distance in a copy to the next voxel along each axis, 0 along axes of one voxel."""
    return (
        np.uintp(4 * shape[1] * shape[2] if shape[0] > 1 else 0),
        np.uintp(4 * shape[2] if shape[1] > 1 else 0),
        np.uintp(4 if shape[2] > 1 else 0),
    )


@compiled
def blend(copy: Any, i: Any, j: Any, steps: Any, wx: Any, wy: Any, wz: Any) -> Any:
    """The trilinear interpolants in two cells."""
    sx, sy, sz = steps
    a, b = voxels(copy, i, j), voxels(copy, i + sy, j + sy)
    c, d = voxels(copy, i + sx, j + sx), voxels(copy, i + sx + sy, j + sx + sy)
    i, j = i + sz, j + sz
    a = a + wz * (voxels(copy, i, j) - a)
    b = b + wz * (voxels(copy, i + sy, j + sy) - b)
    c = c + wz * (voxels(copy, i + sx, j + sx) - c)
    d = d + wz * (voxels(copy, i + sx + sy, j + sx + sy) - d)
    a = a + wy * (b - a)
    c = c + wy * (d - c)
    return a + wx * (c - a)


@compiled
def gradients(copy: Any, i: Any, j: Any, steps: Any, wx: Any, wy: Any, wz: Any) -> Any:
    """The trilinear interpolants in two cells, and their derivatives along the three axes."""
    sx, sy, sz = steps
    a, b = voxels(copy, i, j), voxels(copy, i + sy, j + sy)
    c, d = voxels(copy, i + sx, j + sx), voxels(copy, i + sx + sy, j + sx + sy)
    i, j = i + sz, j + sz
    az, bz = voxels(copy, i, j) - a, voxels(copy, i + sy, j + sy) - b
    cz, dz = voxels(copy, i + sx, j + sx) - c, voxels(copy, i + sx + sy, j + sx + sy) - d
    a, b, c, d = a + wz * az, b + wz * bz, c + wz * cz, d + wz * dz
    ay, cy = b - a, d - c
    a, c = a + wy * ay, c + wy * cy
    az, cz = az + wy * (bz - az), cz + wy * (dz - cz)
    return a + wx * (c - a), c - a, ay + wx * (cy - ay), az + wx * (cz - az)


@compiled
def add_to_corners(copy: Any, i: Any, j: Any, steps: Any, wx: Any, wy: Any, wz: Any, value: Any) -> None:
    """Adds the vectors of two voxels to the corners of a cell each, in shares of the trilinear weights."""
    sx, sy, sz = steps
    upper = wx * value
    lower = value - upper
    lower_y, upper_y = wy * lower, wy * upper
    _add_along_z(copy, i, j, sz, wz, lower - lower_y)
    _add_along_z(copy, i + sy, j + sy, sz, wz, lower_y)
    _add_along_z(copy, i + sx, j + sx, sz, wz, upper - upper_y)
    _add_along_z(copy, i + sx + sy, j + sx + sy, sz, wz, upper_y)


@compiled
def _add_along_z(copy: Any, i: Any, j: Any, sz: Any, wz: Any, value: Any) -> None:
    upper = wz * value
    lower = value - upper
    put(copy, i, voxel(copy, i) + first_voxel(lower))
    put(copy, i + sz, voxel(copy, i + sz) + first_voxel(upper))
    put(copy, j, voxel(copy, j) + second_voxel(lower))
    put(copy, j + sz, voxel(copy, j + sz) + second_voxel(upper))


@compiled
def fetch_ahead(copy: Any, i: Any, steps: Any) -> None:
    """Asks for what the next row and the next plane will need where this row needs the cell at ``i``."""
    sx, sy, _ = steps
    fetch(copy, i + sx + sy + sy)
    fetch(copy, i + sx + sx)
