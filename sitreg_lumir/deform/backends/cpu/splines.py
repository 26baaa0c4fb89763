"""Compiled loop that moves points through continuous cubic B-spline updates and their inverses, exactly.

Each update's control points lie in memory as ``(X + 4, Y + 4, Z + 4, 4)``, in full-resolution voxels: their border is
repeated twice on each side, and each has a spare component beside its three. Positions are float64, displacements of
one update in the control points' type.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.threads import compiled
from sitreg_lumir.deform.backends.cpu.vectors import by_voxel, of_all_voxels, sixteen, x_of, y_of, z_of

_SIXTH, _TWO_THIRDS = 1 / 6, 2 / 3
POINTS = 256  # of a task
_LARGEST_RESIDUAL = 0.995  # of that before: otherwise a Newton step is replaced by one of the fixed-point iteration


@compiled
def move_points(
    first: Any, last: Any, points: Any, steps: Any, inverted: Any, coefficients: Any, starts: Any, sizes: Any,
    factors: Any, shape: Any, tolerance: Any, max_iterations: Any, moved: Any, jacobians: Any, unsettled: Any,
) -> None:  # fmt: skip
    """Moves points, ``POINTS`` for each task.

    Args:
        first: task to begin with.
        last: task to end before.
        points: ``(3, N)`` float64, voxels.
        steps: which update is applied at each step, in the order of application, int64.
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
    with_jacobians = jacobians.shape[1] > 0
    bounds = shape[0] - 1.0, shape[1] - 1.0, shape[2] - 1.0
    at, wanted, kept = np.empty((3, POINTS)), np.empty((3, POINTS)), np.empty((3, POINTS))
    total, before, active = np.empty((9, POINTS)), np.empty(POINTS), np.empty(POINTS, np.int64)
    for task in range(first, last):
        start = task * POINTS
        count = min(POINTS, points.shape[1] - start)
        for p in range(count):
            for axis in range(3):
                at[axis, p] = points[axis, start + p]
            for place in range(9):
                total[place, p] = 1.0 if place % 4 == 0 else 0.0
        for step in range(len(steps)):
            update = steps[step]
            size_y, size_z = np.uintp(sizes[update, 1]), np.uintp(sizes[update, 2])
            level = np.uintp(starts[update]), size_y, size_z, 1 / factors[update], bounds
            if inverted[step]:
                left = _invert(coefficients, level, count, tolerance, max_iterations, at, wanted, kept, before, active)
                for place in range(left):
                    unsettled[start + active[place]] = True
                if with_jacobians:
                    for p in range(count):
                        _, by_x, by_y, by_z = look_up_gradients(coefficients, level, at[0, p], at[1, p], at[2, p])
                        a, b, c = inverse_matrix(by_x, by_y, by_z)
                        _multiply(a, b, c, total, p)
                continue
            for p in range(count):
                x, y, z = at[0, p], at[1, p], at[2, p]
                if with_jacobians:
                    disp, by_x, by_y, by_z = look_up_gradients(coefficients, level, x, y, z)
                    a, b, c = matrix(by_x, by_y, by_z)
                    _multiply(a, b, c, total, p)
                else:
                    disp = look_up(coefficients, level, x, y, z)
                at[0, p], at[1, p], at[2, p] = x + x_of(disp), y + y_of(disp), z + z_of(disp)
        for p in range(count):
            known = not np.isnan(at[0, p] + at[1, p] + at[2, p])
            for axis in range(3):
                moved[axis, start + p] = at[axis, p] if known else np.nan
            if with_jacobians:
                for place in range(9):
                    jacobians[place, start + p] = total[place, p] if known else np.nan


@compiled
def _invert(
    coefficients: Any, level: Any, count: Any, tolerance: Any, max_iterations: Any, at: Any, wanted: Any, kept: Any,
    before: Any, active: Any,
) -> Any:  # fmt: skip
    """Moves points to where an update brings to them; returns how many do not converge: the first of ``active``."""
    for p in range(count):
        for axis in range(3):
            wanted[axis, p] = at[axis, p]
    return settle(coefficients, level, count, tolerance, max_iterations, at, wanted, kept, before, active)


