"""What computes with vectors: compositions and inversions, upsampling for them, and weight gradients.

A register holds the components of two voxels, or a row of numbers: see ``vectors``. Compositions go
through all their fields one row at a time. Besides the results, memory is taken for one interleaved copy (4/3 of a
field) of each field that is looked up, and of each gradient that is added to.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitreg_lumir.deform.backends.cpu import (
    compositions,
    interleaved,
    inversion,
    spline_gradients,
    splines,
    tiles,
    upsampling,
)
from sitreg_lumir.deform.backends.cpu.arrays import array, by_voxel, empty, flat, planes, rows, run_tiles
from sitreg_lumir.deform.backends.cpu.threads import run
from sitreg_lumir.deform.bspline import Coefficients, Steps

_TASKS = 16  # a gradient is shared out among so many threads at most: by parts of the volume, or of the weights
_TILE_SUMS = 2**12  # tiles times outputs of a task, whose sums stay in a processor's own cache


def upsample_control_points(control_points: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """Control points (level voxels) -> field (full-resolution voxels) on a grid of ``shape``.

    Where copies are shared, the field is to be looked up: it lies in memory as its interleaved copy would.
    """
    batch, channels = control_points.shape[:2]
    if channels != 3 or getattr(_local, "shared", None) is None:
        return upsampling.upsample_control_points(control_points, factor, shape)
    copy = torch.empty(batch, *shape, 4, dtype=control_points.dtype)
    tables = (table for size in shape for table in upsampling.taps(size, factor, control_points.dtype))
    args = (array(control_points.flatten(0, 1)), factor, *tables, tuple(shape), copy.view(-1).numpy())
    run(interleaved.upsample_interleaved, batch * shape[0], *args)
    return copy[..., :3].movedim(-1, 1)


def invert(disp: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """The field ``v`` with ``v(x) = -u(clamp(x + v(x)))``, by fixed-point iteration.

    A voxel's iteration stops when none of its components moves by ``tolerance`` voxels or more.
    """
    if max_iterations < 1:
        return -disp
    shape, inverse = tuple(disp.shape[2:]), empty(disp)
    run(inversion.invert, planes(disp), shape, _interleaved([disp])[0], tolerance, max_iterations, flat(inverse))
    return inverse


def invert_adjoint(grad: Tensor, disp: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of :func:`invert` with respect to ``disp``: a 3x3 solve per voxel and one adjoint look-up."""
    shape, flat_inverse, copies = tuple(disp.shape[2:]), flat(inverse), _interleaved([disp])
    (target,) = _cleared(1, disp)
    args = (shape, flat(grad), copies[0], flat_inverse, target)
    run_tiles(inversion.scatter_invert, [flat_inverse], disp.shape, shape, True, 1, *args)
    del args, copies  # room for the result
    return _separated(target, disp)


def compose(disps: Sequence[Tensor]) -> Tensor:
    """The field of ``disps[0] o disps[1] o ...`` (last one first) on the grid; nothing is resampled between."""
    composed, shape = empty(disps[0]), tuple(disps[0].shape[2:])
    run(compositions.compose, rows(composed), shape, _interleaved(disps[:-1]), flat(disps[-1]), flat(composed))
    return composed


