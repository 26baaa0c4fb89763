"""Triton kernel between the grids of the pyramid: banded matrices along one axis, for the B-spline and its adjoint."""

import triton.language as tl

from sitreg_lumir.deform.backends.cuda.launch import compiled


@compiled
def multiply_axis(
    source: tl.tensor, first: tl.tensor, weights: tl.tensor, out: tl.tensor, size_in: int, size_out: int, inner: int,
    outer: int, width: int, scale: float, block: tl.constexpr,
) -> None:  # fmt: skip
    """``scale`` times a banded matrix along the middle axis: volumes ``(outer, in, inner)`` -> ``(outer, out, inner)``.

    Row ``n`` of the matrix is ``weights[n]``, ``width`` long, from column ``first[n]`` on. Nothing is added to what
    others write, so sums have a fixed order.
    """
    volume = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * block + tl.arange(0, block)
    exists = index < outer * size_out * inner
    plane, within = index // inner, index % inner
    row = plane % size_out
    start = (plane // size_out * size_in + tl.load(first + row, mask=exists, other=0)) * inner + within
    values = source + volume * outer * size_in * inner + start
    taps = weights + row * width
    total = tl.zeros([block], dtype=tl.float32)
    for tap in range(width):
        weight = tl.load(taps + tap, mask=exists, other=0.0)
        total += weight * tl.load(values, mask=exists, other=0.0)
        values += inner
    tl.store(out + volume * outer * size_out * inner + index, scale * total, mask=exists)