@compiled
def settle(
    coefficients: Any, level: Any, count: Any, tolerance: Any, max_iterations: Any, at: Any, wanted: Any, kept: Any,
    before: Any, active: Any,
) -> Any:  # fmt: skip
    """Moves points ``at`` to where an update brings to ``wanted``, as :func:`_invert`.

    Newton's method; where a step does not lessen the residual, one of the fixed-point iteration takes its place, which
    always does for contractions. Points take their steps one after the other, so that the processor works on several.
    """
    left = 0
    for p in range(count):
        for axis in range(3):
            kept[axis, p] = at[axis, p]
        before[p] = np.inf
        if not np.isnan(wanted[0, p] + wanted[1, p] + wanted[2, p]):
            active[left] = p
            left += 1
    for _ in range(max_iterations):
        unsettled, left = left, 0
        for place in range(unsettled):
            p = active[place]
            x, y, z = at[0, p], at[1, p], at[2, p]
            disp, by_x, by_y, by_z = look_up_gradients(coefficients, level, x, y, z)
            rest_x, rest_y, rest_z = (
                x + x_of(disp) - wanted[0, p],
                y + y_of(disp) - wanted[1, p],
                z + z_of(disp) - wanted[2, p],
            )
            residual = max(abs(rest_x), abs(rest_y), abs(rest_z))
            active[left] = p
            if residual > _LARGEST_RESIDUAL * before[p]:  # back to where it was smaller, and on from there
                disp = look_up(coefficients, level, kept[0, p], kept[1, p], kept[2, p])
                at[0, p], at[1, p] = wanted[0, p] - x_of(disp), wanted[1, p] - y_of(disp)
                at[2, p], before[p] = wanted[2, p] - z_of(disp), np.inf
                left += 1
                continue
            before[p], kept[0, p], kept[1, p], kept[2, p] = residual, x, y, z
            a, b, c = inverse_matrix(by_x, by_y, by_z)
            step_x = a[0] * rest_x + a[1] * rest_y + a[2] * rest_z
            step_y = b[0] * rest_x + b[1] * rest_y + b[2] * rest_z
            step_z = c[0] * rest_x + c[1] * rest_y + c[2] * rest_z
            at[0, p], at[1, p], at[2, p] = x - step_x, y - step_y, z - step_z
            left += 0 if max(abs(step_x), abs(step_y), abs(step_z)) < tolerance else 1
        if left == 0:
            break
    return left


@compiled
def locate(position: Any, bound: Any, density: Any) -> Any:
    """First of the four control points along an axis, how far behind the second, and whether inside the grid."""
    place = position if position > 0 else 0.0
    place = place if place < bound else bound
    t = (place + 0.5) * density + 1.5
    whole = np.int64(t)
    return np.uintp(whole - 1), t - whole, 1.0 if 0 < position <= bound else 0.0


@compiled
def spline_weights(r: Any, real: Any) -> Any:
    """Of the four control points around a place."""
    s = 1 - r
    w1, w2 = _TWO_THIRDS - 0.5 * r * r * (1 + s), _TWO_THIRDS - 0.5 * s * s * (1 + r)
    return real(s * s * s * _SIXTH), real(w1), real(w2), real(r * r * r * _SIXTH)


@compiled
def _gradients(r: Any, scale: Any, real: Any) -> Any:
    """Derivatives of the weights by the position."""
    s = 1 - r
    d0, d1, d2, d3 = -0.5 * s * s, r * (1.5 * r - 2), s * (2 - 1.5 * s), 0.5 * r * r
    return real(d0 * scale), real(d1 * scale), real(d2 * scale), real(d3 * scale)


@compiled
def look_up(coefficients: Any, level: Any, x: Any, y: Any, z: Any) -> Any:
    """The displacement of one update at a position."""
    real = coefficients.dtype.type
    start, size_y, size_z, density, bounds = level
    (i, rx, _), (j, ry, _), (k, rz, _) = (
        locate(x, bounds[0], density),
        locate(y, bounds[1], density),
        locate(z, bounds[2], density),
    )
    step_y, step_x = size_z * np.uintp(4), size_y * size_z * np.uintp(4)
    at = start + i * step_x + j * step_y + k * np.uintp(4)
    wx, wy = spline_weights(rx, real), spline_weights(ry, real)
    a = _row(coefficients, at, step_y, wy) * wx[0]
    b = _row(coefficients, at + step_x, step_y, wy) * wx[1]
    c = _row(coefficients, at + step_x + step_x, step_y, wy) * wx[2]
    d = _row(coefficients, at + step_x + step_x + step_x, step_y, wy) * wx[3]
    w0, w1, w2, w3 = spline_weights(rz, real)
    return of_all_voxels(((a + b) + (c + d)) * by_voxel(w0, w1, w2, w3))


