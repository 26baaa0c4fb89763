"""Triton kernels over windows: the local correlation of two images, and its gradient.

Windows are summed along one axis after the other, each sum directly and in one order: nothing builds up, and results
are the same from run to run. Sums are in float64, since variances are small differences of large sums. Images are
contiguous ``(B, 1, X, Y, Z)``, maps ``(Q, B, X, Y, Z)``; a program works on a block of voxels of one volume.
"""

import triton.language as tl

from sitreg_lumir.deform.backends.cuda.launch import compiled
from sitreg_lumir.deform.backends.cuda.lookups import wide


@compiled
def _masked(image: tl.tensor, mask: tl.tensor, index: tl.tensor, exists: tl.tensor, masked: tl.constexpr) -> tl.tensor:
    value = tl.load(image + index, mask=exists, other=0.0)
    if masked:
        value = tl.where(tl.load(mask + index, mask=exists, other=0) != 0, value, 0.0)
    return value.to(tl.float64)


@compiled
def sum_products(
    image_1: tl.tensor, image_2: tl.tensor, mask: tl.tensor, sums: tl.tensor, size: int, volume: int, batch: int,
    masked: tl.constexpr, window: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Sums along the last axis, ``size`` long, of both masked images, their squares and their product."""
    item = tl.program_id(1).to(tl.int64) * volume
    index = tl.program_id(0) * block + tl.arange(0, block)
    exists = index < volume
    place = index % size
    sum_1, sum_2 = tl.zeros([block], tl.float64), tl.zeros([block], tl.float64)
    sum_11, sum_22, sum_12 = tl.zeros([block], tl.float64), tl.zeros([block], tl.float64), tl.zeros([block], tl.float64)
    for step in tl.static_range(-(window // 2), window // 2 + 1):
        inside = exists & (place + step >= 0) & (place + step < size)
        a = _masked(image_1 + item, mask + item, index + step, inside, masked)
        b = _masked(image_2 + item, mask + item, index + step, inside, masked)
        sum_1, sum_2 = sum_1 + a, sum_2 + b
        sum_11, sum_22, sum_12 = sum_11 + a * a, sum_22 + b * b, sum_12 + a * b
    to, per_map = sums + item + index, wide(batch) * volume
    tl.store(to, sum_1, mask=exists)
    tl.store(to + per_map, sum_2, mask=exists)
    tl.store(to + 2 * per_map, sum_11, mask=exists)
    tl.store(to + 3 * per_map, sum_22, mask=exists)
    tl.store(to + 4 * per_map, sum_12, mask=exists)


@compiled
def _window_sum(
    values: tl.tensor,
    index: tl.tensor,
    place: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    exists: tl.tensor,
    window: tl.constexpr,
) -> tl.tensor:
    """Sums along an axis ``size`` long, of voxels with ``place`` on it and ``stride`` between neighbours."""
    total = tl.zeros(index.shape, tl.float64)
    for step in tl.static_range(-(window // 2), window // 2 + 1):
        inside = exists & (place + step >= 0) & (place + step < size)
        total += tl.load(values + index + step * stride, mask=inside, other=0.0).to(tl.float64)
    return total


@compiled
def sum_axis(
    values: tl.tensor, sums: tl.tensor, size: int, stride: int, volume: int, window: tl.constexpr, block: tl.constexpr
) -> None:
    """Sums along any axis, of every map."""
    item = tl.program_id(1).to(tl.int64) * volume
    index = tl.program_id(0) * block + tl.arange(0, block)
    exists = index < volume
    total = _window_sum(values + item, index, index // stride % size, size, stride, exists, window)
    tl.store(sums + item + index, total, mask=exists)


@compiled
def correlate(
    sums: tl.tensor, maps: tl.tensor, totals: tl.tensor, size: int, stride: int, volume: int, batch: int,
    count: tl.constexpr, window: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Finishes the sums along the first axis; each program's sum of squared correlations, and the gradient's maps.

    ``maps`` are halves of the derivatives by the covariance, then for each image by its variance and by the value
    that its window's means take from each voxel: 5, or 3 for the first image alone, or none.
    """
    item, per_map = tl.program_id(1).to(tl.int64) * volume, wide(batch) * volume
    index = tl.program_id(0) * block + tl.arange(0, block)
    exists = index < volume
    place, source = index // stride, sums + item
    voxels = window * window * window
    sum_1 = _window_sum(source, index, place, size, stride, exists, window)
    sum_2 = _window_sum(source + per_map, index, place, size, stride, exists, window)
    mean_1, mean_2 = sum_1 / voxels, sum_2 / voxels
    variance_1 = _window_sum(source + 2 * per_map, index, place, size, stride, exists, window) - sum_1 * mean_1
    variance_2 = _window_sum(source + 3 * per_map, index, place, size, stride, exists, window) - sum_2 * mean_2
    cross = _window_sum(source + 4 * per_map, index, place, size, stride, exists, window) - sum_1 * mean_2
    half = cross / (variance_1 * variance_2 + 1e-5)
    squares = tl.sum(tl.where(exists, half * cross, 0.0), axis=0)
    tl.store(totals + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), squares)
    to = maps + item + index
    if count > 0:
        by_1 = -half * half * variance_2
        tl.store(to, half, mask=exists)
        tl.store(to + per_map, by_1, mask=exists)
        tl.store(to + 2 * per_map, half * mean_2 + by_1 * mean_1, mask=exists)
    if count > 3:
        by_2 = -half * half * variance_1
        tl.store(to + 3 * per_map, by_2, mask=exists)
        tl.store(to + 4 * per_map, half * mean_1 + by_2 * mean_2, mask=exists)


@compiled
def correlate_adjoint(
    image_1: tl.tensor, image_2: tl.tensor, mask: tl.tensor, sums: tl.tensor, grad_1: tl.tensor, grad_2: tl.tensor,
    size: int, stride: int, volume: int, batch: int, scale: float,
    masked: tl.constexpr, count: tl.constexpr, window: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Finishes the sums of the maps along the first axis: the gradients of ``scale`` times the total.

    Each voxel gathers from all windows that it lies in. ``grad_2`` is left alone if there are no maps of it.
    """
    item, per_map = tl.program_id(1).to(tl.int64) * volume, wide(batch) * volume
    index = tl.program_id(0) * block + tl.arange(0, block)
    exists = index < volume
    place, source = index // stride, sums + item
    a = _masked(image_1 + item, mask + item, index, exists, masked)
    b = _masked(image_2 + item, mask + item, index, exists, masked)
    inside = tl.full(index.shape, 2 * scale, tl.float64)
    if masked:
        inside = tl.where(tl.load(mask + item + index, mask=exists, other=0) != 0, inside, 0.0)
    from_cross = _window_sum(source, index, place, size, stride, exists, window)
    from_own = _window_sum(source + per_map, index, place, size, stride, exists, window)
    from_means = _window_sum(source + 2 * per_map, index, place, size, stride, exists, window)
    tl.store(grad_1 + item + index, inside * (from_cross * b + from_own * a - from_means), mask=exists)
    if count > 3:
        from_own = _window_sum(source + 3 * per_map, index, place, size, stride, exists, window)
        from_means = _window_sum(source + 4 * per_map, index, place, size, stride, exists, window)
        tl.store(grad_2 + item + index, inside * (from_cross * a + from_own * b - from_means), mask=exists)
