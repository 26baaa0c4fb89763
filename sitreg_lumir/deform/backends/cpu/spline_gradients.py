"""Compiled loops that follow points through a chain of continuous updates, and the gradient of where they end.

Memory lies as in ``splines``. Each task is a block of ``POINTS`` points.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.splines import (
    POINTS,
    inverse_matrix,
    locate,
    look_up,
    look_up_gradients,
    matrix,
    settle,
    spline_weights,
)
from sitreg_lumir.deform.backends.cpu.threads import compiled
from sitreg_lumir.deform.backends.cpu.vectors import by_voxel, four_times, put, sixteen, x_of, y_of, z_of

_APART = 16  # points whose gradients are added in turn: they hardly meet, so that none waits for the one before


@compiled
def trace_points(
    first: Any, last: Any, points: Any, steps: Any, inverted: Any, coefficients: Any, starts: Any, sizes: Any,
    factors: Any, shape: Any, tolerance: Any, max_iterations: Any, path: Any, unsettled: Any,
) -> None:  # fmt: skip
    """Follows points, ``POINTS`` for each task; arguments as in :func:`splines.move_points`.

    Args:
        first: task to begin with.
        last: task to end before.
        points: ``(3, N)`` float64, voxels.
        steps: which update is applied at each step.
        inverted: whether its inverse is applied instead.
        coefficients: of all updates.
        starts: of each update in them.
        sizes: of each update's grid.
        factors: spacing of each update's control points.
        shape: of the full-resolution grid.
        tolerance: of the inversions, voxels.
        max_iterations: upper limit of look-ups for one inversion.
        path: ``(S, 3, N)`` for ``S`` steps: how far each step's end lies from the point. An inversion starts from what
            is there, unless that is NaN; then it is overwritten.
        unsettled: ``(N,)`` bool, is set where an inversion did not converge.
    """
    real = path.dtype.type
    bounds = shape[0] - 1.0, shape[1] - 1.0, shape[2] - 1.0
    at, wanted, kept = np.empty((3, POINTS)), np.empty((3, POINTS)), np.empty((3, POINTS))
    before, active = np.empty(POINTS), np.empty(POINTS, np.int64)
    for task in range(first, last):
        start = task * POINTS
        count = min(POINTS, points.shape[1] - start)
        for axis in range(3):
            for p in range(count):
                at[axis, p] = points[axis, start + p]
        for step in range(len(steps)):
            update = steps[step]
            size_y, size_z = np.uintp(sizes[update, 1]), np.uintp(sizes[update, 2])
            level = np.uintp(starts[update]), size_y, size_z, 1 / factors[update], bounds
            if inverted[step]:
                for axis in range(3):
                    for p in range(count):
                        wanted[axis, p] = at[axis, p]
                        guess = path[step, axis, start + p]
                        if not np.isnan(guess):
                            at[axis, p] = points[axis, start + p] + guess
                left = settle(coefficients, level, count, tolerance, max_iterations, at, wanted, kept, before, active)
                for index in range(left):
                    unsettled[start + active[index]] = True
            else:
                for p in range(count):
                    disp = look_up(coefficients, level, at[0, p], at[1, p], at[2, p])
                    at[0, p], at[1, p], at[2, p] = at[0, p] + x_of(disp), at[1, p] + y_of(disp), at[2, p] + z_of(disp)
            for axis in range(3):
                for p in range(count):
                    path[step, axis, start + p] = real(at[axis, p] - points[axis, start + p])


@compiled
def find_boxes(first: Any, last: Any, points: Any, path: Any, boxes: Any) -> None:
    """Between which positions each block of points starts, ends or stops on its way: ``boxes`` ``(tasks, 3, 2)``."""
    for task in range(first, last):
        start = task * POINTS
        end = min(start + POINTS, points.shape[1])
        for axis in range(3):
            lowest, highest = np.inf, -np.inf
            for p in range(start, end):
                nearest, farthest = 0.0, 0.0
                for step in range(len(path)):
                    moved = path[step, axis, p]
                    nearest, farthest = min(nearest, moved), max(farthest, moved)
                lowest, highest = min(lowest, points[axis, p] + nearest), max(highest, points[axis, p] + farthest)
            boxes[task, axis, 0], boxes[task, axis, 1] = lowest, highest


@compiled
def colour_boxes(boxes: Any, margin: Any, colours: Any) -> None:
    """Gives each box, in order, the lowest colour that no earlier box nearer than twice ``margin`` has."""
    taken = np.zeros(len(boxes) + 1, np.bool_)
    for task in range(len(boxes)):
        taken[:] = False
        for earlier in range(task):
            apart = False
            for axis in range(3):
                apart |= boxes[task, axis, 0] - 2 * margin > boxes[earlier, axis, 1]
                apart |= boxes[earlier, axis, 0] - 2 * margin > boxes[task, axis, 1]
            if not apart:
                taken[colours[earlier]] = True
        colour = 0
        while taken[colour]:
            colour += 1
        colours[task] = colour


@compiled
def trace_points_adjoint(
    first: Any, last: Any, tasks: Any, grad: Any, points: Any, path: Any, steps: Any, inverted: Any, needed: Any,
    coefficients: Any, starts: Any, sizes: Any, factors: Any, shape: Any, target: Any,
) -> None:  # fmt: skip
    """Adds the gradient of blocks of points to that of the control points; the boxes of ``tasks`` keep apart.

    An inverse ``q`` of ``p`` solves ``q + u(q) = p``: with the update's derivative ``J`` at ``q``, the gradient
    ``g`` of ``q`` becomes ``lambda = (I + J)^-T g`` of ``p``, and ``-lambda`` of ``u`` at ``q``.

    Args:
        first: task to begin with.
        last: task to end before.
        tasks: numbers of the blocks.
        grad: ``(3, N)`` float64, of where the points end.
        points: ``(3, N)`` float64, where they start, voxels.
        path: of :func:`trace_points`.
        steps: which update is applied at each step.
        inverted: whether its inverse is applied instead.
        needed: whether an update's gradient is wanted, bool.
        coefficients: of all updates.
        starts: of each update in them.
        sizes: of each update's grid.
        factors: spacing of each update's control points.
        shape: of the full-resolution grid.
        target: as ``coefficients``, is added to.
    """
    bounds = shape[0] - 1.0, shape[1] - 1.0, shape[2] - 1.0
    earliest = 0
    while earliest < len(steps) and not needed[steps[earliest]]:
        earliest += 1
    gradient = np.empty((3, POINTS))
    for number in range(first, last):
        start = tasks[number] * POINTS
        count = min(POINTS, points.shape[1] - start)
        for axis in range(3):
            for p in range(count):
                gradient[axis, p] = grad[axis, start + p]
        for step in range(len(steps) - 1, earliest - 1, -1):
            update = steps[step]
            size_y, size_z = np.uintp(sizes[update, 1]), np.uintp(sizes[update, 2])
            level = np.uintp(starts[update]), size_y, size_z, 1 / factors[update], bounds
            looked = step if inverted[step] else step - 1
            for turn in range(_APART):
                for p in range(turn, count, _APART):
                    x, y, z = points[0, start + p], points[1, start + p], points[2, start + p]
                    if looked >= 0:
                        x, y, z = (
                            x + path[looked, 0, start + p],
                            y + path[looked, 1, start + p],
                            z + path[looked, 2, start + p],
                        )
                    gx, gy, gz = gradient[0, p], gradient[1, p], gradient[2, p]
                    if not inverted[step] and needed[update]:
                        _scatter(target, level, x, y, z, gx, gy, gz)
                        if step == earliest:
                            continue
                    _, by_x, by_y, by_z = look_up_gradients(coefficients, level, x, y, z)
                    if inverted[step]:
                        a, b, c = inverse_matrix(by_x, by_y, by_z)
                    else:
                        a, b, c = matrix(by_x, by_y, by_z)
                    gradient[0, p] = a[0] * gx + b[0] * gy + c[0] * gz
                    gradient[1, p] = a[1] * gx + b[1] * gy + c[1] * gz
                    gradient[2, p] = a[2] * gx + b[2] * gy + c[2] * gz
                    if inverted[step] and needed[update]:
                        _scatter(target, level, x, y, z, -gradient[0, p], -gradient[1, p], -gradient[2, p])


@compiled
def _scatter(target: Any, level: Any, x: Any, y: Any, z: Any, gx: Any, gy: Any, gz: Any) -> None:
    """Adds to the control points around a position, in shares of their weights."""
    real = target.dtype.type
    start, size_y, size_z, density, bounds = level
    (i, rx, _), (j, ry, _), (k, rz, _) = (
        locate(x, bounds[0], density),
        locate(y, bounds[1], density),
        locate(z, bounds[2], density),
    )
    step_y, step_x = size_z * np.uintp(4), size_y * size_z * np.uintp(4)
    at = start + i * step_x + j * step_y + k * np.uintp(4)
    wx, wy = spline_weights(rx, real), spline_weights(ry, real)
    w0, w1, w2, w3 = spline_weights(rz, real)
    along = by_voxel(w0, w1, w2, w3)
    values = four_times(along, real(gx), real(gy), real(gz)) * along
    for w in wx:
        plane, row = values * w, at
        for v in wy:
            put(target, row, sixteen(target, row) + plane * v)
            row += step_y
        at += step_x
