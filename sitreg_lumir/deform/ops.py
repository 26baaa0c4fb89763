"""Operations on deformations: shape checks, gradients, and the choice of the backend.

Fields are ``(B, 3, X, Y, Z)``, voxels, channel = array axis; a field ``u`` stands for the map ``x + u(x)``.
Look-ups are trilinear with the look-up coordinate clamped to the volume, while positions may leave it.
The autograd Functions here are the only ones; they keep their inputs and recompute the rest. Half precision
is computed in float32 and given back in the input's dtype.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from importlib import import_module
from math import ceil
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sitreg_lumir.deform import cuda, torch_backend

BACKENDS = ("auto", "torch", "cpu", "cuda")
_forced: str | ModuleType = os.environ.get("SITREG_LUMIR_BACKEND", "auto")


@contextmanager
def use_backend(backend: str | ModuleType) -> Iterator[None]:
    """Forces a backend (``torch``, ``cpu``, ``cuda``) within the block; ``auto`` follows device and dtype.

    A module with the functions of the plain PyTorch backend is taken as it is, for all tensors. ``cuda`` takes float32
    alone, ``cpu`` tensors on the CPU alone; the rest is left to ``torch``. The environment variable
    ``SITREG_LUMIR_BACKEND`` does the same for a whole process.

    Examples:
        >>> image, disp = torch.rand(1, 1, 8, 10, 6), torch.rand(1, 3, 8, 10, 6)
        >>> with sitreg_lumir.use_backend("torch"):
        ...     warped = sitreg_lumir.warp(image, disp)
        >>> bool(torch.allclose(warped, sitreg_lumir.warp(image, disp), atol=1e-5))
        True
    """
    global _forced
    if isinstance(backend, str) and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or a module, got {backend!r}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def backend_of(tensor: Tensor) -> Any:
    """The module whose functions compute on this tensor.

    Raises:
        ValueError: there is no such backend, or ``cuda`` was asked for where Triton's kernels cannot run.
    """
    if isinstance(_forced, ModuleType):
        return _forced
    if _forced not in BACKENDS:
        raise ValueError(f"SITREG_LUMIR_BACKEND must be one of {', '.join(BACKENDS)}, got {_forced!r}")
    if _forced in ("auto", "cuda") and cuda.usable(tensor.device, asked=_forced == "cuda"):
        return import_module("sitreg_lumir.deform.cuda.backend") if tensor.dtype == torch.float32 else torch_backend
    if _forced in ("auto", "cpu") and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
        return import_module("sitreg_lumir.deform.cpu.backend")
    return torch_backend


def compiled_on_cpu(tensor: Tensor) -> bool:
    """Whether the compiled CPU loops are to compute on this tensor, among them those for bfloat16."""
    plain = torch.empty(0, dtype=torch.float32) if tensor.dtype == torch.bfloat16 else tensor
    return tensor.device.type == "cpu" and backend_of(plain).__name__.endswith(".cpu.backend")


def copies_shared(tensor: Tensor) -> AbstractContextManager[None]:
    """A block that changes no field which is looked up in it: the backend of ``tensor`` may keep copies of them."""
    if not compiled_on_cpu(tensor):
        return nullcontext()
    shared: AbstractContextManager[None] = backend_of(tensor).copies_shared()
    return shared


def in_float(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Outside autocast, half precision tensors in float32, the result in the first tensor's dtype."""

    @wraps(operation)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        half = any(isinstance(arg, Tensor) and arg.dtype in (torch.float16, torch.bfloat16) for arg in args)
        if half:
            args = tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)
        with torch.autocast(first.device.type, enabled=False):
            result = operation(*args, **kwargs)
        return result.to(first.dtype) if half else result

    return wrapped


