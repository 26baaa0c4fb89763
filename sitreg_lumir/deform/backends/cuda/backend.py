"""Every operation on deformations and its adjoint in Triton kernels: same results as ``torch_backend``, for GPUs.

Fields are ``(B, 3, X, Y, Z)``, voxels, float32; values may be in half precision, and of any layout. Kernels are queued
on the current stream of the tensors' device, and nothing waits for them. What many voxels add to one place is added
by atomic operations: gradients may differ in their last bits from run to run.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from sitreg_lumir.deform.backends.cuda import grids, lookups, scatter, splines, warps
from sitreg_lumir.deform.backends.cuda.images import diffusion as diffusion
from sitreg_lumir.deform.backends.cuda.images import diffusion_adjoint as diffusion_adjoint
from sitreg_lumir.deform.backends.cuda.images import lncc_and_gradients as lncc_and_gradients
from sitreg_lumir.deform.backends.cuda.images import mind as mind
from sitreg_lumir.deform.backends.cuda.images import ndv_map as ndv_map
from sitreg_lumir.deform.backends.cuda.images import ndv_sum_and_gradient as ndv_sum_and_gradient
from sitreg_lumir.deform.backends.cuda.launch import blocks, launch
from sitreg_lumir.deform.backends.torch.splines import trace_points as trace_points
from sitreg_lumir.deform.backends.torch.splines import trace_points_adjoint as trace_points_adjoint
from sitreg_lumir.deform.bspline import Coefficients, Steps, upsampling_matrix

NAME = "cuda"
_BLOCK = 128  # lanes of a program, one for each thread of four warps
_PROGRAMS = 2048  # so many keep a large GPU busy; where points make fewer, programs share the channels


def copies_shared() -> AbstractContextManager[None]:
    """Nothing to do: the kernels read fields as they are."""
    return nullcontext()


def interpolate(values: Tensor, points: Tensor) -> Tensor:
    """``values`` at ``points``: ``(B, C, X, Y, Z)``, ``(B, 3, I, J, K)`` in voxels -> ``(B, C, I, J, K)``."""
    return _lookup(values, points, points.shape[2:], "absolute", 1)


def interpolate_adjoint(
    grad: Tensor, values: Tensor, points: Tensor, need_values: bool = True, need_points: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`interpolate` with respect to ``values`` and to ``points`` (None where not needed)."""
    return _lookup_adjoint(grad, values, points, "absolute", 1, need_values, need_points)


def mask_at(mask: Tensor, points: Tensor, relative: bool) -> Tensor:
    """Where ``mask`` (bool), trilinear with zeros outside, is at least 1 - 1e-3 at ``points``; bool ``(B, 1, ...)``."""
    grid = points.shape[2:]
    kept = torch.empty(len(mask), 1, *grid, dtype=torch.bool, device=mask.device)
    fields = (mask.contiguous().view(torch.int8), points.contiguous(), kept.view(torch.int8))
    args = (*fields, *mask.shape[2:], *grid, _batch_stride(points))
    mode = "relative" if relative else "absolute"
    launch(warps.inside_mask, (blocks(grid, _BLOCK), len(mask)), mask, *args, mode=mode, block=_BLOCK)
    return kept


