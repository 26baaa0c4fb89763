"""Every operation on deformations and its adjoint in compiled CPU loops: same results as ``torch_backend``, faster.

Fields are ``(B, 3, X, Y, Z)``, voxels; float32 or float64, any layout. The loops go through whole chains of look-ups
one row at a time. Besides the results, memory is taken for one interleaved copy (4/3 of a field) of each field that
is looked up, and of each gradient that is added to. Results do not depend on the number of threads.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitreg_lumir.deform.bspline import upsampling_matrix
from sitreg_lumir.deform.cpu import chains, features, grids, interleaved, inversion, lookups, scatter, splines
from sitreg_lumir.deform.cpu.images import correlation as correlation
from sitreg_lumir.deform.cpu.images import diffusion as diffusion
from sitreg_lumir.deform.cpu.images import diffusion_adjoint as diffusion_adjoint
from sitreg_lumir.deform.cpu.images import folded_map as folded_map
from sitreg_lumir.deform.cpu.images import folding as folding
from sitreg_lumir.deform.cpu.images import mind as mind
from sitreg_lumir.deform.cpu.threads import run

_CHANNELS_PER_TASK = 8


def interpolate(values: Tensor, points: Tensor) -> Tensor:
    """``values`` at ``points``: ``(B, C, X, Y, Z)``, ``(B, 3, I, J, K)`` in voxels -> ``(B, C, I, J, K)``."""
    return _lookup(values, points.expand(len(values), *(-1,) * 4), relative=False)


def interpolate_adjoint(
    grad: Tensor, values: Tensor, points: Tensor, need_values: bool = True, need_points: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`interpolate` with respect to ``values`` and to ``points`` (None where not needed)."""
    points = points.expand(len(values), *(-1,) * 4)
    return _lookup_adjoint(grad, values, points, False, need_values, need_points)


def mask_at(mask: Tensor, points: Tensor, relative: bool) -> Tensor:
    """Where ``mask`` (bool), trilinear with zeros outside, is at least 1 - 1e-3 at ``points``; bool ``(B, 1, ...)``."""
    points = points.expand(len(mask), *(-1,) * 4)
    shape, grid = tuple(mask.shape[2:]), tuple(points.shape[2:])
    kept = torch.empty(len(mask), 1, *grid, dtype=torch.bool)
    args = (shape, _flat(mask.view(torch.int8)), _flat(points), grid, relative, _flat(kept))
    run(lookups.hits, _rows(points), *args)
    return kept


