"""Triton kernels over differences between neighbours: the volume that a field folds, and the gradient of a field."""

import triton.language as tl

from sitreg_lumir.deform.backends.cuda.launch import compiled
from sitreg_lumir.deform.backends.cuda.lookups import add, block_of, coordinates, flat_index, load_vector, volume_of


@compiled
def _cross(b: tl.tuple, c: tl.tuple) -> tl.tuple:
    return b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0]


@compiled
def _scaled(scale: tl.tensor, v: tl.tuple) -> tl.tuple:
    return scale * v[0], scale * v[1], scale * v[2]


@compiled
def _difference(
    field: tl.tensor,
    index: tl.tensor,
    shape: tl.tuple,
    volume: tl.tensor,
    mask: tl.tensor,
    centre: tl.tuple,
    x: tl.constexpr,
    y: tl.constexpr,
    z: tl.constexpr,
) -> tl.tuple:
    """From a voxel to its neighbour at a step, as the map moves both: the difference of displacements plus the step."""
    u = load_vector(field, index + flat_index((x, y, z), shape), volume, mask)
    return u[0] - centre[0] + x, u[1] - centre[1] + y, u[2] - centre[2] + z


@compiled
def _fold(a: tl.tuple, b: tl.tuple, c: tl.tuple) -> tl.tuple:
    """A twelfth of the negative part of the determinant with these columns, and its derivatives by them."""
    normal = _cross(b, c)
    det = a[0] * normal[0] + a[1] * normal[1] + a[2] * normal[2]
    share = tl.where(det < 0, -1.0 / 12.0, 0.0)
    return share * det, _scaled(share, normal), _scaled(share, _cross(c, a)), _scaled(share, _cross(a, b))


@compiled
def _add_at(
    grad: tl.tensor,
    index: tl.tensor,
    shape: tl.tuple,
    volume: tl.tensor,
    mask: tl.tensor,
    v: tl.tuple,
    x: tl.constexpr,
    y: tl.constexpr,
    z: tl.constexpr,
) -> None:
    to = grad + index + flat_index((x, y, z), shape)
    tl.atomic_add(to, v[0], mask=mask, sem="relaxed")
    tl.atomic_add(to + volume, v[1], mask=mask, sem="relaxed")
    tl.atomic_add(to + 2 * volume, v[2], mask=mask, sem="relaxed")


