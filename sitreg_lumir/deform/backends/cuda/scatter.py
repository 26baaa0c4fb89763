"""Triton kernels of adjoint look-ups: gradients that are added to the voxels that were looked up.

Many voxels add to one place, by atomic operations in no fixed order: gradients may differ in their last bits from
run to run, as those of PyTorch's own ``grid_sample`` do on a GPU.
"""

import triton.language as tl

from sitreg_lumir.deform.backends.cuda.launch import compiled
from sitreg_lumir.deform.backends.cuda.lookups import (
    add,
    block_of,
    clamp_derivative,
    coordinates,
    corners,
    flat_index,
    follow,
    gradients,
    load_vector,
    locate,
    solve,
    steps,
    steps_of_field,
    store_vector,
    value_and_rows,
    volume_of,
)
from sitreg_lumir.deform.backends.cuda.warps import neighbours, offset, positions


@compiled
def add_to_corners(target: tl.tensor, step: tl.tuple, weights: tl.tuple, value: tl.tensor, mask: tl.tensor) -> None:
    """Adds a value to a cell's corners in shares of the trilinear weights, from pointers to the lowest corner."""
    dx, dy, dz = step
    wx, wy, wz = weights
    upper = target + dx
    high = value * wx
    low = value - high
    low_y, high_y = low * wy, high * wy
    low, high = low - low_y, high - high_y
    a, b, c, d = low * wz, low_y * wz, high * wz, high_y * wz
    tl.atomic_add(target, low - a, mask=mask, sem="relaxed")
    tl.atomic_add(target + dz, a, mask=mask, sem="relaxed")
    tl.atomic_add(target + dy, low_y - b, mask=mask, sem="relaxed")
    tl.atomic_add(target + dy + dz, b, mask=mask, sem="relaxed")
    tl.atomic_add(upper, high - c, mask=mask, sem="relaxed")
    tl.atomic_add(upper + dz, c, mask=mask, sem="relaxed")
    tl.atomic_add(upper + dy, high_y - d, mask=mask, sem="relaxed")
    tl.atomic_add(upper + dy + dz, d, mask=mask, sem="relaxed")


@compiled
def _add_vector(target: tl.tensor, position: tl.tuple, shape: tl.tuple, v: tl.tuple, mask: tl.tensor) -> None:
    """Adds three components where a field was looked up."""
    voxel, weights = locate(position, shape)
    step, volume = steps_of_field(shape), volume_of(shape)
    cell = target + flat_index(voxel, shape)
    add_to_corners(cell, step, weights, v[0], mask)
    add_to_corners(cell + volume, step, weights, v[1], mask)
    add_to_corners(cell + 2 * volume, step, weights, v[2], mask)


