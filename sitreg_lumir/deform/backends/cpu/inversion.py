"""Compiled loops that invert a field, and the gradient of that. The field comes as an interleaved ``copy``."""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.interleaved import (
    FOUR,
    add_to_corners,
    fetch_ahead,
    find_cells,
    find_clamp_derivatives,
    from_vectors,
    gradients,
    room_for,
    row_at,
    steps_of,
    to_vectors,
)
from sitreg_lumir.deform.backends.cpu.scatter import tile_range
from sitreg_lumir.deform.backends.cpu.threads import compiled
from sitreg_lumir.deform.backends.cpu.vectors import (
    all_x,
    all_y,
    all_z,
    columns,
    neighbours,
    nothing,
    put,
    scalars,
    turned,
    unit_x,
    unit_y,
    unit_z,
    within,
)


@compiled
def invert(first: Any, last: Any, shape: Any, copy: Any, tolerance: Any, max_iterations: Any, inverse: Any) -> None:
    """Planes of the inverse, by Newton's method.

    Each voxel starts on the straight line through its two neighbours in the rows before, not through those in its
    own row: so the processor works on several voxels at once. A Newton step below twice the tolerance ends the
    iteration, as it leaves a far smaller error. Where four steps do not get there, the fixed-point iteration goes
    on, which always does for contractions, and forgets what was not finite.
    """
    real = inverse.dtype.type
    length, room, size = shape[2], room_for(shape), np.uintp(shape[0] * shape[1] * shape[2])
    zero, steps = np.uintp(0), steps_of(shape)
    cells, weights = np.empty(room, np.uintp), np.empty((3, room), inverse.dtype)
    free, vectors = np.zeros(4 * room, inverse.dtype), np.empty(4 * room, inverse.dtype)
    unsettled = np.empty(room, np.uintp)  # the first voxel of each two
    for row in range(first * shape[1], last * shape[1]):
        x, y, i, start = row_at(row, shape)
        _start_row(row, shape, copy, inverse)
        to_vectors(inverse, i, size, length, room, vectors, zero)
        count = room // 2
        for index in range(count):
            unsettled[index] = 2 * index
        for iteration in range(max_iterations):
            plain = iteration > 3
            stop = real(tolerance) if plain else real(tolerance) + real(tolerance)
            find_cells(x, y, inverse, i, size, shape, start, cells, weights)
            find_clamp_derivatives(x, y, inverse, i, size, shape, free)
            left = 0
            for index in range(count):
                k = unsettled[index]
                j, cell, next_cell = k * FOUR, cells[k], cells[k + np.uintp(1)]
                wx, wy, wz = scalars(weights[0], k), scalars(weights[1], k), scalars(weights[2], k)
                before = neighbours(vectors, j)
                moved, dx, dy, dz = gradients(copy, cell, next_cell, steps, wx, wy, wz)
                after = real(0) - moved if plain else before - _newton(moved + before, dx, dy, dz, neighbours(free, j))
                put(vectors, j, after)
                unsettled[left] = k
                left += 0 if within(after - before, stop) else 1
                fetch_ahead(copy, cell, steps)
            from_vectors(vectors, zero, length, inverse, i, size)
            count = left
            if count == 0:
                break


@compiled
def _start_row(row: Any, shape: Any, copy: Any, inverse: Any) -> None:
    """Where the iteration of a row starts."""
    _, y, i, _ = row_at(row, shape)
    size, length = np.uintp(shape[0] * shape[1] * shape[2]), np.uintp(shape[2])
    for component in range(3):
        j = np.uintp(row) * length * FOUR + np.uintp(component)
        for z in range(shape[2]):
            k = i + np.uintp(component) * size + np.uintp(z)
            if y == 0:
                inverse[k] = -copy[j + np.uintp(z) * FOUR]
            elif y == 1:
                inverse[k] = inverse[k - length]
            else:
                inverse[k] = inverse[k - length] + (inverse[k - length] - inverse[k - length - length])


@compiled
def _cross(a: Any, b: Any) -> Any:
    return turned(a * turned(b) - turned(a) * b)


@compiled
def _cofactors(dx: Any, dy: Any, dz: Any, free: Any) -> Any:
    """What the inverse of a map's 3x3 derivative is made of: its rows times the determinant, and that.

    ``dx``, ``dy`` and ``dz`` are the derivatives of the displacements, ``free`` those of the clamp.
    """
    a, b, c = all_x(free) * dx + unit_x(dx), all_y(free) * dy + unit_y(dy), all_z(free) * dz + unit_z(dz)
    p = _cross(b, c)
    products = a * p
    return p, _cross(c, a), _cross(a, b), all_x(products) + all_y(products) + all_z(products)


@compiled
def _newton(rest: Any, dx: Any, dy: Any, dz: Any, free: Any) -> Any:
    """The displacement that, to first order, makes up for what is left over."""
    p, q, r, determinant = _cofactors(dx, dy, dz, free)
    by_x, by_y, by_z = columns(p * rest, q * rest, r * rest, nothing(rest))
    return (by_x + by_y + by_z) / determinant


@compiled
def scatter_invert(
    first: Any, last: Any, tiles: Any, shape: Any, grad: Any, copy: Any, inverse: Any, target: Any
) -> None:
    """Tiles of the inversion's gradient, interleaved: where the inverse leads to, adds ``-lambda``.

    ``(I + J^T) lambda = grad``, with the field's derivatives ``J`` there.
    """
    real, length, room = grad.dtype.type, shape[2], room_for(shape)
    size, zero, steps = np.uintp(shape[0] * shape[1] * shape[2]), np.uintp(0), steps_of(shape)
    cells, weights = np.empty(room, np.uintp), np.empty((3, room), grad.dtype)
    free, vectors = np.zeros(4 * room, grad.dtype), np.empty(4 * room, grad.dtype)
    for task in range(first, last):
        batch, x0, x1, y0, y1 = tile_range(tiles[task], shape)
        for x in range(x0, x1):
            for y in range(y0, y1):
                _, _, i, start = row_at((batch * shape[0] + x) * shape[1] + y, shape)
                find_cells(x, y, inverse, i, size, shape, start, cells, weights)
                find_clamp_derivatives(x, y, inverse, i, size, shape, free)
                to_vectors(grad, i, size, length, room, vectors, zero)
                for z in range(0, length, 2):
                    k, j = np.uintp(z), np.uintp(z) * FOUR
                    cell, next_cell, g = cells[k], cells[k + np.uintp(1)], real(0) - neighbours(vectors, j)
                    wx, wy, wz = scalars(weights[0], k), scalars(weights[1], k), scalars(weights[2], k)
                    _, dx, dy, dz = gradients(copy, cell, next_cell, steps, wx, wy, wz)
                    p, q, r, determinant = _cofactors(dx, dy, dz, neighbours(free, j))
                    value = (all_x(g) * p + all_y(g) * q + all_z(g) * r) / determinant
                    add_to_corners(target, cell, next_cell, steps, wx, wy, wz, value)
                    fetch_ahead(copy, cell, steps)
                    fetch_ahead(target, cell, steps)
