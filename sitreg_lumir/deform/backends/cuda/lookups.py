"""Triton kernels that read deformation fields: look-ups, inversion, composition.

A program works on a block of voxels, numbered with the last axis fastest: in 32 bits within a volume, in 64 bits within
a tensor. Fields are contiguous float32 ``(B, 3, X, Y, Z)``. What belongs together, like the three coordinates of a
position, goes as a tuple; ``shape`` is ``(X, Y, Z)`` and ``volume`` its product.
"""

import triton.language as tl

from sitreg_lumir.deform.backends.cuda.launch import compiled


@compiled
def coordinates(index: tl.tensor, shape: tl.tuple) -> tl.tuple:
    """``(x, y, z)`` of flat indices."""
    row = index // shape[2]
    return row // shape[1], row % shape[1], index % shape[2]


@compiled
def flat_index(voxel: tl.tuple, shape: tl.tuple) -> tl.tensor:
    """Flat indices of ``(x, y, z)``."""
    return (voxel[0] * shape[1] + voxel[1]) * shape[2] + voxel[2]


@compiled
def wide(number: tl.tensor) -> tl.tensor:
    """In 64 bits, for places within whole tensors."""
    return number.to(tl.int64)


@compiled
def volume_of(shape: tl.tuple) -> tl.tensor:
    """Number of voxels, as a long integer."""
    return shape[0].to(tl.int64) * shape[1] * shape[2]


@compiled
def block_of(shape: tl.tuple, block: tl.constexpr) -> tl.tuple:
    """A program's voxels: their flat indices, coordinates, which exist, and where their batch item's field begins."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    start = tl.program_id(1).to(tl.int64) * 3 * volume_of(shape)
    return index, coordinates(index, shape), index < shape[0] * shape[1] * shape[2], start


@compiled
def _along(position: tl.tensor, size: tl.tensor) -> tl.tuple:
    """Index of the voxel below a clamped position, and the weight of the voxel above (NaN counts as 0)."""
    last = (size - 1).to(tl.float32)
    inside = tl.where(position > 0, position, 0.0)
    inside = tl.where(inside < last, inside, last)
    lower = tl.minimum(inside.to(tl.int32), tl.maximum(size - 2, 0))
    return lower, inside - lower.to(tl.float32)


@compiled
def locate(position: tl.tuple, shape: tl.tuple) -> tl.tuple:
    """The cell of a position: its lowest corner's coordinates, and the weights of the upper corners."""
    ix, wx = _along(position[0], shape[0])
    iy, wy = _along(position[1], shape[1])
    iz, wz = _along(position[2], shape[2])
    return (ix, iy, iz), (wx, wy, wz)


@compiled
def steps(shape: tl.tuple, strides: tl.tuple) -> tl.tuple:
    """Index distance to the next voxel along each axis, 0 along axes of one voxel."""
    return (
        tl.where(shape[0] > 1, strides[0], 0),
        tl.where(shape[1] > 1, strides[1], 0),
        tl.where(shape[2] > 1, strides[2], 0),
    )


@compiled
def steps_of_field(shape: tl.tuple) -> tl.tuple:
    """Distances in memory between neighbours in a contiguous field."""
    return steps(shape, (shape[1] * shape[2], shape[2], 1))


@compiled
def clamp_derivative(position: tl.tensor, size: tl.tensor) -> tl.tensor:
    """Derivative of the clamp: 1 strictly between the first and the last voxel, else 0."""
    return tl.where((position > 0) & (position < (size - 1).to(tl.float32)), 1.0, 0.0)


@compiled
def corners(values: tl.tensor, step: tl.tuple, mask: tl.tensor) -> tl.tuple:
    """The values at a cell's corners, the last axis fastest, from pointers to the lowest one; 0 outside the mask."""
    dx, dy, dz = step
    v000 = tl.load(values, mask=mask, other=0).to(tl.float32)
    v001 = tl.load(values + dz, mask=mask, other=0).to(tl.float32)
    v010 = tl.load(values + dy, mask=mask, other=0).to(tl.float32)
    v011 = tl.load(values + dy + dz, mask=mask, other=0).to(tl.float32)
    v100 = tl.load(values + dx, mask=mask, other=0).to(tl.float32)
    v101 = tl.load(values + dx + dz, mask=mask, other=0).to(tl.float32)
    v110 = tl.load(values + dx + dy, mask=mask, other=0).to(tl.float32)
    v111 = tl.load(values + dx + dy + dz, mask=mask, other=0).to(tl.float32)
    return v000, v001, v010, v011, v100, v101, v110, v111