@in_float
def upsample_control_points(control_points: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """The field of cubic B-spline control points, at full resolution (no prefilter: it also smooths).

    Args:
        control_points: ``(B, 3, ceil(X / factor), ...)``, voxels of their level.
        factor: spacing of the level in full-resolution voxels.
        shape: ``(X, Y, Z)`` of the full-resolution grid.

    Returns:
        ``(B, 3, X, Y, Z)``, full-resolution voxels.

    Raises:
        ValueError: the shapes do not belong together.
    """
    _check_field(control_points, "control_points")
    expected = tuple(ceil(size / factor) for size in shape)
    if tuple(control_points.shape[2:]) != expected:
        raise ValueError(
            f"control_points of factor {factor} on {tuple(shape)} must be {expected}, "
            f"got {tuple(control_points.shape[2:])}"
        )
    result: Tensor = _Upsample.apply(control_points, factor, tuple(shape))
    return result


@in_float
def invert(disp: Tensor, tolerance: float = 1e-2, max_iterations: int = 50) -> Tensor:
    """The inverse of ``x + disp(x)`` by fixed-point iteration, with the exact implicit gradient.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels; must be a contraction (control points within their bound).
        tolerance: the iteration ends when no voxel's inverse moves further than this, voxels.
        max_iterations: upper limit of look-ups.

    Returns:
        ``(B, 3, X, Y, Z)``, voxels.

    Source: Honkamaa & Marttinen, SITReg, Machine Learning for Biomedical Imaging 2024.
    """
    _check_field(disp, "disp")
    result: Tensor = _Invert.apply(disp, tolerance, max_iterations)
    return result


@in_float
def compose(*disps: Tensor) -> Tensor:
    """The field of ``disps[0] o disps[1] o ...``, the last one applied first, resampled once at the end.

    Args:
        disps: two or more fields ``(B, 3, X, Y, Z)``, voxels, on one grid.

    Returns:
        ``(B, 3, X, Y, Z)``, voxels, on the same grid.
    """
    if len(disps) < 2:
        raise ValueError(f"compose needs two fields or more, got {len(disps)}")
    for disp in disps:
        _check_field(disp, "disp")
        if disp.shape != disps[0].shape:
            raise ValueError(f"fields differ in shape: {tuple(disps[0].shape)} and {tuple(disp.shape)}")
    result: Tensor = _Compose.apply(*disps)
    return result


@in_float
def warp(values: Tensor, disp: Tensor, factor: int = 1) -> Tensor:
    """``values`` pulled through a field: ``warped(x) = values(x + disp(x))``, border values outside.

    Args:
        values: ``(B, C, ...)`` on the grid of ``disp`` (images), or on the level grid with spacing ``factor``
            (features), whose voxel ``k`` lies at ``factor * (k + 1/2) - 1/2``.
        disp: ``(B, 3, X, Y, Z)``, full-resolution voxels.
        factor: spacing of the level in full-resolution voxels.

    Returns:
        ``(B, C, ...)``, on the grid of ``values``.

    Examples:
        >>> image, disp = torch.arange(5.0).reshape(1, 1, 5, 1, 1), torch.zeros(1, 3, 5, 1, 1)
        >>> disp[:, 0] = 0.5
        >>> sitreg_lumir.warp(image, disp).flatten()
        tensor([0.5000, 1.5000, 2.5000, 3.5000, 4.0000])
    """
    _check_field(disp, "disp")
    expected = tuple(ceil(size / factor) for size in disp.shape[2:])
    if values.ndim != 5 or tuple(values.shape[2:]) != expected or len(values) != len(disp):
        raise ValueError(
            f"values must be ({len(disp)}, C, {', '.join(map(str, expected))}) for factor {factor}, "
            f"got {tuple(values.shape)}"
        )
    result: Tensor = _Warp.apply(values, disp, factor)
    return result


def warp_mask(mask: Tensor, disp: Tensor) -> Tensor:
    """Where a warped mask still holds: trilinear with zeros outside, kept from 1 - 1e-3 on; no gradient.

    Args:
        mask: ``(B, 1, X, Y, Z)``, bool or 0/1.
        disp: ``(B, 3, X, Y, Z)``, voxels.

    Returns:
        bool ``(B, 1, X, Y, Z)``.
    """
    _check_field(disp, "disp")
    return mask_at(mask, disp, relative=True)


@torch.no_grad()
def mask_at(mask: Tensor, points: Tensor, relative: bool = False) -> Tensor:
    """:func:`warp_mask` at ``points`` ``(B, 3, X, Y, Z)``, voxels, instead of through a field.

    ``relative`` points count from their own voxel.
    """
    points = points.float() if points.dtype in (torch.float16, torch.bfloat16) else points
    kept: Tensor = backend_of(points).mask_at(mask.bool(), points, relative)
    return kept


@torch.no_grad()
def warp_labels(labels: Tensor, disp: Tensor) -> Tensor:
    """Labels pulled through a field by nearest neighbour; 0 where the position leaves the volume at all.

    Args:
        labels: ``(B, C, X, Y, Z)``, any dtype.
        disp: ``(B, 3, X, Y, Z)``, voxels.

    Returns:
        the same shape and dtype as ``labels``.
    """
    _check_field(disp, "disp")
    points = torch_backend.grid_points(disp) + disp
    last = torch.tensor([size - 1 for size in labels.shape[2:]], device=disp.device)[:, None, None, None]
    inside = ((points >= 0) & (points <= last)).all(dim=1, keepdim=True)
    nearest = torch.floor(points + 0.5).long().clamp(min=torch.zeros_like(last), max=last)
    _, size_y, size_z = labels.shape[2:]
    index = (nearest[:, 0] * size_y + nearest[:, 1]) * size_z + nearest[:, 2]
    picked = labels.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, labels.shape[1], -1))
    return torch.where(inside, picked.view_as(labels), torch.zeros((), dtype=labels.dtype, device=labels.device))


def _check_field(disp: Tensor, name: str) -> None:
    if disp.ndim != 5 or disp.shape[1] != 3:
        raise ValueError(f"{name} must be (B, 3, X, Y, Z), got {tuple(disp.shape)}")


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, control_points: Tensor, factor: int, shape: tuple[int, ...]) -> Any:
        ctx.factor = factor
        return backend_of(control_points).upsample_control_points(control_points, factor, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return backend_of(grads[0]).upsample_control_points_adjoint(grads[0], ctx.factor), None, None


class _Invert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, disp: Tensor, tolerance: float, max_iterations: int) -> Any:
        inverse = backend_of(disp).invert(disp, tolerance, max_iterations)
        ctx.save_for_backward(disp, inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        disp, inverse = ctx.saved_tensors
        return backend_of(disp).invert_adjoint(grads[0], disp, inverse), None, None


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *disps: Tensor) -> Any:
        ctx.save_for_backward(*disps)
        return backend_of(disps[0]).compose(disps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        disps = ctx.saved_tensors
        return tuple(backend_of(disps[0]).compose_adjoint(grads[0], disps, ctx.needs_input_grad))


class _Warp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, disp: Tensor, factor: int) -> Any:
        ctx.save_for_backward(values, disp)
        ctx.factor = factor
        return backend_of(values).warp(values, disp, factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values, disp = ctx.saved_tensors
        needed = ctx.needs_input_grad
        adjoint = backend_of(values).warp_adjoint(grads[0], values, disp, ctx.factor, needed[0], needed[1])
        return (*adjoint, None)