@compiled
def look_up_gradients(coefficients: Any, level: Any, x: Any, y: Any, z: Any) -> Any:
    """The displacement of one update at a position, and its derivatives by x, y and z."""
    real = coefficients.dtype.type
    start, size_y, size_z, density, bounds = level
    (i, rx, in_x), (j, ry, in_y), (k, rz, in_z) = (
        locate(x, bounds[0], density),
        locate(y, bounds[1], density),
        locate(z, bounds[2], density),
    )
    step_y, step_x = size_z * np.uintp(4), size_y * size_z * np.uintp(4)
    at = start + i * step_x + j * step_y + k * np.uintp(4)
    wx, wy = spline_weights(rx, real), spline_weights(ry, real)
    sx, sy = _gradients(rx, in_x * density, real), _gradients(ry, in_y * density, real)
    a, p = _rows_both(coefficients, at, step_y, wy, sy)
    b, q = _rows_both(coefficients, at + step_x, step_y, wy, sy)
    c, r = _rows_both(coefficients, at + step_x + step_x, step_y, wy, sy)
    d, s = _rows_both(coefficients, at + step_x + step_x + step_x, step_y, wy, sy)
    w0, w1, w2, w3 = spline_weights(rz, real)
    along = by_voxel(w0, w1, w2, w3)
    w0, w1, w2, w3 = _gradients(rz, in_z * density, real)
    total = (a * wx[0] + b * wx[1]) + (c * wx[2] + d * wx[3])
    by_x = of_all_voxels(((a * sx[0] + b * sx[1]) + (c * sx[2] + d * sx[3])) * along)
    by_y = of_all_voxels(((p * wx[0] + q * wx[1]) + (r * wx[2] + s * wx[3])) * along)
    return of_all_voxels(total * along), by_x, by_y, of_all_voxels(total * by_voxel(w0, w1, w2, w3))


@compiled
def _row(coefficients: Any, at: Any, step: Any, w: Any) -> Any:
    """Four rows of control points along z, weighted along y."""
    a, b = sixteen(coefficients, at), sixteen(coefficients, at + step)
    c, d = sixteen(coefficients, at + step + step), sixteen(coefficients, at + step + step + step)
    return (a * w[0] + b * w[1]) + (c * w[2] + d * w[3])


@compiled
def _rows_both(coefficients: Any, at: Any, step: Any, w: Any, s: Any) -> Any:
    """The same, also with the derivatives' weights."""
    a, b = sixteen(coefficients, at), sixteen(coefficients, at + step)
    c, d = sixteen(coefficients, at + step + step), sixteen(coefficients, at + step + step + step)
    return (a * w[0] + b * w[1]) + (c * w[2] + d * w[3]), (a * s[0] + b * s[1]) + (c * s[2] + d * s[3])


@compiled
def matrix(by_x: Any, by_y: Any, by_z: Any) -> Any:
    """The derivative of position plus displacement, row by row."""
    unit = 1.0
    return (
        (unit + x_of(by_x), unit * x_of(by_y), unit * x_of(by_z)),
        (unit * y_of(by_x), unit + y_of(by_y), unit * y_of(by_z)),
        (unit * z_of(by_x), unit * z_of(by_y), unit + z_of(by_z)),
    )


@compiled
def inverse_matrix(by_x: Any, by_y: Any, by_z: Any) -> Any:
    """The inverse of that derivative, row by row."""
    (a, b, c), (d, e, f), (g, h, i) = matrix(by_x, by_y, by_z)
    p, q, r = e * i - f * h, f * g - d * i, d * h - e * g
    scale = 1 / (a * p + b * q + c * r)
    return (
        (p * scale, (c * h - b * i) * scale, (b * f - c * e) * scale),
        (q * scale, (a * i - c * g) * scale, (c * d - a * f) * scale),
        (r * scale, (b * g - a * h) * scale, (a * e - b * d) * scale),
    )


@compiled
def _multiply(first: Any, second: Any, third: Any, total: Any, p: Any) -> None:
    """``total[:, p]``, a 3x3 matrix row by row, becomes the product of another, whose rows are given, with it."""
    for by in range(3):
        a, b, c = total[by, p], total[3 + by, p], total[6 + by, p]
        total[by, p] = first[0] * a + first[1] * b + first[2] * c
        total[3 + by, p] = second[0] * a + second[1] * b + second[2] * c
        total[6 + by, p] = third[0] * a + third[1] * b + third[2] * c