def compose_adjoint(grad: Tensor, disps: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of :func:`compose` with respect to each field, None where ``needed`` says so."""
    shape, inner, copies = tuple(grad.shape[2:]), flat(disps[-1]), _interleaved(disps[:-1])
    slots = np.where(needed, np.cumsum(needed) - 1, -1)
    targets = _cleared(sum(map(bool, needed[:-1])), grad)
    grad_inner = empty(grad) if needed[-1] else grad.new_empty(0)
    args = (shape, flat(grad), copies, inner, targets, slots, flat(grad_inner))
    fields = [inner, *(flat(disp) for disp in disps[-2:0:-1])]
    run_tiles(compositions.scatter_compose, fields, grad.shape, shape, True, 1, *args)
    del args, copies  # room for the results
    grads = [_separated(targets[slot], grad) if slot >= 0 else None for slot in slots[:-1]]
    return [*grads, grad_inner if needed[-1] else None]


def move_points(
    points: Tensor, steps: Steps, coefficients: Coefficients, jacobians: bool, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor | None, bool]:
    """Points ``(3, N)`` through continuous updates: see :mod:`sitreg_lumir.deform.splines`."""
    count = points.shape[1]
    moved, derivatives = torch.empty_like(points), torch.empty(9, count if jacobians else 0, dtype=torch.float64)
    unsettled = np.zeros(count, np.bool_)
    args = *_step_arrays(steps), *_layout(coefficients), tolerance, max_iterations
    arrays = moved.numpy(), derivatives.numpy(), unsettled
    run(splines.move_points, -(-count // splines.POINTS), points.contiguous().numpy(), *args, *arrays)
    return moved, derivatives.view(3, 3, count) if jacobians else None, not bool(unsettled.any())


def trace_points(
    points: Tensor, steps: Steps, coefficients: Coefficients, tolerance: float, max_iterations: int, path: Tensor
) -> tuple[Tensor, bool]:
    """Follows points ``(3, N)`` through a chain of continuous updates: see ``torch.splines``."""
    count = points.shape[1]
    tasks, unsettled = -(-count // splines.POINTS), np.zeros(count, np.bool_)
    args = *_step_arrays(steps), *_layout(coefficients), tolerance, max_iterations
    run(spline_gradients.trace_points, tasks, points.numpy(), *args, path.numpy(), unsettled)
    return path, not bool(unsettled.any())


def trace_points_adjoint(
    grad: Tensor, points: Tensor, steps: Steps, coefficients: Coefficients, path: Tensor, needed: Sequence[bool]
) -> Tensor:
    """Gradient of where points end with respect to the coefficients: see ``torch.splines``."""
    tasks, result = -(-points.shape[1] // splines.POINTS), torch.zeros_like(coefficients.flat)
    args = *_step_arrays(steps), np.array(needed), *_layout(coefficients), result.numpy()
    boxes, colours = np.empty((tasks, 3, 2)), np.empty(tasks, np.int64)
    run(spline_gradients.find_boxes, tasks, points.numpy(), path.numpy(), boxes)
    margin = 2.0 * max(factor for factor, need in zip(coefficients.factors, needed, strict=True) if need)
    spline_gradients.colour_boxes(boxes, margin, colours)
    for colour in range(int(colours.max()) + 1):
        members = np.flatnonzero(colours == colour)
        arrays = members, grad.double().contiguous().numpy(), points.numpy(), path.numpy()
        run(spline_gradients.trace_points_adjoint, len(members), *arrays, *args)
    return result


def _step_arrays(steps: Steps) -> tuple[Any, Any]:
    """Which update each step applies, and whether its inverse."""
    return np.array([index for index, _ in steps], np.int64), np.array([inverted for _, inverted in steps], np.bool_)


def _layout(coefficients: Coefficients) -> tuple[Any, ...]:
    """Control points, where each update's begin, their grids' sizes and spacings, and the full-resolution grid."""
    flat, sizes, factors, shape = coefficients
    starts = np.cumsum([0, *(4 * prod(size) for size in sizes[:-1])])
    return flat.numpy(), starts, np.array(sizes), np.array(factors, np.float64), np.array(shape)


def weight_gradient(values: Tensor, grad: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Gradient of a convolution with respect to its weight: see ``layers``."""
    planes, outputs = len(grad) * grad.shape[2], grad.shape[1]
    channels, kernel = values.shape[1], weight.shape[2]
    all_tiles = tiles.tiles_of_windows(kernel, channels, values.element_size())
    of_task = min(all_tiles, max(1, _TILE_SUMS // outputs))
    tasks = -(-all_tiles // of_task)
    length = -(-planes // min(planes, -(-_TASKS // tasks)))
    totals = torch.zeros(-(-planes // length), outputs, kernel**3 * channels, dtype=torch.float64)
    sizes = kernel, stride, padding, length, of_task
    run(tiles.weight_gradient, len(totals) * tasks, by_voxel(values), by_voxel(grad), *sizes, totals.numpy())
    by_window = (totals[0] if len(totals) == 1 else totals.sum(0)).view(outputs, kernel, kernel, kernel, channels)
    return by_window.movedim(-1, 1).to(weight.dtype, memory_format=torch.contiguous_format)


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
_KEPT = 2  # copies, as many as a composition needs at once


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
        if len(copy) == 4 * field[:, 0].numel() and copy.dtype == flat(field[:0]).dtype:
            return copy
    return _new_copies(1, field)[0]


def _identity(field: Tensor) -> tuple[Any, ...]:
    return field.data_ptr(), tuple(field.shape), field.stride(), field.dtype


def _interleave(field: Tensor, copy: Any) -> Any:
    run(interleaved.interleave, planes(field), tuple(field.shape[2:]), flat(field), copy)
    return copy


def _cleared(count: int, like: Tensor) -> Any:
    """Interleaved fields of zeros, as rows of one array."""
    copies = _new_copies(count, like)
    for copy in copies:
        run(interleaved.clear, planes(like), tuple(like.shape[2:]), copy)
    return copies


def _separated(copy: Any, like: Tensor) -> Tensor:
    """The field of an interleaved copy."""
    field = empty(like)
    run(interleaved.separate, planes(field), tuple(field.shape[2:]), copy, flat(field))
    return field


def _new_copies(count: int, like: Tensor) -> Any:
    return torch.empty(count, 4 * like[:, 0].numel(), dtype=like.dtype).numpy()
