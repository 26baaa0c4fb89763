"""Compiled loops over differences between neighbours: the volume that a field folds, and the gradient of a field.

Fields are ``(B * 3, X, Y, Z)``, voxels. Sums are in float64.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.threads import compiled
from sitreg_lumir.deform.jacobian import COLUMNS

SLAB = 4  # planes of a task, two or more: then every other slab's gradient touches other planes

_STEPS = np.array([[step for step, _ in columns] for columns in COLUMNS.values()])  # determinant, column, axis
_SIGNS = np.array([[sign for _, sign in columns] for columns in COLUMNS.values()])


@compiled
def fold(first: Any, last: Any, slabs: Any, disp: Any, totals: Any, grad: Any, volume: Any) -> None:
    """Sums the folded volume of slabs of inner planes, and adds to its gradient.

    Args:
        first: place in ``slabs`` to begin with.
        last: place to end before.
        slabs: those to be done, counted over the batch; of which no two neighbours if there is a gradient.
        disp: ``(3 B, X, Y, Z)``, voxels.
        totals: per slab, voxels^3.
        grad: like ``disp``, or with nothing in it: not wanted.
        volume: ``(B, X-2, Y-2, Z-2)``, voxels^3, or with nothing in it.
    """
    _, size_x, size_y, size_z = disp.shape
    along_x = (size_x - 2 + SLAB - 1) // SLAB
    row, partial = np.empty(size_z - 2, disp.dtype), np.empty(size_z - 2)
    columns = np.empty((3, 3), disp.dtype)
    for task in range(first, last):
        slab = slabs[task]
        item, x0 = slab // along_x, slab % along_x * SLAB + 1
        field = disp[3 * item : 3 * item + 3]
        partial[:] = 0
        for x in range(x0, min(x0 + SLAB, size_x - 1)):
            for y in range(1, size_y - 1):
                _fold_row(field, x, y, row)
                for z in range(len(row)):
                    partial[z] += row[z]
                if len(volume) > 0:
                    for z in range(len(row)):
                        volume[item, x - 1, y - 1, z] = row[z]
                if len(grad) > 0:
                    for z in range(len(row)):
                        if row[z] != 0:
                            _add_gradient(field, x, y, z + 1, columns, grad[3 * item : 3 * item + 3])
        totals[slab] = partial.sum()


@compiled
def _fold_row(disp: Any, x: Any, y: Any, row: Any) -> None:
    """A row of the folded volume. Differences of ``disp`` are more exact than differences of positions."""
    unit, share = disp.dtype.type(1), disp.dtype.type(-1 / 12)
    for k in range(len(row)):
        z = k + 1
        u, v, w = disp[0, x, y, z], disp[1, x, y, z], disp[2, x, y, z]
        ax, bx, cx = disp[0, x + 1, y, z] - u + unit, disp[1, x + 1, y, z] - v, disp[2, x + 1, y, z] - w
        dx, ex, fx = u - disp[0, x - 1, y, z] + unit, v - disp[1, x - 1, y, z], w - disp[2, x - 1, y, z]
        ay, by, cy = disp[0, x, y + 1, z] - u, disp[1, x, y + 1, z] - v + unit, disp[2, x, y + 1, z] - w
        dy, ey, fy = u - disp[0, x, y - 1, z], v - disp[1, x, y - 1, z] + unit, w - disp[2, x, y - 1, z]
        az, bz, cz = disp[0, x, y, z + 1] - u, disp[1, x, y, z + 1] - v, disp[2, x, y, z + 1] - w + unit
        dz, ez, fz = u - disp[0, x, y, z - 1], v - disp[1, x, y, z - 1], w - disp[2, x, y, z - 1] + unit
        total = _two_folds(ax, bx, cx, dx, ex, fx, ay, by, cy, az, bz, cz)
        total += _two_folds(ax, bx, cx, dx, ex, fx, ay, by, cy, dz, ez, fz)
        total += _two_folds(ax, bx, cx, dx, ex, fx, dy, ey, fy, az, bz, cz)
        total += _two_folds(ax, bx, cx, dx, ex, fx, dy, ey, fy, dz, ez, fz)
        total += _fold(
            disp[0, x - 1, y - 1, z] - u - unit,
            disp[1, x - 1, y - 1, z] - v - unit,
            disp[2, x - 1, y - 1, z] - w,
            disp[0, x - 1, y, z - 1] - u - unit,
            disp[1, x - 1, y, z - 1] - v,
            disp[2, x - 1, y, z - 1] - w - unit,
            disp[0, x, y - 1, z - 1] - u,
            disp[1, x, y - 1, z - 1] - v - unit,
            disp[2, x, y - 1, z - 1] - w - unit,
        )
        total += _fold(
            disp[0, x + 1, y + 1, z] - u + unit,
            disp[1, x + 1, y + 1, z] - v + unit,
            disp[2, x + 1, y + 1, z] - w,
            disp[0, x, y + 1, z + 1] - u,
            disp[1, x, y + 1, z + 1] - v + unit,
            disp[2, x, y + 1, z + 1] - w + unit,
            disp[0, x + 1, y, z + 1] - u + unit,
            disp[1, x + 1, y, z + 1] - v,
            disp[2, x + 1, y, z + 1] - w + unit,
        )
        row[k] = share * total


@compiled
def _two_folds(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, u: Any, v: Any, w: Any, x: Any, y: Any, z: Any) -> Any:
    """Negative parts of the determinants of two first columns with the same second and third."""
    zero = type(a)(0)
    p, q, r = v * z - w * y, w * x - u * z, u * y - v * x
    return min(a * p + b * q + c * r, zero) + min(d * p + e * q + f * r, zero)


@compiled
def _fold(a: Any, b: Any, c: Any, u: Any, v: Any, w: Any, x: Any, y: Any, z: Any) -> Any:
    """Negative part of the determinant with these columns."""
    return min(a * (v * z - w * y) + b * (w * x - u * z) + c * (u * y - v * x), type(a)(0))


@compiled
def _add_gradient(disp: Any, x: Any, y: Any, z: Any, columns: Any, grad: Any) -> None:
    """Adds the gradient of one voxel's folded volume, one determinant after the other; ``columns`` is scratch."""
    real = disp.dtype.type
    for name in range(len(_STEPS)):
        for n in range(3):
            i, j, k = x + _STEPS[name, n, 0], y + _STEPS[name, n, 1], z + _STEPS[name, n, 2]
            for axis in range(3):
                difference = disp[axis, i, j, k] - disp[axis, x, y, z] + real(_STEPS[name, n, axis])
                columns[n, axis] = real(_SIGNS[name, n]) * difference
        folded = _fold(
            columns[0, 0],
            columns[0, 1],
            columns[0, 2],
            columns[1, 0],
            columns[1, 1],
            columns[1, 2],
            columns[2, 0],
            columns[2, 1],
            columns[2, 2],
        )
        if folded != 0:
            for n in range(3):
                i, j, k = x + _STEPS[name, n, 0], y + _STEPS[name, n, 1], z + _STEPS[name, n, 2]
                second, third = (n + 1) % 3, (n + 2) % 3
                for axis in range(3):
                    p, q = (axis + 1) % 3, (axis + 2) % 3
                    cofactor = columns[second, p] * columns[third, q] - columns[second, q] * columns[third, p]
                    share = real(-1 / 12) * real(_SIGNS[name, n]) * cofactor
                    grad[axis, i, j, k] += share
                    grad[axis, x, y, z] -= share


