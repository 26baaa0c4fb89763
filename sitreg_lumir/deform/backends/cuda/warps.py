"""Triton kernels that look up values of any number of channels: where each point looks, and the look-up.

A program works on a block of points times a block of channels, and goes on through its share of the channels: the
positions are computed once. Values are read and written through strides, so that no layout needs a copy.
"""

import triton.language as tl

from sitreg_lumir.deform.backends.cuda.launch import compiled
from sitreg_lumir.deform.backends.cuda.lookups import (
    add,
    blend,
    coordinates,
    corners,
    flat_index,
    load_vector,
    locate,
    steps,
    steps_of_field,
    volume_of,
)


@compiled
def neighbours(level: tl.tensor, factor: tl.tensor, size: tl.tensor) -> tl.tuple:
    """The two full-resolution voxels, clamped, whose mean a level voxel's centre sees (equal on a voxel)."""
    twice = factor * (2 * level + 1) - 1  # twice the position
    return tl.minimum(twice // 2, size - 1), tl.minimum((twice + 1) // 2, size - 1)


@compiled
def _sum(v: tl.tuple) -> tl.tensor:
    return (v[0] + v[1] + v[2] + v[3]) + (v[4] + v[5] + v[6] + v[7])


@compiled
def positions(
    points: tl.tensor,
    index: tl.tensor,
    point: tl.tuple,
    exists: tl.tensor,
    grid: tl.tuple,
    full: tl.tuple,
    factor: tl.tensor,
    mode: tl.constexpr,
) -> tl.tuple:
    """Where the points of a grid look, voxels of the values.

    ``points`` are ``absolute``, or ``relative`` to their own grid index, or they are the field on the ``level``'s
    full-resolution grid, of shape ``full``.
    """
    if mode == "level":
        x0, x1 = neighbours(point[0], factor, full[0])
        y0, y1 = neighbours(point[1], factor, full[1])
        z0, z1 = neighbours(point[2], factor, full[2])
        step = ((x1 - x0) * full[1] * full[2], (y1 - y0) * full[2], z1 - z0)
        lowest, volume = points + flat_index((x0, y0, z0), full), volume_of(full)
        scale = 0.125 / factor
        u0 = scale * _sum(corners(lowest, step, exists))
        u1 = scale * _sum(corners(lowest + volume, step, exists))
        u2 = scale * _sum(corners(lowest + 2 * volume, step, exists))
        position = add(point, (u0, u1, u2))
    else:
        position = load_vector(points, index, volume_of(grid), exists)
        if mode == "relative":
            position = add(point, position)
    return position


@compiled
def offset(voxel: tl.tuple, strides: tl.tuple) -> tl.tensor:
    """Where a voxel lies in memory, in 64 bits."""
    return voxel[0].to(tl.int64) * strides[0] + voxel[1].to(tl.int64) * strides[1] + voxel[2].to(tl.int64) * strides[2]


@compiled
def lookup(
    values: tl.tensor, points: tl.tensor, out: tl.tensor,
    size_x: int, size_y: int, size_z: int, grid_x: int, grid_y: int, grid_z: int,
    full_x: int, full_y: int, full_z: int, factor: int, points_batch: int, channels: int, share: int,
    values_b: int, values_c: tl.tensor, values_x: int, values_y: int, values_z: int,
    out_b: int, out_c: tl.tensor, out_x: int, out_y: int, out_z: int,
    mode: tl.constexpr, block: tl.constexpr, block_c: tl.constexpr,
) -> None:  # fmt: skip
    """``values`` of ``size`` at the points of ``grid``; a program does ``share`` channels."""
    shape, grid, full = (size_x, size_y, size_z), (grid_x, grid_y, grid_z), (full_x, full_y, full_z)
    strides = (values_x, values_y, values_z)
    batch = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * block + tl.arange(0, block)[:, None]
    exists = index < grid_x * grid_y * grid_z
    point = coordinates(index, grid)
    position = positions(points + batch * points_batch, index, point, exists, grid, full, factor, mode)
    voxel, weights = locate(position, shape)
    cell, step = values + batch * values_b + offset(voxel, strides), steps(shape, strides)
    to = out + batch * out_b + offset(point, (out_x, out_y, out_z))
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, channels)
    for part in range(first, last, block_c):
        channel = part + tl.arange(0, block_c)[None, :]
        mask = exists & (channel < last)
        channel = channel.to(tl.int64)
        tl.store(to + channel * out_c, blend(corners(cell + channel * values_c, step, mask), weights), mask=mask)


@compiled
def _kept(position: tl.tensor, size: tl.tensor) -> tl.tensor:
    """What is left, along one axis, of a look-up that leaves the volume where zeros begin."""
    beyond = tl.maximum(-position, position - (size - 1).to(tl.float32))
    return 1 - tl.minimum(tl.maximum(beyond, 0.0), 1.0)


@compiled
def inside_mask(
    mask: tl.tensor, points: tl.tensor, kept: tl.tensor, size_x: int, size_y: int, size_z: int,
    grid_x: int, grid_y: int, grid_z: int, points_batch: int, mode: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Where a mask of 0 and 1 (bytes), trilinear with zeros outside, is at least 1 - 1e-3."""
    shape, grid = (size_x, size_y, size_z), (grid_x, grid_y, grid_z)
    batch = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * block + tl.arange(0, block)
    exists = index < grid_x * grid_y * grid_z
    start = points + batch * points_batch
    position = positions(start, index, coordinates(index, grid), exists, grid, grid, 1, mode)
    voxel, weights = locate(position, shape)
    cell = mask + batch * volume_of(shape) + flat_index(voxel, shape)
    value = blend(corners(cell, steps_of_field(shape), exists), weights)
    value *= _kept(position[0], size_x) * _kept(position[1], size_y) * _kept(position[2], size_z)
    tl.store(kept + batch * volume_of(grid) + index, (value >= 0.999).to(tl.int8), mask=exists)
