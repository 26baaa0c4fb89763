"""Compiled loops over windows: the local correlation of two images and its gradient, and the MIND descriptor.

Images and maps are ``(B * X, Y, Z)``; a task is a slab of ``SLAB`` planes. Sums over windows are running sums along
each axis in float64, in which products of float32 are exact. They begin again with each slab, so that nothing builds up
and the number of threads changes nothing.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.threads import compiled

SLAB = 8  # planes; more would fill windows less often, fewer would spread better over threads


@compiled
def slab_range(task: Any, size_x: Any) -> Any:
    """Where the batch item of a slab begins, and the slab's first plane and end within the item."""
    slabs = (size_x + SLAB - 1) // SLAB
    x0 = task % slabs * SLAB
    return task // slabs * size_x, x0, min(x0 + SLAB, size_x)


@compiled
def correlate(
    first: Any, last: Any, image_1: Any, image_2: Any, mask: Any, size_x: Any, window: Any, totals: Any, maps: Any
) -> None:
    """Per slab, the sum of the squared local correlations, and the maps of which their gradient is made.

    ``mask`` may have a single plane, for all. ``maps`` ``(Q, B * X, Y, Z)`` are halves of the derivatives by the
    covariance, then for each image by its variance and by the value that its window's means take from each voxel;
    ``Q`` is 5, or 3 for the first image alone, or 0.
    """
    _, size_y, size_z = image_1.shape
    radius, step = window // 2, 1 if len(mask) > 1 else 0
    nothing = np.zeros((size_y, size_z), image_1.dtype)
    columns, rows = np.empty((5, size_y, size_z)), np.empty((5, size_z + window))
    sums, squares = np.empty((5, size_z)), np.empty(size_z)
    for task in range(first, last):
        start, x0, x1 = slab_range(task, size_x)
        columns[:] = 0
        squares[:] = 0
        for x in range(x0 - 2 * radius, x1):  # before x0 the window fills up
            new_1, new_2, new_mask = nothing, nothing, mask[0]
            old_1, old_2, old_mask = nothing, nothing, mask[0]
            if 0 <= x + radius < size_x:
                i = start + x + radius
                new_1, new_2, new_mask = image_1[i], image_2[i], mask[i * step]
            if x > x0 and x - radius > 0:
                i = start + x - radius - 1
                old_1, old_2, old_mask = image_1[i], image_2[i], mask[i * step]
            _slide_images(columns, new_1, new_2, new_mask, old_1, old_2, old_mask)
            if x >= x0:
                rows[:] = 0
                for y in range(-radius, size_y):
                    _slide_rows(rows, columns, y, window)
                    if y >= 0:
                        _sum_along(rows, window, sums)
                        _correlate_row(sums, window, squares)
                        for q in range(len(maps)):
                            for z in range(size_z):
                                maps[q, start + x, y, z] = sums[q, z]
        totals[task] = squares.sum()


@compiled
def _slide_images(columns: Any, new_1: Any, new_2: Any, new_mask: Any, old_1: Any, old_2: Any, old_mask: Any) -> None:
    """Moves the sums over x of both masked images, their squares and their product on by a plane."""
    _, size_y, size_z = columns.shape
    for y in range(size_y):
        for z in range(size_z):
            enters, leaves = np.float64(new_mask[y, z]), np.float64(old_mask[y, z])
            a, b = enters * new_1[y, z], enters * new_2[y, z]
            c, d = leaves * old_1[y, z], leaves * old_2[y, z]
            columns[0, y, z] += a - c
            columns[1, y, z] += b - d
            columns[2, y, z] += a * a - c * c
            columns[3, y, z] += b * b - d * d
            columns[4, y, z] += a * b - c * d


@compiled
def _slide_rows(rows: Any, columns: Any, y: Any, window: Any) -> None:
    """Moves the sums over y on to row ``y``; they lie in the middle of ``rows``, between zeros."""
    count, size_y, size_z = columns.shape
    radius = window // 2
    new, old, offset = y + radius, y - radius - 1, np.uintp(radius + 1)
    if new < size_y:
        for q in range(count):
            for z in range(size_z):
                rows[q, offset + np.uintp(z)] += columns[q, new, z]
    if old >= 0:
        for q in range(count):
            for z in range(size_z):
                rows[q, offset + np.uintp(z)] -= columns[q, old, z]


