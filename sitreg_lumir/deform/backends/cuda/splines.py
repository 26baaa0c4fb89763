"""Triton kernel that moves points through continuous cubic B-spline updates and their inverses.

Control points lie in memory as ``deform.splines`` lays them out: the border repeated twice on every side, four numbers
each, in full-resolution voxels. Positions are float64, displacements of one update float32. A program works on a block
of points; one update after the other, so that neighbouring points read neighbouring control points.
"""

import triton.language as tl

from sitreg_lumir.deform.backends.cuda.launch import compiled
from sitreg_lumir.deform.backends.cuda.lookups import solve, wide

ENTRIES = 5
"""Of a step's row in the table: where its update's control points begin, y and z sizes, spacing, whether inverted."""


@compiled
def _last(shape: tl.tuple) -> tl.tuple:
    """Positions of the last voxels along the axes."""
    return (shape[0] - 1).to(tl.float64), (shape[1] - 1).to(tl.float64), (shape[2] - 1).to(tl.float64)


@compiled
def _along(position: tl.tensor, last: tl.tensor, factor: tl.tensor) -> tl.tuple:
    """First of the four control points along an axis, how far behind the second, and whether inside the grid."""
    place = tl.where(position > 0, position, 0.0)
    place = tl.where(place < last, place, last)
    t = (place + 0.5) / factor + 1.5
    whole = t.to(tl.int32)
    inside = tl.where((position > 0) & (position <= last), 1.0, 0.0)
    return whole - 1, (t - whole).to(tl.float32), inside


@compiled
def _weight(number: tl.tensor, r: tl.tensor) -> tl.tensor:
    """The B-spline's weight of one of the four control points, at ``r`` behind the second."""
    d = tl.abs(r - (number - 1))
    return tl.where(d < 1, 2.0 / 3.0 - d * d + 0.5 * d * d * d, (2 - d) * (2 - d) * (2 - d) / 6.0)


@compiled
def _gradient(number: tl.tensor, r: tl.tensor) -> tl.tensor:
    """The derivative of that weight by ``r``."""
    offset = r - (number - 1)
    d = tl.abs(offset)
    size = tl.where(d < 1, 2 * d - 1.5 * d * d, 0.5 * (2 - d) * (2 - d))
    return tl.where(offset > 0, -size, size)


@compiled
def _look_up(
    coefficients: tl.tensor,
    step: tl.tuple,
    position: tl.tuple,
    last: tl.tuple,
    mask: tl.tensor,
) -> tl.tuple:
    """One update's displacement at positions, and the three rows of its derivative."""
    start, size_y, size_z, factor = step
    spacing = factor.to(tl.float64)
    x, rx, in_x = _along(position[0], last[0], spacing)
    y, ry, in_y = _along(position[1], last[1], spacing)
    z, rz, in_z = _along(position[2], last[2], spacing)
    density = 1.0 / factor.to(tl.float32)
    in_x, in_y, in_z = in_x * density, in_y * density, in_z * density
    base = coefficients + start + 4 * ((x.to(tl.int64) * size_y + y) * size_z + z)
    u0, u1, u2 = 0.0 * rx, 0.0 * rx, 0.0 * rx
    a0, a1, a2 = 0.0 * rx, 0.0 * rx, 0.0 * rx
    b0, b1, b2 = 0.0 * rx, 0.0 * rx, 0.0 * rx
    c0, c1, c2 = 0.0 * rx, 0.0 * rx, 0.0 * rx
    for i in range(4):
        wx, dx = _weight(i, rx), _gradient(i, rx) * in_x
        for j in range(4):
            wy, dy = _weight(j, ry), _gradient(j, ry) * in_y
            row = base + 4 * ((i * size_y + j) * size_z)
            s0, s1, s2 = 0.0 * rx, 0.0 * rx, 0.0 * rx
            g0, g1, g2 = 0.0 * rx, 0.0 * rx, 0.0 * rx
            for k in tl.static_range(4):
                wz, dz = _weight(k, rz), _gradient(k, rz) * in_z
                v0 = tl.load(row + 4 * k, mask=mask, other=0.0)
                v1 = tl.load(row + 4 * k + 1, mask=mask, other=0.0)
                v2 = tl.load(row + 4 * k + 2, mask=mask, other=0.0)
                s0, s1, s2 = s0 + wz * v0, s1 + wz * v1, s2 + wz * v2
                g0, g1, g2 = g0 + dz * v0, g1 + dz * v1, g2 + dz * v2
            w = wx * wy
            u0, u1, u2 = u0 + w * s0, u1 + w * s1, u2 + w * s2
            a0, b0, c0 = a0 + dx * wy * s0, b0 + dx * wy * s1, c0 + dx * wy * s2
            a1, b1, c1 = a1 + wx * dy * s0, b1 + wx * dy * s1, c1 + wx * dy * s2
            a2, b2, c2 = a2 + w * g0, b2 + w * g1, c2 + w * g2
    return (u0, u1, u2), (a0, a1, a2), (b0, b1, b2), (c0, c1, c2)


@compiled
def _multiply(a: tl.tuple, b: tl.tuple, c: tl.tuple, v: tl.tuple) -> tl.tuple:
    """The matrix of rows ``a``, ``b``, ``c`` plus the identity, times a vector."""
    return (
        v[0] + a[0] * v[0] + a[1] * v[1] + a[2] * v[2],
        v[1] + b[0] * v[0] + b[1] * v[1] + b[2] * v[2],
        v[2] + c[0] * v[0] + c[1] * v[1] + c[2] * v[2],
    )