@compiled
def fold(
    disp: tl.tensor, folded: tl.tensor, totals: tl.tensor, grad: tl.tensor, size_x: int, size_y: int, size_z: int,
    need_volume: tl.constexpr, need_grad: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """The folded volume of inner voxels, each program's sum, and the gradient of all, added to ``grad``.

    Adding is atomic and in no fixed order, but only voxels that fold take part.
    """
    shape, inner = (size_x, size_y, size_z), (size_x - 2, size_y - 2, size_z - 2)
    volume = volume_of(shape)
    field = disp + tl.program_id(1).to(tl.int64) * 3 * volume
    number = tl.program_id(0) * block + tl.arange(0, block)
    exists = number < inner[0] * inner[1] * inner[2]
    index = flat_index(add(coordinates(number, inner), (1, 1, 1)), shape)
    u = load_vector(field, index, volume, exists)
    above_x = _difference(field, index, shape, volume, exists, u, 1, 0, 0)
    above_y = _difference(field, index, shape, volume, exists, u, 0, 1, 0)
    above_z = _difference(field, index, shape, volume, exists, u, 0, 0, 1)
    below_x = _scaled(-1.0, _difference(field, index, shape, volume, exists, u, -1, 0, 0))
    below_y = _scaled(-1.0, _difference(field, index, shape, volume, exists, u, 0, -1, 0))
    below_z = _scaled(-1.0, _difference(field, index, shape, volume, exists, u, 0, 0, -1))
    nothing = (tl.zeros([block], tl.float32), tl.zeros([block], tl.float32), tl.zeros([block], tl.float32))
    by_above_x, by_above_y, by_above_z = nothing, nothing, nothing
    by_below_x, by_below_y, by_below_z = nothing, nothing, nothing
    total = tl.zeros([block], dtype=tl.float32)
    for signs in tl.static_range(8):
        a, b, c = below_x, below_y, below_z
        if signs & 4:
            a = above_x
        if signs & 2:
            b = above_y
        if signs & 1:
            c = above_z
        part, by_a, by_b, by_c = _fold(a, b, c)
        total += part
        if signs & 4:
            by_above_x = add(by_above_x, by_a)
        else:
            by_below_x = add(by_below_x, by_a)
        if signs & 2:
            by_above_y = add(by_above_y, by_b)
        else:
            by_below_y = add(by_below_y, by_b)
        if signs & 1:
            by_above_z = add(by_above_z, by_c)
        else:
            by_below_z = add(by_below_z, by_c)
    a = _difference(field, index, shape, volume, exists, u, -1, -1, 0)
    b = _difference(field, index, shape, volume, exists, u, -1, 0, -1)
    c = _difference(field, index, shape, volume, exists, u, 0, -1, -1)
    part, by_xy, by_xz, by_yz = _fold(a, b, c)
    total += part
    a = _difference(field, index, shape, volume, exists, u, 1, 1, 0)
    b = _difference(field, index, shape, volume, exists, u, 0, 1, 1)
    c = _difference(field, index, shape, volume, exists, u, 1, 0, 1)
    part, by_above_xy, by_above_yz, by_above_xz = _fold(a, b, c)
    total = tl.where(exists, total + part, 0.0)
    tl.store(totals + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(total, axis=0))
    if need_volume:
        tl.store(folded + tl.program_id(1).to(tl.int64) * volume_of(inner) + number, total, mask=exists)
    if need_grad:
        mask = exists & (total != 0)
        to = grad + tl.program_id(1).to(tl.int64) * 3 * volume
        _add_at(to, index, shape, volume, mask, by_above_x, 1, 0, 0)
        _add_at(to, index, shape, volume, mask, by_above_y, 0, 1, 0)
        _add_at(to, index, shape, volume, mask, by_above_z, 0, 0, 1)
        _add_at(to, index, shape, volume, mask, _scaled(-1.0, by_below_x), -1, 0, 0)
        _add_at(to, index, shape, volume, mask, _scaled(-1.0, by_below_y), 0, -1, 0)
        _add_at(to, index, shape, volume, mask, _scaled(-1.0, by_below_z), 0, 0, -1)
        _add_at(to, index, shape, volume, mask, by_xy, -1, -1, 0)
        _add_at(to, index, shape, volume, mask, by_xz, -1, 0, -1)
        _add_at(to, index, shape, volume, mask, by_yz, 0, -1, -1)
        _add_at(to, index, shape, volume, mask, by_above_xy, 1, 1, 0)
        _add_at(to, index, shape, volume, mask, by_above_yz, 0, 1, 1)
        _add_at(to, index, shape, volume, mask, by_above_xz, 1, 0, 1)
        above = add(add(by_above_x, by_above_y), by_above_z)
        below = add(add(by_below_x, by_below_y), by_below_z)
        stars = add(add(add(by_xy, by_xz), by_yz), add(add(by_above_xy, by_above_yz), by_above_xz))
        centre = add(below, _scaled(-1.0, add(above, stars)))
        _add_at(to, index, shape, volume, mask, centre, 0, 0, 0)


@compiled
def squared_differences(
    disp: tl.tensor, totals: tl.tensor, size_x: int, size_y: int, size_z: int, weights: tl.tuple, block: tl.constexpr
) -> None:
    """Each program's sum of squared differences to the next voxel, times ``weights[3 * component + axis]``."""
    shape = (size_x, size_y, size_z)
    index, voxel, exists, start = block_of(shape, block)
    step_x, step_y = size_y * size_z, size_z
    total = tl.zeros([block], tl.float32)
    for component in tl.static_range(3):
        address = disp + start + component * volume_of(shape) + index
        u = tl.load(address, mask=exists, other=0.0)
        by_x = tl.load(address + step_x, mask=exists & (voxel[0] + 1 < size_x), other=u) - u
        by_y = tl.load(address + step_y, mask=exists & (voxel[1] + 1 < size_y), other=u) - u
        by_z = tl.load(address + 1, mask=exists & (voxel[2] + 1 < size_z), other=u) - u
        total += weights[3 * component] * by_x * by_x + weights[3 * component + 1] * by_y * by_y
        total += weights[3 * component + 2] * by_z * by_z
    tl.store(totals + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(total, axis=0))


@compiled
def squared_differences_adjoint(
    grad_total: tl.tensor,
    disp: tl.tensor,
    grad: tl.tensor,
    size_x: int,
    size_y: int,
    size_z: int,
    weights: tl.tuple,
    block: tl.constexpr,
) -> None:
    """The gradient of the sum of :func:`squared_differences`, times the scalar that ``grad_total`` points to."""
    shape = (size_x, size_y, size_z)
    index, voxel, exists, start = block_of(shape, block)
    step_x, step_y = size_y * size_z, size_z
    twice = 2 * tl.load(grad_total)
    for component in tl.static_range(3):
        offset = start + component * volume_of(shape)
        address = disp + offset + index
        u = tl.load(address, mask=exists, other=0.0)
        by_x = u - tl.load(address + step_x, mask=exists & (voxel[0] + 1 < size_x), other=u)
        by_x += u - tl.load(address - step_x, mask=exists & (voxel[0] > 0), other=u)
        by_y = u - tl.load(address + step_y, mask=exists & (voxel[1] + 1 < size_y), other=u)
        by_y += u - tl.load(address - step_y, mask=exists & (voxel[1] > 0), other=u)
        by_z = u - tl.load(address + 1, mask=exists & (voxel[2] + 1 < size_z), other=u)
        by_z += u - tl.load(address - 1, mask=exists & (voxel[2] > 0), other=u)
        derivative = (
            weights[3 * component] * by_x + weights[3 * component + 1] * by_y + weights[3 * component + 2] * by_z
        )
        tl.store(grad + offset + index, twice * derivative, mask=exists)