@compiled
def _sum_along(rows: Any, window: Any, sums: Any) -> None:
    """Sums over z of three rows at a time, which spares the processor waiting for the sum before."""
    for q in range(0, len(sums), 3):
        i = min(q, len(sums) - 3)
        row_a, row_b, row_c = rows[i], rows[i + 1], rows[i + 2]
        a = b = c = 0.0
        for z in range(1, window):
            a += row_a[z]
            b += row_b[z]
            c += row_c[z]
        for z in range(sums.shape[1]):
            leaves, enters = np.uintp(z), np.uintp(z + window)
            a += row_a[enters] - row_a[leaves]
            b += row_b[enters] - row_b[leaves]
            c += row_c[enters] - row_c[leaves]
            sums[i, z], sums[i + 1, z], sums[i + 2, z] = a, b, c


@compiled
def _correlate_row(sums: Any, window: Any, squares: Any) -> None:
    """Adds the squared correlations to ``squares``, and puts the maps in place of the sums."""
    share = 1.0 / window**3
    for z in range(len(squares)):
        mean_1, mean_2 = share * sums[0, z], share * sums[1, z]
        variance_1 = sums[2, z] - sums[0, z] * mean_1
        variance_2 = sums[3, z] - sums[1, z] * mean_2
        cross = sums[4, z] - sums[0, z] * mean_2
        half = cross / (variance_1 * variance_2 + 1e-5)
        by_1, by_2 = -half * half * variance_2, -half * half * variance_1
        squares[z] += half * cross
        sums[0, z], sums[1, z], sums[3, z] = half, by_1, by_2
        sums[2, z], sums[4, z] = half * mean_2 + by_1 * mean_1, half * mean_1 + by_2 * mean_2


@compiled
def correlate_adjoint(
    first: Any, last: Any, image_1: Any, image_2: Any, mask: Any, size_x: Any, window: Any, scale: Any, maps: Any,
    grad_1: Any, grad_2: Any,
) -> None:  # fmt: skip
    """Per slab, the gradients of ``scale`` times the sum of :func:`correlate`, from its maps.

    Each voxel gathers from all windows that it lies in. ``grad_2`` is left alone if there are no maps of it.
    """
    count, _, size_y, size_z = maps.shape
    radius, step = window // 2, 1 if len(mask) > 1 else 0
    nothing = np.zeros((size_y, size_z), maps.dtype)
    columns, rows = np.empty((count, size_y, size_z)), np.empty((count, size_z + window))
    sums = np.empty((count, size_z))
    for task in range(first, last):
        start, x0, x1 = slab_range(task, size_x)
        columns[:] = 0
        for x in range(x0 - 2 * radius, x1):
            for q in range(count):
                new, old = nothing, nothing
                if 0 <= x + radius < size_x:
                    new = maps[q, start + x + radius]
                if x > x0 and x - radius > 0:
                    old = maps[q, start + x - radius - 1]
                _slide_map(columns[q], new, old)
            if x >= x0:
                i, inside = start + x, mask[(start + x) * step]
                rows[:] = 0
                for y in range(-radius, size_y):
                    _slide_rows(rows, columns, y, window)
                    if y >= 0:
                        _sum_along(rows, window, sums)
                        _gradient_row(sums, 1, image_1[i], image_2[i], inside, y, 2 * scale, grad_1[i])
                        if count == 5:
                            _gradient_row(sums, 3, image_2[i], image_1[i], inside, y, 2 * scale, grad_2[i])


@compiled
def _slide_map(columns: Any, new: Any, old: Any) -> None:
    """Moves the sums over x of a map on by a plane."""
    for y in range(len(columns)):
        for z in range(columns.shape[1]):
            columns[y, z] += np.float64(new[y, z]) - np.float64(old[y, z])


@compiled
def _gradient_row(sums: Any, q: Any, own: Any, second: Any, mask: Any, y: Any, scale: Any, grad: Any) -> None:
    """A row of the gradient by the image ``own``, of which ``q`` is the first map."""
    for z in range(grad.shape[1]):
        inside = np.float64(mask[y, z])
        by_value = inside * (sums[0, z] * second[y, z] + sums[q, z] * own[y, z]) - sums[q + 1, z]
        grad[y, z] = scale * inside * by_value


