"""Compiled loops between the grids of the pyramid: B-spline upsampling, and where level voxels look.

Tasks are planes of the first axis. A table of taps lists, for each full-resolution sample along one axis, the four
control points it depends on and their weights.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.threads import compiled


@compiled
def upsample(
    first: Any, last: Any, control_points: Any, factor: Any, index_x: Any, weights_x: Any, index_y: Any,
    weights_y: Any, index_z: Any, weights_z: Any, field: Any,
) -> None:  # fmt: skip
    """Planes of ``field`` ``(B * 3, X, Y, Z)`` from ``control_points`` ``(B * 3, x, y, z)``."""
    _, size_x, size_y, size_z = field.shape
    _, _, level_y, level_z = control_points.shape
    scale = field.dtype.type(factor)
    plane = np.empty((level_y, level_z), field.dtype)
    rows = np.empty((level_y, size_z), field.dtype)
    for task in range(first, last):
        item, x = task // size_x, task % size_x
        upsample_rows(control_points[item], index_x[x], scale * weights_x[x], index_z, weights_z, plane, rows)
        for y in range(size_y):
            index, weights = index_y[y], weights_y[y]
            blend_row(rows[index[0]], rows[index[1]], rows[index[2]], rows[index[3]], weights, field[item, x, y])


@compiled
def upsample_rows(source: Any, index: Any, weights: Any, index_z: Any, weights_z: Any, plane: Any, rows: Any) -> None:
    """Blends four planes of control points, and upsamples the rows of the result."""
    _blend(source[index[0]], source[index[1]], source[index[2]], source[index[3]], weights, plane)
    for y in range(len(plane)):
        line, row = plane[y], rows[y]
        for z in range(len(row)):
            row[z] = (
                weights_z[z, 0] * line[np.uintp(index_z[z, 0])]
                + weights_z[z, 1] * line[np.uintp(index_z[z, 1])]
                + weights_z[z, 2] * line[np.uintp(index_z[z, 2])]
                + weights_z[z, 3] * line[np.uintp(index_z[z, 3])]
            )


@compiled
def blend_row(a: Any, b: Any, c: Any, d: Any, weights: Any, out: Any) -> None:
    """Weighted sum of four rows."""
    wa, wb, wc, wd = weights[0], weights[1], weights[2], weights[3]
    for z in range(len(out)):
        out[z] = wa * a[z] + wb * b[z] + wc * c[z] + wd * d[z]


@compiled
def _blend(a: Any, b: Any, c: Any, d: Any, weights: Any, out: Any) -> None:
    for y in range(len(out)):
        blend_row(a[y], b[y], c[y], d[y], weights, out[y])


@compiled
def reduce_planes(
    first: Any, last: Any, grad: Any, index_y: Any, weights_y: Any, index_z: Any, weights_z: Any, planes: Any
) -> None:
    """First half of the adjoint of :func:`upsample`: planes ``(B * 3, X, Y, Z)`` -> ``(B * 3, X, y, z)``."""
    _, size_x, size_y, size_z = grad.shape
    level_y = planes.shape[2]
    rows = np.empty((level_y, size_z), grad.dtype)
    for task in range(first, last):
        item, x = task // size_x, task % size_x
        rows[:] = 0
        for y in range(size_y):
            line = grad[item, x, y]
            for tap in range(4):
                weight, row = weights_y[y, tap], rows[index_y[y, tap]]
                if weight != 0:
                    for z in range(size_z):
                        row[z] += weight * line[z]
        plane = planes[item, x]
        plane[:] = 0
        for y in range(level_y):
            line, row = rows[y], plane[y]
            for z in range(size_z):
                value = line[z]
                row[np.uintp(index_z[z, 0])] += weights_z[z, 0] * value
                row[np.uintp(index_z[z, 1])] += weights_z[z, 1] * value
                row[np.uintp(index_z[z, 2])] += weights_z[z, 2] * value
                row[np.uintp(index_z[z, 3])] += weights_z[z, 3] * value


@compiled
def reduce_volumes(
    first: Any, last: Any, planes: Any, factor: Any, index_x: Any, weights_x: Any, control_points: Any
) -> None:
    """Second half: sums planes ``(B * 3, X, y, z)`` along the first axis to ``(B * 3, x, y, z)``."""
    _, level_x, level_y, level_z = control_points.shape
    for task in range(first, last):
        item, level = task // level_x, task % level_x
        out = control_points[item, level]
        out[:] = 0
        for x in range(planes.shape[1]):
            for tap in range(4):
                if index_x[x, tap] == level and weights_x[x, tap] != 0:
                    weight = factor * weights_x[x, tap]
                    plane = planes[item, x]
                    for y in range(level_y):
                        for z in range(level_z):
                            out[y, z] += weight * plane[y, z]


@compiled
def level_points(first: Any, last: Any, disp: Any, factor: Any, points: Any) -> None:
    """Planes of where the level voxels look, level voxels, ``(B, 3, x, y, z)``, through ``disp`` ``(B, 3, X, Y, Z)``.

    A level voxel lies on, or midway between, full-resolution voxels, or beyond the last one.
    """
    real = disp.dtype.type
    _, _, level_x, level_y, level_z = points.shape
    for task in range(first, last):
        batch, x = task // level_x, task % level_x
        x0, x1 = neighbours(x, factor, disp.shape[2])
        for y in range(level_y):
            y0, y1 = neighbours(y, factor, disp.shape[3])
            for z in range(level_z):
                z0, z1 = neighbours(z, factor, disp.shape[4])
                for axis in range(3):
                    u = disp[batch, axis]
                    a = (u[x0, y0, z0] + u[x0, y0, z1]) + (u[x0, y1, z0] + u[x0, y1, z1])
                    b = (u[x1, y0, z0] + u[x1, y0, z1]) + (u[x1, y1, z0] + u[x1, y1, z1])
                    own = x if axis == 0 else (y if axis == 1 else z)
                    points[batch, axis, x, y, z] = real(own) + (a + b) / real(8 * factor)


@compiled
def neighbours(level: Any, factor: Any, size: Any) -> Any:
    """The two full-resolution voxels, clamped, whose mean a level voxel's centre sees (equal on a voxel)."""
    twice = factor * (2 * level + 1) - 1  # twice the position
    return min(twice // 2, size - 1), min((twice + 1) // 2, size - 1)


@compiled
def level_points_adjoint(first: Any, last: Any, grad: Any, factor: Any, grad_disp: Any) -> None:
    """Adjoint of :func:`level_points`, added to zeros: different level voxels see different voxels."""
    real = grad.dtype.type
    _, _, level_x, level_y, level_z = grad.shape
    for task in range(first, last):
        batch, x = task // level_x, task % level_x
        pair_x = neighbours(x, factor, grad_disp.shape[2])
        for axis in range(3):
            target = grad_disp[batch, axis]
            for y in range(level_y):
                pair_y = neighbours(y, factor, grad_disp.shape[3])
                for z in range(level_z):
                    share = grad[batch, axis, x, y, z] / real(8 * factor)
                    pair_z = neighbours(z, factor, grad_disp.shape[4])
                    for fx in pair_x:
                        for fy in pair_y:
                            for fz in pair_z:
                                target[fx, fy, fz] += share