@compiled
def blend(v: tl.tuple, weights: tl.tuple) -> tl.tensor:
    """The trilinear interpolant of eight corners."""
    wx, wy, wz = weights
    a, b = v[0] + wz * (v[1] - v[0]), v[2] + wz * (v[3] - v[2])
    c, d = v[4] + wz * (v[5] - v[4]), v[6] + wz * (v[7] - v[6])
    a += wy * (b - a)
    c += wy * (d - c)
    return a + wx * (c - a)


@compiled
def gradients(v: tl.tuple, weights: tl.tuple) -> tl.tuple:
    """Its derivatives along the three axes."""
    wx, wy, wz = weights
    d00, d01, d10, d11 = v[1] - v[0], v[3] - v[2], v[5] - v[4], v[7] - v[6]
    a00, a01, a10, a11 = v[0] + wz * d00, v[2] + wz * d01, v[4] + wz * d10, v[6] + wz * d11
    e0, e1 = a01 - a00, a11 - a10
    f0, f1 = d00 + wy * (d01 - d00), d10 + wy * (d11 - d10)
    return a10 + wy * e1 - (a00 + wy * e0), e0 + wx * (e1 - e0), f0 + wx * (f1 - f0)


@compiled
def load_vector(field: tl.tensor, index: tl.tensor, volume: tl.tensor, mask: tl.tensor) -> tl.tuple:
    """The three components of a field at flat voxel indices."""
    u0 = tl.load(field + index, mask=mask, other=0.0)
    u1 = tl.load(field + volume + index, mask=mask, other=0.0)
    u2 = tl.load(field + 2 * volume + index, mask=mask, other=0.0)
    return u0, u1, u2


@compiled
def store_vector(field: tl.tensor, index: tl.tensor, volume: tl.tensor, v: tl.tuple, mask: tl.tensor) -> None:
    """Writes the three components of a field."""
    tl.store(field + index, v[0], mask=mask)
    tl.store(field + volume + index, v[1], mask=mask)
    tl.store(field + 2 * volume + index, v[2], mask=mask)