def upsample_control_points(control_points: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """Control points (level voxels) -> field (full-resolution voxels) on a grid of ``shape``."""
    field = control_points
    for axis in (2, 1, 0):
        field = _multiply_axis(field, axis, shape[axis], factor, adjoint=False, scale=1.0 if axis else float(factor))
    return field


def upsample_control_points_adjoint(grad: Tensor, factor: int) -> Tensor:
    """Gradient of :func:`upsample_control_points` with respect to the control points."""
    for axis, size in enumerate(grad.shape[2:]):
        grad = _multiply_axis(grad, axis, size, factor, adjoint=True, scale=1.0 if axis else float(factor))
    return grad


def _multiply_axis(field: Tensor, axis: int, full: int, factor: int, adjoint: bool, scale: float) -> Tensor:
    """One spatial axis, ``full`` long at full resolution, times the upsampling matrix, or its transpose."""
    batch, channels, *shape = field.shape
    first, weights = _bands(full, factor, adjoint, field.device)
    before, after = shape[axis], len(weights)
    outer, inner = prod(shape[:axis]), prod(shape[axis + 1 :])
    shape[axis] = after
    out = field.new_empty(batch, channels, *shape)
    grid = (blocks(shape, _BLOCK), batch * channels)
    sizes = (before, after, inner, outer, weights.shape[1])
    launch(grids.multiply_axis, grid, field, field.contiguous(), first, weights, out, *sizes, scale, block=_BLOCK)
    return out


@lru_cache(maxsize=256)
def _bands(full: int, factor: int, adjoint: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The upsampling matrix of one axis, or its transpose, by rows: first column that counts, weights from there."""
    matrix = upsampling_matrix(full, factor, torch.float32, torch.device("cpu")).numpy()
    matrix = matrix.T if adjoint else matrix
    first = (matrix != 0).argmax(axis=1)
    last = matrix.shape[1] - 1 - (matrix[:, ::-1] != 0).argmax(axis=1)
    width = int((last - first).max()) + 1
    first = np.minimum(first, matrix.shape[1] - width)
    weights = np.take_along_axis(matrix, first[:, None] + np.arange(width), axis=1)
    return torch.from_numpy(first.astype(np.int32)).to(device), torch.from_numpy(weights.copy()).to(device)


def invert(disp: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """The field ``v`` with ``v(x) = -u(clamp(x + v(x)))``, by Newton's method and fixed-point iteration.

    A voxel's iteration stops when none of its components moves by ``tolerance`` voxels or more.
    """
    inverse = _empty(disp)
    args = (disp.contiguous(), inverse, *disp.shape[2:], float(tolerance), max_iterations)
    launch(lookups.invert, _grid(disp), disp, *args, block=_BLOCK)
    return inverse


def invert_adjoint(grad: Tensor, disp: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of :func:`invert` with respect to ``disp``: a 3x3 solve per voxel and one adjoint look-up."""
    grad_disp = _zeros(disp)
    args = (grad.contiguous(), disp.contiguous(), inverse.contiguous(), grad_disp, *disp.shape[2:])
    launch(scatter.scatter_invert, _grid(disp), disp, *args, block=_BLOCK)
    return grad_disp


def compose(disps: Sequence[Tensor]) -> Tensor:
    """The field of ``disps[0] o disps[1] o ...`` (last one first) on the grid; nothing is resampled between."""
    composed = _empty(disps[0])
    fields = tuple(disp.contiguous() for disp in disps)
    args = (fields, composed, *composed.shape[2:])
    launch(lookups.compose, _grid(composed), composed, *args, length=len(disps), block=_BLOCK)
    return composed


def compose_adjoint(grad: Tensor, disps: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of :func:`compose` with respect to each field, None where ``needed`` says so."""
    grads = [_zeros(grad) if need else None for need in needed[:-1]]
    grads.append(_empty(grad) if needed[-1] else None)
    fields = tuple(disp.contiguous() for disp in disps)
    targets = tuple(field if target is None else target for field, target in zip(fields, grads, strict=True))
    bits = sum(1 << number for number, need in enumerate(needed) if need)
    args = (grad.contiguous(), fields, targets, *grad.shape[2:])
    launch(scatter.scatter_compose, _grid(grad), grad, *args, length=len(disps), needed=bits, block=_BLOCK)
    return grads


def move_points(
    points: Tensor, steps: Steps, coefficients: Coefficients, jacobians: bool, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor | None, bool]:
    """Points ``(3, N)`` through a sequence of continuous updates: see :mod:`sitreg_lumir.deform.splines`."""
    flat, sizes, factors, shape = coefficients
    count, device = points.shape[1], flat.device
    moved = torch.empty(3, count, dtype=torch.float64, device=device)
    derivatives = torch.empty(9, count if jacobians else 0, device=device)
    unsettled = torch.zeros(count, dtype=torch.int8, device=device)
    if count:
        starts = np.cumsum([0, *(4 * prod(size) for size in sizes[:-1])])
        rows = [
            [int(starts[index]), sizes[index][1], sizes[index][2], factors[index], int(inverted)]
            for index, inverted in steps
        ]
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, splines.ENTRIES).to(device)
        tensors = points.to(device).contiguous(), table, flat, moved, derivatives, unsettled
        args = (*tensors, count, len(steps), *shape, float(tolerance), max_iterations)
        launch(
            splines.move_points,
            (blocks((count,), _BLOCK),),
            flat,
            *args,
            with_jacobians=jacobians,
            block=_BLOCK,
        )
    return moved, derivatives.double().view(3, 3, count) if jacobians else None, not bool(unsettled.any())


def warp(values: Tensor, disp: Tensor, factor: int) -> Tensor:
    """``values`` of the level with spacing ``factor``, pulled through the full-resolution field ``disp``."""
    return _lookup(values, disp, values.shape[2:], "relative" if factor == 1 else "level", factor)


def warp_adjoint(
    grad: Tensor, values: Tensor, disp: Tensor, factor: int, need_values: bool, need_disp: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`warp` with respect to ``values`` and ``disp`` (None where not needed)."""
    mode = "relative" if factor == 1 else "level"
    return _lookup_adjoint(grad, values, disp, mode, factor, need_values, need_disp)


def _lookup(values: Tensor, points: Tensor, grid: Sequence[int], mode: str, factor: int) -> Tensor:
    """``values`` at the points of a grid, in the memory format of ``values``."""
    batch, channels, *shape = values.shape
    layout = torch.channels_last_3d if _channels_last(values) else torch.contiguous_format
    out = torch.empty(batch, channels, *grid, dtype=values.dtype, device=values.device, memory_format=layout)
    programs, share, tile = _channel_programs(values, grid)
    args = (values, points.contiguous(), out, *shape, *grid, *points.shape[2:], factor, _batch_stride(points))
    launch(warps.lookup, programs, values, *args, channels, share, *values.stride(), *out.stride(), mode=mode, **tile)
    return out


def _lookup_adjoint(
    grad: Tensor, values: Tensor, points: Tensor, mode: str, factor: int, need_values: bool, need_points: bool
) -> tuple[Tensor | None, Tensor | None]:
    batch, channels, *shape = values.shape
    grad_values = torch.zeros_like(values, dtype=torch.float32) if need_values else None
    grad_points = None
    if need_points:
        new = points.new_zeros if mode == "level" else points.new_empty  # a field has voxels that no level voxel sees
        grad_points = new(batch, *points.shape[1:])
    to_values = values if grad_values is None else grad_values
    to_points = points if grad_points is None else grad_points
    programs, share, tile = _channel_programs(values, grad.shape[2:])
    if need_points:
        programs, share = (*programs[:2], 1), channels
    sizes = (*shape, *grad.shape[2:], *points.shape[2:], factor, _batch_stride(points), channels, share)
    strides = (*grad.stride(), *values.stride(), *to_values.stride())
    args = (grad, values, points.contiguous(), to_values, to_points, *sizes, *strides)
    needs = {"need_values": need_values, "need_points": need_points}
    launch(scatter.scatter_lookup, programs, values, *args, mode=mode, **needs, **tile)
    return (None if grad_values is None else grad_values.to(values.dtype)), grad_points


def _channel_programs(values: Tensor, grid: Sequence[int]) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """Programs for points on ``grid``, how many channels each does, and its tile of points and channels.

    Neighbouring lanes take what is next to each other in memory: channels in channels-last tensors, else points.
    """
    batch, channels = values.shape[:2]
    width = min(16, 1 << (channels - 1).bit_length()) if _channels_last(values) else 1
    block = _BLOCK // width
    rows, tiles = blocks(grid, block), -(-channels // width)
    parts = max(1, min(tiles, _PROGRAMS // max(1, rows * batch)))
    share = -(-tiles // parts) * width
    return (rows, batch, -(-channels // share)), share, {"block": block, "block_c": width}


def _channels_last(values: Tensor) -> bool:
    return values.shape[1] > 1 and values.stride(1) == 1


def _batch_stride(points: Tensor) -> int:
    """Distance between the batch's fields, 0 where one serves all."""
    return 0 if len(points) == 1 else points[0].numel()


def _grid(field: Tensor) -> tuple[int, int]:
    return blocks(field.shape[2:], _BLOCK), len(field)


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
