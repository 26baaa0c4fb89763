"""Compiled loop that moves points through a chain of continuous cubic B-spline updates and their inverses, exactly.

Each update's control points lie in memory as ``(X + 4, Y + 4, Z + 4, 4)``, in full-resolution voxels: their border is
repeated twice on each side, and each has a spare component beside its three. Positions are float64, displacements of
one update in the control points' type.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.cpu.threads import compiled
from sitreg_lumir.deform.cpu.vectors import of_all_voxels, put, sixteen

POINTS = 1024  # of a task
_NUMBERS = 16  # of a row of four control points
_LARGEST_RESIDUAL = 0.995  # of that before: otherwise a Newton step is replaced by one of the fixed-point iteration


@compiled
def move_points(
    first: Any, last: Any, points: Any, chain: Any, inverted: Any, coefficients: Any, starts: Any, sizes: Any,
    factors: Any, shape: Any, tolerance: Any, max_iterations: Any, moved: Any, jacobians: Any, unsettled: Any,
) -> None:  # fmt: skip
    """Moves points, ``POINTS`` for each task.

    Args:
        first: task to begin with.
        last: task to end before.
        points: ``(3, N)`` float64, voxels.
        chain: which update is applied at each step, in the order of application, int64.
        inverted: whether its inverse is applied instead, bool.
        coefficients: of all updates, one behind the other, flat.
        starts: of each update in them.
        sizes: ``(updates, 3)``, of each update's grid with its repeated border.
        factors: spacing of each update's control points, full-resolution voxels.
        shape: of the full-resolution grid; beyond it the displacement at its border holds.
        tolerance: a Newton step below it is the last one, voxels.
        max_iterations: upper limit of look-ups for one inversion.
        moved: ``(3, N)`` float64, is filled.
        jacobians: ``(9, N)`` float64, filled with derivatives of moved points by points, row by row; or ``(9, 0)``.
        unsettled: ``(N,)`` bool, is set where an inversion did not converge.
    """
    numbers = np.zeros(_NUMBERS * 8, coefficients.dtype)
    found, steps = np.zeros(16, coefficients.dtype), np.zeros((3, 3))
    total, position, wanted, kept = np.zeros((3, 3)), np.zeros(3), np.zeros(3), np.zeros(3)
    with_jacobians = jacobians.shape[1] > 0
    for point in range(first * POINTS, min(last * POINTS, points.shape[1])):
        for axis in range(3):
            position[axis] = points[axis, point]
            for other in range(3):
                total[axis, other] = 1.0 if axis == other else 0.0
        known = not np.isnan(position[0] + position[1] + position[2])
        for step in range(len(chain) if known else 0):
            update = chain[step]
            start, size, factor = starts[update], sizes[update], factors[update]
            if not inverted[step]:
                _look_up(coefficients, start, size, factor, shape, position, with_jacobians, numbers, found)
                if with_jacobians:
                    _read_slopes(found, steps)
                    _multiply(steps, total)
                for axis in range(3):
                    position[axis] += found[axis]
                continue
            before, settled = np.inf, False
            for axis in range(3):
                wanted[axis] = position[axis]
            for _ in range(max_iterations):
                _look_up(coefficients, start, size, factor, shape, position, True, numbers, found)
                residual = 0.0
                for axis in range(3):
                    residual = max(residual, abs(position[axis] + found[axis] - wanted[axis]))
                if residual > _LARGEST_RESIDUAL * before:  # back to where it was smaller, and on from there
                    _look_up(coefficients, start, size, factor, shape, kept, False, numbers, found)
                    for axis in range(3):
                        position[axis] = wanted[axis] - found[axis]
                    before = np.inf
                    continue
                before = residual
                _read_slopes(found, steps)
                for axis in range(3):
                    kept[axis] = position[axis]
                largest = _newton(steps, found, wanted, position)
                if largest < tolerance:
                    settled = True
                    break
            if not settled:
                unsettled[point] = True
            if with_jacobians:
                _look_up(coefficients, start, size, factor, shape, position, True, numbers, found)
                _read_slopes(found, steps)
                _invert(steps)
                _multiply(steps, total)
        for axis in range(3):
            moved[axis, point] = position[axis]
            if with_jacobians:
                for other in range(3):
                    jacobians[3 * axis + other, point] = total[axis, other] if known else np.nan


@compiled
def _look_up(
    coefficients: Any, start: Any, size: Any, factor: Any, shape: Any, position: Any, slopes: Any, numbers: Any,
    found: Any,
) -> None:  # fmt: skip
    """The displacement at a position as ``found[:3]``; its derivatives by x, y and z from 4, 8 and 12 on."""
    index = np.int64(0)
    for axis in range(3):
        place, inside = position[axis], 1.0
        if not place > 0:  # NaN, too
            place, inside = 0.0, 0.0
        if place > shape[axis] - 1:
            place, inside = shape[axis] - 1.0, 0.0
        t = (place + 0.5) / factor + 1.5
        whole = np.int64(t)
        index = index * size[axis] + whole - 1
        _set_weights(t - whole, inside / factor, axis, numbers)
    _sum_rows(
        coefficients,
        np.uintp(start + index * 4),
        np.uintp(size[1] * size[2] * 4),
        np.uintp(size[2] * 4),
        slopes,
        numbers,
        found,
    )


@compiled
def _sum_rows(coefficients: Any, i: Any, step_x: Any, step_y: Any, slopes: Any, numbers: Any, found: Any) -> None:
    two, three = np.uintp(2), np.uintp(3)
    y0, y1, y2, y3 = numbers[4], numbers[5], numbers[6], numbers[7]
    v0, v1, v2, v3 = numbers[12], numbers[13], numbers[14], numbers[15]
    r0, r1 = sixteen(coefficients, i), sixteen(coefficients, i + step_y)
    r2, r3 = sixteen(coefficients, i + two * step_y), sixteen(coefficients, i + three * step_y)
    line = (r0 * y0 + r1 * y1) + (r2 * y2 + r3 * y3)
    total = line * numbers[0]
    by_x, by_y = line * numbers[8], ((r0 * v0 + r1 * v1) + (r2 * v2 + r3 * v3)) * numbers[0]
    for a in range(np.uintp(1), np.uintp(4)):
        i += step_x
        r0, r1 = sixteen(coefficients, i), sixteen(coefficients, i + step_y)
        r2, r3 = sixteen(coefficients, i + two * step_y), sixteen(coefficients, i + three * step_y)
        line = (r0 * y0 + r1 * y1) + (r2 * y2 + r3 * y3)
        total = total + line * numbers[a]
        if slopes:
            by_x = by_x + line * numbers[np.uintp(8) + a]
            by_y = by_y + ((r0 * v0 + r1 * v1) + (r2 * v2 + r3 * v3)) * numbers[a]
    along = sixteen(numbers, np.uintp(16))
    put(found, np.uintp(0), of_all_voxels(total * along))
    if slopes:
        put(found, np.uintp(4), of_all_voxels(by_x * along))
        put(found, np.uintp(8), of_all_voxels(by_y * along))
        put(found, np.uintp(12), of_all_voxels(total * sixteen(numbers, np.uintp(32))))


@compiled
def _set_weights(r: Any, scale: Any, axis: Any, numbers: Any) -> None:
    """Weights of the four control points around a place, and their derivatives times ``scale``.

    Those of x and y are single numbers, those of z lie four times beside each other.
    """
    s = 1 - r
    w0, w1, w2, w3 = s * s * s / 6, (4 - 3 * r * r * (1 + s)) / 6, (4 - 3 * s * s * (1 + r)) / 6, r * r * r / 6
    d0, d1, d2, d3 = -s * s / 2, r * (3 * r - 4) / 2, s * (4 - 3 * s) / 2, r * r / 2
    if axis < 2:
        i, j = 4 * axis, 8 + 4 * axis
        numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3] = w0, w1, w2, w3
        numbers[j], numbers[j + 1] = d0 * scale, d1 * scale
        numbers[j + 2], numbers[j + 3] = d2 * scale, d3 * scale
        return
    for i in range(4):
        numbers[16 + i], numbers[20 + i], numbers[24 + i], numbers[28 + i] = w0, w1, w2, w3
        numbers[32 + i], numbers[36 + i] = d0 * scale, d1 * scale
        numbers[40 + i], numbers[44 + i] = d2 * scale, d3 * scale


@compiled
def _read_slopes(found: Any, matrix: Any) -> None:
    """The derivative of position plus displacement."""
    for axis in range(3):
        for by in range(3):
            matrix[axis, by] = found[4 * (by + 1) + axis] + (1.0 if axis == by else 0.0)


@compiled
def _multiply(matrix: Any, total: Any) -> None:
    """``total = matrix @ total``."""
    for by in range(3):
        a, b, c = total[0, by], total[1, by], total[2, by]
        for axis in range(3):
            total[axis, by] = matrix[axis, 0] * a + matrix[axis, 1] * b + matrix[axis, 2] * c


@compiled
def _invert(m: Any) -> None:
    """The inverse of a 3x3 matrix, in place."""
    a, b, c, d, e, f, g, h, i = m[0, 0], m[0, 1], m[0, 2], m[1, 0], m[1, 1], m[1, 2], m[2, 0], m[2, 1], m[2, 2]
    p, q, r = e * i - f * h, f * g - d * i, d * h - e * g
    scale = 1 / (a * p + b * q + c * r)
    m[0, 0], m[0, 1], m[0, 2] = p * scale, (c * h - b * i) * scale, (b * f - c * e) * scale
    m[1, 0], m[1, 1], m[1, 2] = q * scale, (a * i - c * g) * scale, (c * d - a * f) * scale
    m[2, 0], m[2, 1], m[2, 2] = r * scale, (b * g - a * h) * scale, (a * e - b * d) * scale


@compiled
def _newton(matrix: Any, found: Any, wanted: Any, position: Any) -> Any:
    """Moves ``position`` by one Newton step and tells the largest component of it; ``matrix`` is inverted."""
    _invert(matrix)
    a, b, c = position[0] + found[0] - wanted[0], position[1] + found[1] - wanted[1], position[2] + found[2] - wanted[2]
    largest = 0.0
    for axis in range(3):
        step = matrix[axis, 0] * a + matrix[axis, 1] * b + matrix[axis, 2] * c
        position[axis] -= step
        largest = max(largest, abs(step))
    return largest