@compiled
def scatter_compose(
    grad: tl.tensor,
    disps: tl.tuple,
    grads: tl.tuple,
    size_x: int,
    size_y: int,
    size_z: int,
    length: tl.constexpr,
    needed: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """The composition's gradient: goes back through the fields and adds to each field's gradient.

    Bit ``n`` of ``needed`` says whether the gradient of field ``n`` is asked for. The last field's is only written.
    """
    shape = (size_x, size_y, size_z)
    index, voxel, exists, start = block_of(shape, block)
    g = load_vector(grad + start, index, volume_of(shape), exists)
    for outer in tl.static_range(length - 1):
        if needed >> outer:  # else nothing further in is asked for
            v = follow(disps, start, index, voxel, shape, exists, outer, length)
            position = add(voxel, v)
            if (needed >> outer) & 1:
                _add_vector(grads[outer] + start, position, shape, g, exists)
            if needed >> (outer + 1):
                _, rows = value_and_rows(disps[outer] + start, position, shape, exists)
                a, b, c = rows
                pulled = (
                    g[0] * a[0] + g[1] * b[0] + g[2] * c[0],
                    g[0] * a[1] + g[1] * b[1] + g[2] * c[1],
                    g[0] * a[2] + g[1] * b[2] + g[2] * c[2],
                )
                g = add(g, pulled)
    if needed >> (length - 1):
        store_vector(grads[length - 1] + start, index, volume_of(shape), g, exists)


@compiled
def scatter_invert(
    grad: tl.tensor,
    disp: tl.tensor,
    inverse: tl.tensor,
    grad_disp: tl.tensor,
    size_x: int,
    size_y: int,
    size_z: int,
    block: tl.constexpr,
) -> None:
    """The inversion's gradient: solves ``(I + J^T) lambda = grad`` and adds ``-lambda`` where it looked."""
    shape = (size_x, size_y, size_z)
    index, voxel, exists, start = block_of(shape, block)
    position = add(voxel, load_vector(inverse + start, index, volume_of(shape), exists))
    _, rows = value_and_rows(disp + start, position, shape, exists)
    a, b, c = rows
    g = load_vector(grad + start, index, volume_of(shape), exists)
    solution = solve((a[0], b[0], c[0]), (a[1], b[1], c[1]), (a[2], b[2], c[2]), (-g[0], -g[1], -g[2]))
    _add_vector(grad_disp + start, position, shape, solution, exists)


@compiled
def _pair(level: tl.tensor, factor: tl.tensor, size: tl.tensor) -> tl.tuple:
    """A level voxel's two neighbours along an axis, how often the first counts, and whether there is a second."""
    first, second = neighbours(level, factor, size)
    two = first < second
    return first, second, tl.where(two, 1.0, 2.0), two


@compiled
def _store_shares(
    target: tl.tensor, point: tl.tuple, full: tl.tuple, factor: tl.tensor, g: tl.tuple, exists: tl.tensor
) -> None:
    """Shares a level voxel's vector among the voxels whose mean it sees; no other level voxel sees them."""
    x0, x1, wx, two_x = _pair(point[0], factor, full[0])
    y0, y1, wy, two_y = _pair(point[1], factor, full[1])
    z0, z1, wz, two_z = _pair(point[2], factor, full[2])
    weight = wx * wy * wz * (0.125 / factor)
    share, volume = (weight * g[0], weight * g[1], weight * g[2]), volume_of(full)
    store_vector(target, flat_index((x0, y0, z0), full), volume, share, exists)
    store_vector(target, flat_index((x0, y0, z1), full), volume, share, exists & two_z)
    store_vector(target, flat_index((x0, y1, z0), full), volume, share, exists & two_y)
    store_vector(target, flat_index((x0, y1, z1), full), volume, share, exists & two_y & two_z)
    store_vector(target, flat_index((x1, y0, z0), full), volume, share, exists & two_x)
    store_vector(target, flat_index((x1, y0, z1), full), volume, share, exists & two_x & two_z)
    store_vector(target, flat_index((x1, y1, z0), full), volume, share, exists & two_x & two_y)
    store_vector(target, flat_index((x1, y1, z1), full), volume, share, exists & two_x & two_y & two_z)


@compiled
def scatter_lookup(
    grad: tl.tensor, values: tl.tensor, points: tl.tensor, grad_values: tl.tensor, grad_points: tl.tensor,
    size_x: int, size_y: int, size_z: int, grid_x: int, grid_y: int, grid_z: int,
    full_x: int, full_y: int, full_z: int, factor: int, points_batch: int, channels: int, share: int,
    grad_b: int, grad_c: tl.tensor, grad_x: int, grad_y: int, grad_z: int,
    values_b: int, values_c: tl.tensor, values_x: int, values_y: int, values_z: int,
    to_b: int, to_c: tl.tensor, to_x: int, to_y: int, to_z: int,
    mode: tl.constexpr, need_values: tl.constexpr, need_points: tl.constexpr,
    block: tl.constexpr, block_c: tl.constexpr,
) -> None:  # fmt: skip
    """The gradients of :func:`lookup`: ``grad_values`` is added to, the points' is written.

    With the points' gradient one program does all channels. For ``level`` it is the finer field's, and has to be 0
    where no level voxel looks.
    """
    shape, grid, full = (size_x, size_y, size_z), (grid_x, grid_y, grid_z), (full_x, full_y, full_z)
    strides, to_strides = (values_x, values_y, values_z), (to_x, to_y, to_z)
    batch = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * block + tl.arange(0, block)[:, None]
    exists = index < grid_x * grid_y * grid_z
    point = coordinates(index, grid)
    position = positions(points + batch * points_batch, index, point, exists, grid, full, factor, mode)
    voxel, weights = locate(position, shape)
    cell, step = values + batch * values_b + offset(voxel, strides), steps(shape, strides)
    to, to_step = grad_values + batch * to_b + offset(voxel, to_strides), steps(shape, to_strides)
    source = grad + batch * grad_b + offset(point, (grad_x, grad_y, grad_z))
    total_x = tl.zeros([block, block_c], dtype=tl.float32)
    total_y = tl.zeros([block, block_c], dtype=tl.float32)
    total_z = tl.zeros([block, block_c], dtype=tl.float32)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, channels)
    for part in range(first, last, block_c):
        channel = part + tl.arange(0, block_c)[None, :]
        mask = exists & (channel < last)
        channel = channel.to(tl.int64)
        value = tl.load(source + channel * grad_c, mask=mask, other=0.0).to(tl.float32)
        if need_values:
            add_to_corners(to + channel * to_c, to_step, weights, value, mask)
        if need_points:
            dx, dy, dz = gradients(corners(cell + channel * values_c, step, mask), weights)
            total_x += value * dx
            total_y += value * dy
            total_z += value * dz
    if need_points:
        g0 = tl.sum(total_x, axis=1, keep_dims=True) * clamp_derivative(position[0], size_x)
        g1 = tl.sum(total_y, axis=1, keep_dims=True) * clamp_derivative(position[1], size_y)
        g2 = tl.sum(total_z, axis=1, keep_dims=True) * clamp_derivative(position[2], size_z)
        if mode == "level":
            target = grad_points + batch * 3 * volume_of(full)
            _store_shares(target, point, full, factor, (g0, g1, g2), exists)
        else:
            target = grad_points + batch * 3 * volume_of(grid)
            store_vector(target, index, volume_of(grid), (g0, g1, g2), exists)
