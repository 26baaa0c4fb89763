"""Compiled loop without vectors for the gradient of a convolution's weights, right for volumes of any size.

Volumes have their channels innermost in memory. Products are added up in the volumes' type along a few rows only, and
those sums in float64; which rows belong together depends on the shape alone, so the number of threads changes nothing.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.threads import compiled

BLOCK = 4  # outputs, and windows, that are multiplied at a time: their 16 numbers stay in the processor's registers
LONGEST = 1024  # so many products, or a row more, are added up in the volumes' type


@compiled
def weight_gradient(
    first: Any, last: Any, values: Any, grads: Any, kernel: Any, stride: Any, padding: Any, planes: Any, totals: Any
) -> None:
    """Per part, ``planes`` planes of the result, the sums of products of each output with each input of its window.

    Args:
        first: part to begin with; a volume has ``ceil(I / planes)`` parts.
        last: part to end before.
        values: what was convolved, ``(B, X, Y, Z, C)``.
        grads: with respect to the result, ``(B, I, J, K, N)``, in the same type.
        kernel: width of the window along each axis, voxels.
        stride: of the windows, voxels.
        padding: zeros before and behind each axis, voxels.
        planes: of a part.
        totals: ``(parts, N, kernel^3 * C)``, float64; windows are ordered by z, x, y, channel.
    """
    _, size_i, size_j, size_k, outputs = grads.shape
    parts = (size_i + planes - 1) // planes
    channels = values.shape[4]
    column = kernel * kernel * channels  # what a window has at one z
    blocks = (outputs + BLOCK - 1) // BLOCK * BLOCK, (size_k + BLOCK - 1) // BLOCK * BLOCK
    rows = np.zeros((values.shape[3] + 2 * padding) * column, values.dtype)
    by_output = np.zeros(blocks, values.dtype)
    sums = np.zeros((kernel, blocks[0], kernel * column), values.dtype)
    for part in range(first, last):
        total, added = totals[part], 0
        total[:] = 0
        batch, i0 = part // parts, part % parts * planes
        for i in range(i0, min(i0 + planes, size_i)):
            gathered = -padding  # rows before this one are in place
            for j in range(size_j):
                y0 = j * stride - padding
                for y in range(max(y0, gathered), y0 + kernel):
                    _gather_rows(values[batch], i * stride - padding, y, kernel, padding, rows)
                gathered = y0 + kernel
                for k in range(size_k):
                    for n in range(outputs):
                        by_output[n, k] = grads[batch, i, j, k, n]
                turned = sums[(y0 + kernel) % kernel]
                for n in range(0, outputs, BLOCK):
                    for k in range(0, blocks[1], BLOCK):
                        _add_windows(rows, by_output, n, k, size_k - 1, stride * column, turned)
                added += size_k
                if added >= LONGEST:
                    _add_sums(sums, channels, total)
                    added = 0
        _add_sums(sums, channels, total)


@compiled
def _gather_rows(volume: Any, x0: Any, y: Any, kernel: Any, padding: Any, rows: Any) -> None:
    """Puts the rows at ``y`` into place ``y % kernel`` beside the others that windows cover; zeros outside."""
    size_x, size_y, size_z, channels = volume.shape
    column = kernel * kernel * channels
    for dx in range(kernel):
        x = x0 + dx
        inside = 0 <= x < size_x and 0 <= y < size_y
        to = padding * column + (dx * kernel + (y + kernel) % kernel) * channels
        for z in range(size_z):
            for channel in range(channels):
                rows[to + channel] = volume[x, y, z, channel] if inside else 0
            to += column


@compiled
def _add_sums(sums: Any, channels: Any, total: Any) -> None:
    """Adds sums to the total, where the rows of a window lie in their order again, and clears them."""
    kernel = len(sums)
    for turn in range(kernel):
        for n in range(len(total)):
            for start in range(0, sums.shape[2], kernel * channels):
                for dy in range(kernel):
                    of, to = start + (turn + dy) % kernel * channels, start + dy * channels
                    for channel in range(channels):
                        total[n, to + channel] += sums[turn, n, of + channel]
    sums[:] = 0


@compiled
def _add_windows(rows: Any, by_output: Any, n: Any, k: Any, last: Any, step: Any, sums: Any) -> None:
    """Adds the products of four outputs with the four windows that they belong to."""
    a0, a1, a2, a3 = by_output[n, k], by_output[n, k + 1], by_output[n, k + 2], by_output[n, k + 3]
    b0, b1, b2, b3 = by_output[n + 1, k], by_output[n + 1, k + 1], by_output[n + 1, k + 2], by_output[n + 1, k + 3]
    c0, c1, c2, c3 = by_output[n + 2, k], by_output[n + 2, k + 1], by_output[n + 2, k + 2], by_output[n + 2, k + 3]
    d0, d1, d2, d3 = by_output[n + 3, k], by_output[n + 3, k + 1], by_output[n + 3, k + 2], by_output[n + 3, k + 3]
    width = sums.shape[1]
    s0, s1 = k * step, min(k + 1, last) * step  # windows behind the last one count nothing
    s2, s3 = min(k + 2, last) * step, min(k + 3, last) * step
    v0, v1, v2, v3 = rows[s0 : s0 + width], rows[s1 : s1 + width], rows[s2 : s2 + width], rows[s3 : s3 + width]
    a, b, c, d = sums[n], sums[n + 1], sums[n + 2], sums[n + 3]
    for w in range(width):
        e0, e1, e2, e3 = v0[w], v1[w], v2[w], v3[w]
        a[w] += a0 * e0 + a1 * e1 + a2 * e2 + a3 * e3
        b[w] += b0 * e0 + b1 * e1 + b2 * e2 + b3 * e3
        c[w] += c0 * e0 + c1 * e1 + c2 * e2 + c3 * e3
        d[w] += d0 * e0 + d1 * e1 + d2 * e2 + d3 * e3
