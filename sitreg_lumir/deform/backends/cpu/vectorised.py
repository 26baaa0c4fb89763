"""Chains of look-ups and inversions with the components of two voxels in one register: see ``vectors``.

The loops go through whole chains of look-ups one row at a time. Besides the results, memory is taken for one
interleaved copy (4/3 of a field) of each field that is looked up, and of each gradient that is added to.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitreg_lumir.deform.backends.cpu import chains, interleaved, inversion
from sitreg_lumir.deform.backends.cpu.arrays import empty, flat, planes, rows, run_tiles
from sitreg_lumir.deform.backends.cpu.threads import run


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
    run(chains.compose, rows(composed), shape, _interleaved(disps[:-1]), flat(disps[-1]), flat(composed))
    return composed


def compose_adjoint(grad: Tensor, disps: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of :func:`compose` with respect to each field, None where ``needed`` says so."""
    shape, inner, copies = tuple(grad.shape[2:]), flat(disps[-1]), _interleaved(disps[:-1])
    slots = np.where(needed, np.cumsum(needed) - 1, -1)
    targets = _cleared(sum(map(bool, needed[:-1])), grad)
    grad_inner = empty(grad) if needed[-1] else grad.new_empty(0)
    args = (shape, flat(grad), copies, inner, targets, slots, flat(grad_inner))
    chain = [inner, *(flat(disp) for disp in disps[-2:0:-1])]
    run_tiles(chains.scatter_compose, chain, grad.shape, shape, True, 1, *args)
    del args, copies  # room for the results
    grads = [_separated(targets[slot], grad) if slot >= 0 else None for slot in slots[:-1]]
    return [*grads, grad_inner if needed[-1] else None]


@contextmanager
def copies_shared() -> Iterator[None]:
    """Within the block, in this thread, a field that is looked up several times is interleaved once.

    Fields that are looked up must not be changed within the block; the last three are kept, with their copies.
    """
    before, _local.shared = getattr(_local, "shared", None), OrderedDict()
    try:
        yield
    finally:
        _local.shared = before


_local = threading.local()
_KEPT = 3  # copies: a chain needs two at once


def _interleaved(fields: Sequence[Tensor]) -> tuple[Any, ...]:
    """Interleaved copies of fields."""
    shared = getattr(_local, "shared", None)
    if shared is None:
        return tuple(_interleave(field, _new_copies(1, field)[0]) for field in fields)
    copies: dict[Any, Any] = {}
    for field in fields:
        key = _identity(field)
        if key not in shared:
            spare = None
            oldest = next((other for other in shared if other not in copies), None)
            if len(shared) >= _KEPT and oldest is not None:
                spare = shared.pop(oldest)[1]
            room = 4 * field[:, 0].numel()
            fits = spare is not None and len(spare) == room and spare.dtype == flat(field[:0]).dtype
            shared[key] = (field, _interleave(field, spare if fits else _new_copies(1, field)[0]))
        shared.move_to_end(key)
        copies[key] = shared[key][1]
    return tuple(copies[_identity(field)] for field in fields)


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