@compiled
def squared_differences(first: Any, last: Any, disp: Any, totals: Any) -> None:
    """Per plane, the sums of the squared differences to the next voxel along each axis."""
    _, size_x, size_y, size_z = disp.shape
    partial = np.empty((3, size_z))
    for task in range(first, last):
        field, x = disp[task // size_x], task % size_x
        partial[:] = 0
        for y in range(size_y):
            next_x, next_y = min(x + 1, size_x - 1), min(y + 1, size_y - 1)  # itself at the border: no difference
            for z in range(size_z):
                along_x = np.float64(field[next_x, y, z] - field[x, y, z])
                along_y = np.float64(field[x, next_y, z] - field[x, y, z])
                partial[0, z] += along_x * along_x
                partial[1, z] += along_y * along_y
            for z in range(size_z - 1):
                along_z = np.float64(field[x, y, z + 1] - field[x, y, z])
                partial[2, z] += along_z * along_z
        for axis in range(3):
            totals[task, axis] = partial[axis].sum()


@compiled
def squared_differences_adjoint(first: Any, last: Any, disp: Any, weights: Any, grad: Any) -> None:
    """Planes of the gradient of the sums of :func:`squared_differences`, weighted by component and axis."""
    _, size_x, size_y, size_z = disp.shape
    for task in range(first, last):
        item, x = task // size_x, task % size_x
        field = disp[item]
        by_x, by_y, by_z = 2 * weights[item % 3, 0], 2 * weights[item % 3, 1], 2 * weights[item % 3, 2]
        for y in range(size_y):
            x0, x1 = max(x - 1, 0), min(x + 1, size_x - 1)
            y0, y1 = max(y - 1, 0), min(y + 1, size_y - 1)
            for z in range(size_z):
                u = field[x, y, z]
                along_x = (u - field[x0, y, z]) + (u - field[x1, y, z])
                along_y = (u - field[x, y0, z]) + (u - field[x, y1, z])
                grad[item, x, y, z] = by_x * along_x + by_y * along_y
            for z in range(size_z - 1):
                difference = by_z * (field[x, y, z + 1] - field[x, y, z])
                grad[item, x, y, z] -= difference
                grad[item, x, y, z + 1] += difference