@compiled
def add(a: tl.tuple, b: tl.tuple) -> tl.tuple:
    """The sum of two vectors."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@compiled
def field_at(field: tl.tensor, position: tl.tuple, shape: tl.tuple, mask: tl.tensor) -> tl.tuple:
    """The three components of a field at positions."""
    voxel, weights = locate(position, shape)
    step, volume = steps_of_field(shape), volume_of(shape)
    cell = field + flat_index(voxel, shape)
    u0 = blend(corners(cell, step, mask), weights)
    u1 = blend(corners(cell + volume, step, mask), weights)
    u2 = blend(corners(cell + 2 * volume, step, mask), weights)
    return u0, u1, u2


@compiled
def value_and_rows(field: tl.tensor, position: tl.tuple, shape: tl.tuple, mask: tl.tensor) -> tl.tuple:
    """A field at positions, and the three rows of its derivative with respect to them, clamp included."""
    voxel, weights = locate(position, shape)
    step, volume = steps_of_field(shape), volume_of(shape)
    cell = field + flat_index(voxel, shape)
    ex, ey, ez = (
        clamp_derivative(position[0], shape[0]),
        clamp_derivative(position[1], shape[1]),
        clamp_derivative(position[2], shape[2]),
    )
    v = corners(cell, step, mask)
    u0, a = blend(v, weights), gradients(v, weights)
    v = corners(cell + volume, step, mask)
    u1, b = blend(v, weights), gradients(v, weights)
    v = corners(cell + 2 * volume, step, mask)
    u2, c = blend(v, weights), gradients(v, weights)
    rows = ((ex * a[0], ey * a[1], ez * a[2]), (ex * b[0], ey * b[1], ez * b[2]), (ex * c[0], ey * c[1], ez * c[2]))
    return (u0, u1, u2), rows


@compiled
def solve(a: tl.tuple, b: tl.tuple, c: tl.tuple, g: tl.tuple) -> tl.tuple:
    """Solution of the 3x3 system with rows ``a``, ``b``, ``c`` plus the identity, and right hand side ``g``."""
    ax, ay, az = 1.0 + a[0], a[1], a[2]
    bx, by, bz = b[0], 1.0 + b[1], b[2]
    cx, cy, cz = c[0], c[1], 1.0 + c[2]
    xx, xy, xz = by * cz - bz * cy, cy * az - cz * ay, ay * bz - az * by  # cofactors
    yx, yy, yz = bz * cx - bx * cz, cz * ax - cx * az, az * bx - ax * bz
    zx, zy, zz = bx * cy - by * cx, cx * ay - cy * ax, ax * by - ay * bx
    scale = 1.0 / (ax * xx + bx * xy + cx * xz)
    return (
        scale * (xx * g[0] + xy * g[1] + xz * g[2]),
        scale * (yx * g[0] + yy * g[1] + yz * g[2]),
        scale * (zx * g[0] + zy * g[1] + zz * g[2]),
    )


@compiled
def invert(
    disp: tl.tensor,
    inverse: tl.tensor,
    size_x: int,
    size_y: int,
    size_z: int,
    tolerance: float,
    max_iterations: int,
    block: tl.constexpr,
) -> None:
    """The inverse of a field by Newton's method, from ``-u(x)`` on, each voxel until it has settled.

    A Newton step below twice the tolerance ends a voxel's iteration, as it leaves a far smaller error. Where four
    steps do not get there, the fixed-point iteration goes on, which always does for contractions, and forgets what
    was not finite. A step costs the same look-up either way. Settled voxels of a block read nothing any more.
    """
    shape = (size_x, size_y, size_z)
    index, voxel, exists, start = block_of(shape, block)
    u = load_vector(disp + start, index, volume_of(shape), exists)
    v0, v1, v2 = -u[0], -u[1], -u[2]
    moving = exists
    iteration = 0
    while (iteration < max_iterations) & (tl.max(moving.to(tl.int32), axis=0) > 0):
        u, rows = value_and_rows(disp + start, add(voxel, (v0, v1, v2)), shape, moving)
        d0, d1, d2 = -u[0] - v0, -u[1] - v1, -u[2] - v2
        stop = tolerance
        if iteration < 4:
            d0, d1, d2 = solve(rows[0], rows[1], rows[2], (d0, d1, d2))
            stop = 2 * tolerance
            v0, v1, v2 = tl.where(moving, v0 + d0, v0), tl.where(moving, v1 + d1, v1), tl.where(moving, v2 + d2, v2)
        else:
            v0, v1, v2 = tl.where(moving, -u[0], v0), tl.where(moving, -u[1], v1), tl.where(moving, -u[2], v2)
        settled = (tl.abs(d0) < stop) & (tl.abs(d1) < stop) & (tl.abs(d2) < stop)
        moving = moving & (settled == 0)
        iteration += 1
    store_vector(inverse + start, index, volume_of(shape), (v0, v1, v2), exists)


@compiled
def follow(
    disps: tl.tuple,
    start: tl.tensor,
    index: tl.tensor,
    voxel: tl.tuple,
    shape: tl.tuple,
    exists: tl.tensor,
    stop: tl.constexpr,
    length: tl.constexpr,
) -> tl.tuple:
    """The displacement by the composed fields after number ``stop``, the last one applied first."""
    v = load_vector(disps[length - 1] + start, index, volume_of(shape), exists)
    for outer in tl.static_range(length - 2, stop, -1):
        v = add(v, field_at(disps[outer] + start, add(voxel, v), shape, exists))
    return v


@compiled
def compose(
    disps: tl.tuple,
    composed: tl.tensor,
    size_x: int,
    size_y: int,
    size_z: int,
    length: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """The composition of ``length`` fields, a tuple of tensors, the last one applied first; one write per voxel."""
    shape = (size_x, size_y, size_z)
    index, voxel, exists, start = block_of(shape, block)
    v = follow(disps, start, index, voxel, shape, exists, -1, length)
    store_vector(composed + start, index, volume_of(shape), v, exists)
