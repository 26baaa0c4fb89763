"""Triton kernels of the MIND descriptor: two passes, with four maps in memory between them.

The squared difference to the neighbour below, ``(I(q) - I(q - r))^2``, is the one above it seen from ``q - r``: so
three differences make six distances. The first pass sums them along the last axis, the second along the other two.
Beyond the border the image repeats its last voxel: a difference along an axis is 0 there.
"""

import triton.language as tl

from sitreg_lumir.deform.backends.cuda.launch import compiled
from sitreg_lumir.deform.backends.cuda.lookups import coordinates, wide


@compiled
def _weight(step: tl.constexpr, sigma: tl.tensor) -> tl.tensor:
    return tl.exp(-(step * step) / (sigma * sigma))


@compiled
def _clamped(place: tl.tensor, size: tl.tensor) -> tl.tensor:
    return tl.minimum(tl.maximum(place, 0), size - 1)


@compiled
def smooth_differences(
    image: tl.tensor, maps: tl.tensor, size_x: int, size_y: int, size_z: int, volume: int, batch: int, sigma: float,
    radius: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """``(B, X, Y, Z)`` -> ``(4, B, X, Y, Z)``: squared differences to x + 1, y + 1, z + 1, z - 1, summed along z."""
    item, per_map = tl.program_id(1).to(tl.int64) * volume, wide(batch) * volume
    index = tl.program_id(0) * block + tl.arange(0, block)
    exists = index < volume
    x, y, z = coordinates(index, (size_x, size_y, size_z))
    row = image + item + (index - z)
    row_x = row + tl.where(x + 1 < size_x, size_y * size_z, 0)
    row_y = row + tl.where(y + 1 < size_y, size_z, 0)
    by_x, by_y = tl.zeros([block], dtype=tl.float32), tl.zeros([block], dtype=tl.float32)
    above, below = tl.zeros([block], dtype=tl.float32), tl.zeros([block], dtype=tl.float32)
    last = tl.load(row + _clamped(z - radius - 1, size_z), mask=exists, other=0.0)
    own = tl.load(row + _clamped(z - radius, size_z), mask=exists, other=0.0)
    for step in tl.static_range(-radius, radius + 1):
        weight, place = _weight(step, sigma), _clamped(z + step, size_z)
        next = tl.load(row + _clamped(z + step + 1, size_z), mask=exists, other=0.0)
        next_x = own - tl.load(row_x + place, mask=exists, other=0.0)
        next_y = own - tl.load(row_y + place, mask=exists, other=0.0)
        by_x, by_y = by_x + weight * next_x * next_x, by_y + weight * next_y * next_y
        above, below = above + weight * (own - next) * (own - next), below + weight * (own - last) * (own - last)
        last, own = own, next
    to = maps + item + index
    tl.store(to, by_x, mask=exists)
    tl.store(to + per_map, by_y, mask=exists)
    tl.store(to + 2 * per_map, above, mask=exists)
    tl.store(to + 3 * per_map, below, mask=exists)


@compiled
def describe(
    maps: tl.tensor, mind: tl.tensor, size_x: int, size_y: int, size_z: int, volume: int, batch: int, sigma: float,
    radius: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Maps of :func:`smooth_differences` -> ``(B, 6, X, Y, Z)``: distances to x - 1, x + 1, y - 1, ..., compared."""
    item, per_map = tl.program_id(1).to(tl.int64) * volume, wide(batch) * volume
    index = tl.program_id(0) * block + tl.arange(0, block)
    exists = index < volume
    x, y, z = coordinates(index, (size_x, size_y, size_z))
    column = maps + item + z
    left_x, right_x = tl.zeros([block], dtype=tl.float32), tl.zeros([block], dtype=tl.float32)
    left_y, right_y = tl.zeros([block], dtype=tl.float32), tl.zeros([block], dtype=tl.float32)
    left_z, right_z = tl.zeros([block], dtype=tl.float32), tl.zeros([block], dtype=tl.float32)
    for i in tl.static_range(-radius - 1, radius + 1):
        for j in tl.static_range(-radius - 1, radius + 1):
            place = column + (_clamped(x + i, size_x) * size_y + _clamped(y + j, size_y)) * size_z
            if j >= -radius:
                value = tl.load(place, mask=exists & (x + i >= 0), other=0.0) * _weight(j, sigma)
                if i >= -radius:
                    right_x += _weight(i, sigma) * value
                if i < radius:
                    left_x += _weight(i + 1, sigma) * value
            if i >= -radius:
                value = tl.load(place + per_map, mask=exists & (y + j >= 0), other=0.0) * _weight(i, sigma)
                if j >= -radius:
                    right_y += _weight(j, sigma) * value
                if j < radius:
                    left_y += _weight(j + 1, sigma) * value
            if i >= -radius and j >= -radius:
                weight = _weight(i, sigma) * _weight(j, sigma)
                right_z += weight * tl.load(place + 2 * per_map, mask=exists, other=0.0)
                left_z += weight * tl.load(place + 3 * per_map, mask=exists, other=0.0)
    variance = (left_x + right_x + left_y + right_y + left_z + right_z) / 6.0
    flat = variance <= 1e-6
    scale = -1.0 / tl.where(flat, 1.0, variance)
    to = mind + 6 * item + index
    tl.store(to, tl.where(flat, 1.0, tl.exp(scale * left_x)), mask=exists)
    tl.store(to + volume, tl.where(flat, 1.0, tl.exp(scale * right_x)), mask=exists)
    tl.store(to + 2 * wide(volume), tl.where(flat, 1.0, tl.exp(scale * left_y)), mask=exists)
    tl.store(to + 3 * wide(volume), tl.where(flat, 1.0, tl.exp(scale * right_y)), mask=exists)
    tl.store(to + 4 * wide(volume), tl.where(flat, 1.0, tl.exp(scale * left_z)), mask=exists)
    tl.store(to + 5 * wide(volume), tl.where(flat, 1.0, tl.exp(scale * right_z)), mask=exists)