@compiled
def move_points(
    points: tl.tensor, table: tl.tensor, coefficients: tl.tensor, moved: tl.tensor, jacobians: tl.tensor,
    unsettled: tl.tensor, count: int, steps: int, size_x: int, size_y: int, size_z: int, tolerance: float,
    max_iterations: int, with_jacobians: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Moves points ``(3, count)``; ``jacobians`` ``(9, count)`` float32 is filled if asked for.

    An inversion is by Newton's method. Where a step does not lessen the residual, one of the fixed-point iteration from
    where it was smallest takes its place, which always does for contractions.
    """
    last = _last((size_x, size_y, size_z))
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    exists = index < count
    x = tl.load(points + index, mask=exists, other=0.0)
    y = tl.load(points + wide(count) + index, mask=exists, other=0.0)
    z = tl.load(points + 2 * wide(count) + index, mask=exists, other=0.0)
    known = exists & (x == x) & (y == y) & (z == z)
    failed = index < 0
    zero = 0.0 * index.to(tl.float32)
    j00, j01, j02 = zero + 1, zero, zero
    j10, j11, j12 = zero, zero + 1, zero
    j20, j21, j22 = zero, zero, zero + 1
    for number in range(steps):
        entry = table + number * 5
        update = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        inverted = tl.load(entry + 4)
        if inverted != 0:
            wanted_x, wanted_y, wanted_z = x, y, z
            kept0, kept1, kept2 = zero, zero, zero  # the displacement where the residual was smallest
            before = zero.to(tl.float64) + float("inf")
            active = known
            iteration = 0
            while (iteration < max_iterations) & (tl.max(active.to(tl.int32), axis=0) > 0):
                u, a, b, c = _look_up(coefficients, update, (x, y, z), last, active)
                rest_x, rest_y, rest_z = x + u[0] - wanted_x, y + u[1] - wanted_y, z + u[2] - wanted_z
                residual = tl.maximum(tl.maximum(tl.abs(rest_x), tl.abs(rest_y)), tl.abs(rest_z))
                astray = residual > 0.995 * before
                s = solve(a, b, c, (rest_x.to(tl.float32), rest_y.to(tl.float32), rest_z.to(tl.float32)))
                settled = tl.maximum(tl.maximum(tl.abs(s[0]), tl.abs(s[1])), tl.abs(s[2])) < tolerance
                x = tl.where(active, tl.where(astray, wanted_x - kept0, x - s[0]), x)
                y = tl.where(active, tl.where(astray, wanted_y - kept1, y - s[1]), y)
                z = tl.where(active, tl.where(astray, wanted_z - kept2, z - s[2]), z)
                keep = active & (astray == 0)
                kept0, kept1, kept2 = (
                    tl.where(keep, u[0], kept0),
                    tl.where(keep, u[1], kept1),
                    tl.where(keep, u[2], kept2),
                )
                before = tl.where(active, tl.where(astray, float("inf"), residual), before)
                active = active & (astray | (settled == 0))
                iteration += 1
            failed = failed | active
            if with_jacobians:
                u, a, b, c = _look_up(coefficients, update, (x, y, z), last, known)
                j00, j10, j20 = solve(a, b, c, (j00, j10, j20))
                j01, j11, j21 = solve(a, b, c, (j01, j11, j21))
                j02, j12, j22 = solve(a, b, c, (j02, j12, j22))
        else:
            u, a, b, c = _look_up(coefficients, update, (x, y, z), last, known)
            x, y, z = x + u[0], y + u[1], z + u[2]
            if with_jacobians:
                j00, j10, j20 = _multiply(a, b, c, (j00, j10, j20))
                j01, j11, j21 = _multiply(a, b, c, (j01, j11, j21))
                j02, j12, j22 = _multiply(a, b, c, (j02, j12, j22))
    unknown = float("nan")
    size = wide(count)
    tl.store(moved + index, tl.where(known, x, unknown), mask=exists)
    tl.store(moved + size + index, tl.where(known, y, unknown), mask=exists)
    tl.store(moved + 2 * size + index, tl.where(known, z, unknown), mask=exists)
    tl.store(unsettled + index, failed.to(tl.int8), mask=exists)
    if with_jacobians:
        tl.store(jacobians + index, tl.where(known, j00, unknown), mask=exists)
        tl.store(jacobians + size + index, tl.where(known, j01, unknown), mask=exists)
        tl.store(jacobians + 2 * size + index, tl.where(known, j02, unknown), mask=exists)
        tl.store(jacobians + 3 * size + index, tl.where(known, j10, unknown), mask=exists)
        tl.store(jacobians + 4 * size + index, tl.where(known, j11, unknown), mask=exists)
        tl.store(jacobians + 5 * size + index, tl.where(known, j12, unknown), mask=exists)
        tl.store(jacobians + 6 * size + index, tl.where(known, j20, unknown), mask=exists)
        tl.store(jacobians + 7 * size + index, tl.where(known, j21, unknown), mask=exists)
        tl.store(jacobians + 8 * size + index, tl.where(known, j22, unknown), mask=exists)