@compiled
def compare_patches(first: Any, last: Any, padded: Any, weights: Any, exponents: Any) -> None:
    """Planes of MIND's exponents: minus the six patch distances, in units of their mean, or 0 where that is tiny.

    A voxel's distance to the neighbour before it is that neighbour's to the one after it. Sums run along one axis
    after the other, first along x.

    Args:
        first: plane to begin with, counted over the batch.
        last: plane to end before.
        padded: the image, ``(B, X + 2 R + 2, Y + 2 R + 2, Z + 2 R + 2)`` for patches of radius ``R``.
        weights: of the squared differences by distance along one axis, ``R + 1``.
        exponents: ``(B, 6, X, Y, Z)``.
    """
    _, _, size_x, size_y, size_z = exponents.shape
    reach = len(weights)
    squares = np.empty((4, padded.shape[2] - 1, padded.shape[3] - 1), padded.dtype)
    column, rows = np.empty(padded.shape[3] - 1, padded.dtype), np.empty((5, size_z + 1), padded.dtype)
    for task in range(first, last):
        batch, x = task // size_x, task % size_x
        for n in range(4):  # along x one plane before and here, along y, along z
            centre, step_x = x + reach - (1 if n == 0 else 0), 1 if n < 2 else 0
            step_y, step_z = np.uintp(1 if n == 2 else 0), np.uintp(1 if n == 3 else 0)
            _square_differences(padded[batch], centre, step_x, step_y, step_z, weights, squares[n])
        for y in range(size_y):
            for n in range(5):  # along x before and here, along y before and here, along z
                centre = y + reach - (1 if n == 2 else 0)
                _sum_patches(squares[n if n < 3 else n - 1], centre, weights, column, rows[n])
            _write_exponents(rows, exponents[batch], x, y)


@compiled
def _square_differences(image: Any, x: Any, step_x: Any, step_y: Any, step_z: Any, weights: Any, out: Any) -> None:
    """Weighted sum along x of the squared differences to a neighbour, for one plane."""
    for y in range(len(out)):
        for z in range(out.shape[1]):
            out[y, z] = 0
        j = np.uintp(y) + step_y
        for distance in range(len(weights)):
            for sign in range(-1, 2, 2):
                if distance > 0 or sign > 0:
                    i, weight = x + sign * distance, weights[distance]
                    for z in range(out.shape[1]):
                        difference = image[i, y, z] - image[i + step_x, j, np.uintp(z) + step_z]
                        out[y, z] += weight * (difference * difference)


@compiled
def _sum_patches(plane: Any, y: Any, weights: Any, column: Any, row: Any) -> None:
    """Weighted sums along y, then z, for row ``y``; the result begins one voxel before the row's first."""
    reach = len(weights)
    for z in range(len(column)):
        column[z] = weights[0] * plane[y, z]
    for distance in range(1, reach):
        for z in range(len(column)):
            column[z] += weights[distance] * plane[y - distance, z]
            column[z] += weights[distance] * plane[y + distance, z]
    for z in range(len(row)):
        row[z] = weights[0] * column[np.uintp(z + reach - 1)]
    for distance in range(1, reach):
        before, after = np.uintp(reach - 1 - distance), np.uintp(reach - 1 + distance)
        for z in range(len(row)):
            row[z] += weights[distance] * column[before + np.uintp(z)]
            row[z] += weights[distance] * column[after + np.uintp(z)]


@compiled
def _write_exponents(rows: Any, exponents: Any, x: Any, y: Any) -> None:
    """The six distances of a row over their mean; ``rows`` hold those along x, y, and along z of both sides."""
    real = rows.dtype.type
    for z in range(exponents.shape[3]):
        k = np.uintp(z + 1)
        a, b, c, d, e, f = rows[0, k], rows[1, k], rows[2, k], rows[3, k], rows[4, z], rows[4, k]
        mean = (a + b + c + d + e + f) / real(6)
        scale = real(0) if mean <= real(1e-6) else real(-1) / mean
        exponents[0, x, y, z], exponents[1, x, y, z] = scale * a, scale * b
        exponents[2, x, y, z], exponents[3, x, y, z] = scale * c, scale * d
        exponents[4, x, y, z], exponents[5, x, y, z] = scale * e, scale * f