def upsample_control_points(control_points: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """Control points (level voxels) -> field (full-resolution voxels) on a grid of ``shape``."""
    batch, channels = control_points.shape[:2]
    taps = [array for size in shape for array in _taps(size, factor, control_points.dtype)]
    source = _array(control_points.flatten(0, 1))
    if channels == 3 and getattr(_local, "shared", None) is not None:  # it is to be looked up: interleaved at once
        copy = torch.empty(batch, *shape, 4, dtype=control_points.dtype)
        args = (source, factor, *taps, tuple(shape), copy.view(-1).numpy())
        run(grids.upsample_interleaved, batch * shape[0], *args)
        return copy[..., :3].movedim(-1, 1)
    field = control_points.new_empty(batch * channels, *shape)
    run(grids.upsample, batch * channels * shape[0], source, factor, *taps, _array(field))
    return field.view(batch, channels, *shape)


def upsample_control_points_adjoint(grad: Tensor, factor: int) -> Tensor:
    """Gradient of :func:`upsample_control_points` with respect to the control points."""
    batch, channels, *shape = grad.shape
    taps_x, taps_y, taps_z = (_taps(size, factor, grad.dtype) for size in shape)
    level = [-(-size // factor) for size in shape]
    planes = grad.new_empty(batch * channels, shape[0], *level[1:])
    run(
        grids.reduce_planes,
        batch * channels * shape[0],
        _array(grad.flatten(0, 1)),
        *taps_y,
        *taps_z,
        _array(planes),
    )
    result = grad.new_empty(batch * channels, *level)
    run(grids.reduce_volumes, batch * channels * level[0], _array(planes), factor, *taps_x, _array(result))
    return result.view(batch, channels, *level)


@lru_cache(maxsize=64)
def _taps(size: int, factor: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """``(size, 4)`` indices of the control points each sample of one axis depends on, and their weights."""
    matrix = upsampling_matrix(size, factor, dtype, torch.device("cpu")).numpy()
    first = np.minimum((matrix != 0).argmax(axis=1), max(matrix.shape[1] - 4, 0))
    index = first[:, None] + np.arange(4)
    exists = index < matrix.shape[1]
    index = np.minimum(index, matrix.shape[1] - 1)
    weights = np.where(exists, np.take_along_axis(matrix, index, axis=1), 0).astype(matrix.dtype)
    return index, weights


def invert(disp: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """The field ``v`` with ``v(x) = -u(clamp(x + v(x)))``, by fixed-point iteration.

    A voxel's iteration stops when none of its components moves by ``tolerance`` voxels or more.
    """
    if max_iterations < 1:
        return -disp
    shape, inverse = tuple(disp.shape[2:]), _empty(disp)
    run(inversion.invert, _planes(disp), shape, _interleaved([disp])[0], tolerance, max_iterations, _flat(inverse))
    return inverse


def invert_adjoint(grad: Tensor, disp: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of :func:`invert` with respect to ``disp``: a 3x3 solve per voxel and one adjoint look-up."""
    shape, flat_inverse, copies = tuple(disp.shape[2:]), _flat(inverse), _interleaved([disp])
    (target,) = _cleared(1, disp)
    args = (shape, _flat(grad), copies[0], flat_inverse, target)
    _run_tiles(inversion.scatter_invert, [flat_inverse], disp.shape, shape, True, 1, *args)
    del args, copies  # room for the result
    return _separated(target, disp)


def compose(disps: Sequence[Tensor]) -> Tensor:
    """The field of ``disps[0] o disps[1] o ...`` (last one first) on the grid; nothing is resampled between."""
    composed, shape = _empty(disps[0]), tuple(disps[0].shape[2:])
    run(chains.compose, _rows(composed), shape, _interleaved(disps[:-1]), _flat(disps[-1]), _flat(composed))
    return composed


def compose_adjoint(grad: Tensor, disps: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of :func:`compose` with respect to each field, None where ``needed`` says so."""
    shape, inner, copies = tuple(grad.shape[2:]), _flat(disps[-1]), _interleaved(disps[:-1])
    slots = np.where(needed, np.cumsum(needed) - 1, -1)
    targets = _cleared(sum(map(bool, needed[:-1])), grad)
    grad_inner = _empty(grad) if needed[-1] else grad.new_empty(0)
    args = (shape, _flat(grad), copies, inner, targets, slots, _flat(grad_inner))
    chain = [inner, *(_flat(disp) for disp in disps[-2:0:-1])]
    _run_tiles(chains.scatter_compose, chain, grad.shape, shape, True, 1, *args)
    del args, copies  # room for the results
    grads = [_separated(targets[slot], grad) if slot >= 0 else None for slot in slots[:-1]]
    return [*grads, grad_inner if needed[-1] else None]


@contextmanager
def copies_shared() -> Iterator[None]:
    """Within the block, in this thread, a field that is looked up several times is interleaved once.

    Fields that are looked up must not be changed within the block; the last two are kept, with their copies. Control
    points are upsampled to interleaved fields at once.
    """
    before, _local.shared = getattr(_local, "shared", None), OrderedDict()
    try:
        yield
    finally:
        _local.shared = before


_local = threading.local()
_KEPT = 2  # copies, as many as a chain needs at once


def _interleaved(fields: Sequence[Tensor]) -> tuple[Any, ...]:
    """Interleaved copies of fields, or what they look at if they are interleaved already."""
    shared = getattr(_local, "shared", None)
    copies: dict[Any, Any] = {}
    for field in fields:
        key = _identity(field)
        if _is_interleaved(field):
            copies[key] = field.detach().movedim(1, -1).as_strided((4 * field[:, 0].numel(),), (1,)).numpy()
        elif shared is None:
            copies[key] = _interleave(field, _new_copies(1, field)[0])
        else:
            if key not in shared:
                shared[key] = (field, _interleave(field, _spare_copy(field, shared, copies)))
            shared.move_to_end(key)
            copies[key] = shared[key][1]
    return tuple(copies[_identity(field)] for field in fields)


def _is_interleaved(field: Tensor) -> bool:
    """Whether a field lies in memory as an interleaved copy does: see :func:`upsample_control_points`."""
    _, _, x, y, z = field.shape
    return field.stride() == (4 * x * y * z, 1, 4 * y * z, 4 * z, 4)


def _spare_copy(field: Tensor, shared: Any, used: Any) -> Any:
    """Memory for a field's copy: that of the field which was looked up longest ago, if so many are kept already."""
    oldest = next((key for key in shared if key not in used), None)
    if len(shared) >= _KEPT and oldest is not None:
        copy = shared.pop(oldest)[1]
        if len(copy) == 4 * field[:, 0].numel() and copy.dtype == _flat(field[:0]).dtype:
            return copy
    return _new_copies(1, field)[0]


def _identity(field: Tensor) -> tuple[Any, ...]:
    return field.data_ptr(), tuple(field.shape), field.stride(), field.dtype


def _interleave(field: Tensor, copy: Any) -> Any:
    run(interleaved.interleave, _planes(field), tuple(field.shape[2:]), _flat(field), copy)
    return copy


def _cleared(count: int, like: Tensor) -> Any:
    """Interleaved fields of zeros, as rows of one array."""
    copies = _new_copies(count, like)
    for copy in copies:
        run(interleaved.clear, _planes(like), tuple(like.shape[2:]), copy)
    return copies


def _separated(copy: Any, like: Tensor) -> Tensor:
    """The field of an interleaved copy."""
    field = _empty(like)
    run(interleaved.separate, _planes(field), tuple(field.shape[2:]), copy, _flat(field))
    return field


def _new_copies(count: int, like: Tensor) -> Any:
    return torch.empty(count, 4 * like[:, 0].numel(), dtype=like.dtype).numpy()


def warp(values: Tensor, disp: Tensor, factor: int) -> Tensor:
    """``values`` of the level with spacing ``factor``, pulled through the full-resolution field ``disp``."""
    if factor == 1:
        return _lookup(values, disp, relative=True)
    return _lookup(values, _level_points(disp, factor, values), relative=False)


def warp_adjoint(
    grad: Tensor, values: Tensor, disp: Tensor, factor: int, need_values: bool, need_disp: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`warp` with respect to ``values`` and ``disp`` (None where not needed)."""
    if factor == 1:
        return _lookup_adjoint(grad, values, disp, True, need_values, need_disp)
    points = _level_points(disp, factor, values)
    grad_values, grad_points = _lookup_adjoint(grad, values, points, False, need_values, need_disp)
    if grad_points is None:
        return grad_values, None
    grad_disp = _zeros(disp)
    tasks = len(disp) * values.shape[2]
    run(grids.level_points_adjoint, tasks, _array(grad_points), factor, _array(grad_disp))
    return grad_values, grad_disp


def _level_points(disp: Tensor, factor: int, values: Tensor) -> Tensor:
    points = disp.new_empty(len(disp), 3, *values.shape[2:])
    run(grids.level_points, len(disp) * values.shape[2], _array(disp), factor, _array(points))
    return points


def _lookup(values: Tensor, points: Tensor, relative: bool) -> Tensor:
    """``values`` at ``points``, which count from their own grid index if they are ``relative``; in the same layout."""
    channels, shape, grid = values.shape[1], tuple(values.shape[2:]), tuple(points.shape[2:])
    last = _channels_are_last(values)
    out = _new_values(values, grid, last)
    args = (shape, _flat(values, last), channels, _flat(points), grid, relative, _flat(out, last))
    run((features if last else lookups).lookup, _rows(points), *args)
    return out


def _lookup_adjoint(
    grad: Tensor, values: Tensor, points: Tensor, relative: bool, need_values: bool, need_points: bool
) -> tuple[Tensor | None, Tensor | None]:
    channels, shape, grid = values.shape[1], tuple(values.shape[2:]), tuple(points.shape[2:])
    last = _channels_are_last(values)
    flat_grad, flat_points = _flat(grad, last), _flat(points)
    grad_values = grad_points = None
    if need_values:
        grad_values = _new_values(values, shape, last).zero_()
        target = _flat(grad_values, last)
        rest = (flat_points, grid, relative, flat_grad, target)
        if last:
            _run_tiles(features.scatter_lookup, [flat_points], points.shape, shape, relative, 1, shape, channels, *rest)
        else:
            parts = -(-channels // _CHANNELS_PER_TASK)
            _run_tiles(
                scatter.scatter_lookup, [flat_points], points.shape, shape, relative, parts,
                shape, channels, parts, *rest,
            )  # fmt: skip
    if need_points:
        grad_points = _empty(points)
        run(
            (features if last else lookups).lookup_slopes, _rows(points),
            shape, _flat(values, last), channels, flat_points, grid, relative, flat_grad, _flat(grad_points),
        )  # fmt: skip
    return grad_values, grad_points


def _channels_are_last(values: Tensor) -> bool:
    """Whether a feature map has its channels innermost, so that it need not be copied to be read that way."""
    return not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last_3d)


def _new_values(like: Tensor, shape: tuple[int, ...], last: bool) -> Tensor:
    """An empty feature map on a grid of ``shape``."""
    layout = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty((*like.shape[:2], *shape), dtype=like.dtype, memory_format=layout)


def _run_tiles(
    loop: Callable[..., None], chain: Sequence[Any], grid: Sequence[int], shape: tuple[int, ...], relative: bool,
    parts: int, *args: Any,
) -> None:  # fmt: skip
    """Runs a loop over all tiles of the points' grid ``(B, 3, I, J, K)``, ``parts`` tasks each, colour by colour.

    ``chain`` are the fields that lead to the places added to, on grids of ``shape``, the first applied first.
    """
    batch, _, *axes = grid
    tiles = batch * prod(-(-size // scatter.TILE) for size in axes[:2])
    extrema = np.empty((len(chain), tiles, 4))
    for field, row in zip(chain, extrema, strict=True):
        run(scatter.tile_extrema, tiles, tuple(axes), field, row)
    colours = scatter.colour_tiles(shape, tuple(axes), relative, extrema)
    for colour in range(int(colours.max()) + 1):
        members = np.flatnonzero(colours == colour)
        run(loop, len(members) * parts, members, *args)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def _flat(tensor: Tensor, channels_last: bool = False) -> Any:
    tensor = tensor.detach()
    if channels_last:
        tensor = tensor.contiguous(memory_format=torch.channels_last_3d).movedim(1, -1)
    return tensor.contiguous().view(-1).numpy()


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype)


def _planes(field: Tensor) -> int:
    """Number of planes along the first axis, over the batch."""
    return len(field) * field.shape[2]


def _rows(field: Tensor) -> int:
    """Number of rows along the last axis, over the batch."""
    return len(field) * field.shape[2] * field.shape[3]


def move_points(
    points: Tensor, chain: Sequence[tuple[int, bool]], coefficients: Tensor, sizes: Sequence[tuple[int, int, int]],
    factors: Sequence[int], shape: Sequence[int], jacobians: bool, tolerance: float, max_iterations: int,
) -> tuple[Tensor, Tensor | None, bool]:  # fmt: skip
    """See :meth:`~sitreg_lumir.deform.splines.SplineUpdates.move`; also tells whether all inversions converged."""
    count = points.shape[1]
    starts = np.cumsum([0, *(4 * prod(size) for size in sizes[:-1])])
    moved, derivatives = torch.empty_like(points), torch.empty(9, count if jacobians else 0, dtype=torch.float64)
    unsettled = np.zeros(count, np.bool_)
    steps = np.array([index for index, _ in chain]), np.array([inverted for _, inverted in chain])
    run(
        splines.move_points, -(-count // splines.POINTS), points.contiguous().numpy(), *steps, coefficients.numpy(),
        starts, np.array(sizes), np.array(factors, np.float64), np.array(shape), tolerance, max_iterations,
        moved.numpy(), derivatives.numpy(), unsettled,
    )  # fmt: skip
    return moved, derivatives.view(3, 3, count) if jacobians else None, not bool(unsettled.any())
