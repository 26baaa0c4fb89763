"""Every operation on deformations and its adjoint in plain torch: the readable truth for other backends.

Fields are ``(B, 3, X, Y, Z)`` in voxels, channel = axis. Points are coordinates in voxels, in the same
layout. A look-up is trilinear with the *look-up* coordinate clamped per axis to ``[0, n - 1]``; the
position itself is never clamped, so a map may leave the volume: ``phi(y) = y + u(clamp(y))``.

Functions named ``*_adjoint`` map the gradient of an operation's result to the gradients of its inputs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sitreg_lumir.deform.backends.torch.images import diffusion as diffusion
from sitreg_lumir.deform.backends.torch.images import diffusion_adjoint as diffusion_adjoint
from sitreg_lumir.deform.backends.torch.images import lncc_and_gradients as lncc_and_gradients
from sitreg_lumir.deform.backends.torch.images import mind as mind
from sitreg_lumir.deform.backends.torch.images import ndv_map as ndv_map
from sitreg_lumir.deform.backends.torch.images import ndv_sum_and_gradient as ndv_sum_and_gradient
from sitreg_lumir.deform.backends.torch.splines import move_points as move_points
from sitreg_lumir.deform.backends.torch.splines import trace_points as trace_points
from sitreg_lumir.deform.backends.torch.splines import trace_points_adjoint as trace_points_adjoint
from sitreg_lumir.deform.bspline import upsampling_matrix

NAME = "torch"
_BILINEAR, _BORDER = 0, 1  # the integer codes of ATen's grid_sampler_3d


def copies_shared() -> AbstractContextManager[None]:
    """Nothing to do: plain torch keeps no copies."""
    return nullcontext()


def grid_points(like: Tensor) -> Tensor:
    """``(1, 3, X, Y, Z)``: each voxel's own index, on the grid, dtype and device of ``like``."""
    axes = [torch.arange(size, dtype=like.dtype, device=like.device) for size in like.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _to_grid_sample(points: Tensor, shape: Sequence[int]) -> Tensor:
    """Voxel coordinates ``(B, 3, ...)`` -> grid_sample's ``(B, ..., 3)`` in [-1, 1], last axis first."""
    scale = torch.tensor([2 / max(size - 1, 1) for size in shape], dtype=points.dtype, device=points.device)
    return (points.movedim(1, -1) * scale - 1).flip(-1)


def interpolate(values: Tensor, points: Tensor) -> Tensor:
    """``values`` at ``points``: ``(B, C, X, Y, Z)``, ``(B, 3, I, J, K)`` in voxels -> ``(B, C, I, J, K)``."""
    grid = _to_grid_sample(points, values.shape[2:]).expand(values.shape[0], *(-1,) * 4)
    looked_up: Tensor = torch.ops.aten.grid_sampler_3d(values.to(grid.dtype), grid, _BILINEAR, _BORDER, True)
    return looked_up.to(values.dtype)


def interpolate_adjoint(
    grad: Tensor, values: Tensor, points: Tensor, need_values: bool = True, need_points: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`interpolate` with respect to ``values`` and to ``points`` (None where not needed).

    The derivative of the clamp is 0 outside ``[0, n - 1]``.
    """
    shape = values.shape[2:]
    grid = _to_grid_sample(points, shape).expand(values.shape[0], *(-1,) * 4)
    grad_values, grad_grid = torch.ops.aten.grid_sampler_3d_backward(
        grad.contiguous(), values, grid, _BILINEAR, _BORDER, True, [need_values, True]
    )
    if not need_points:
        return grad_values, None
    scale = torch.tensor([2 / (size - 1) if size > 1 else 0.0 for size in shape], dtype=grad.dtype, device=grad.device)
    return (grad_values if need_values else None), (grad_grid.flip(-1) * scale).movedim(-1, 1)


def mask_at(mask: Tensor, points: Tensor, relative: bool) -> Tensor:
    """Where ``mask`` (bool), trilinear with zeros outside, is at least 1 - 1e-3 at ``points``; bool ``(B, 1, ...)``.

    ``relative`` points count from their own voxel.
    """
    points = grid_points(points) + points if relative else points
    last = torch.tensor([size - 1 for size in mask.shape[2:]]).to(points)[:, None, None, None]
    outside = torch.maximum(-points, points - last).clamp(0, 1)  # how far the look-up leaves, per axis
    weight = (1 - outside).prod(dim=1, keepdim=True)  # what is left of a mask of ones
    kept: Tensor = interpolate(mask.to(points.dtype), points) * weight >= 1 - 1e-3
    return kept


def upsample_control_points(control_points: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """Control points (level voxels) -> field (full-resolution voxels) on a grid of ``shape``."""
    field = control_points * factor
    for axis in (-3, -2, -1):
        matrix = upsampling_matrix(shape[axis], factor, field.dtype, field.device)
        field = _along(matrix, field, axis)
    return field


def upsample_control_points_adjoint(grad: Tensor, factor: int) -> Tensor:
    """Gradient of :func:`upsample_control_points` with respect to the control points."""
    for axis in (-1, -2, -3):
        matrix = upsampling_matrix(grad.shape[axis], factor, grad.dtype, grad.device)
        grad = _along(matrix.mT, grad, axis)
    return grad * factor


def _along(matrix: Tensor, field: Tensor, axis: int) -> Tensor:
    """Multiplies one spatial axis of ``field`` by ``matrix``."""
    if axis == -1:
        return field @ matrix.mT
    if axis == -2:
        return matrix @ field
    batch, channels, size, *rest = field.shape
    return (matrix @ field.reshape(batch, channels, size, -1)).reshape(batch, channels, -1, *rest)


def invert(disp: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """The field ``v`` with ``v(x) = -u(clamp(x + v(x)))``, by fixed-point iteration from ``v = -u``.

    Stops when no component of any voxel moves by ``tolerance`` voxels or more.
    """
    points = grid_points(disp)
    inverse = -disp
    for _ in range(max_iterations):
        previous = inverse
        inverse = -interpolate(disp, points + previous)
        if float((inverse - previous).abs().max()) < tolerance:
            break
    return inverse


def invert_adjoint(grad: Tensor, disp: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of :func:`invert` with respect to ``disp``: a 3x3 solve per voxel and one adjoint look-up.

    With ``J`` the derivative of the interpolated field at ``x + v(x)``: ``lambda = (I + J^T)^-1 grad``.
    """
    points = grid_points(disp) + inverse
    rows = []
    for channel in range(3):  # row c of J: the derivative of component c along the three axes
        component = disp[:, channel : channel + 1]
        ones = torch.ones_like(component)
        rows.append(interpolate_adjoint(ones, component, points, need_values=False)[1])
    jacobian = torch.stack([row for row in rows if row is not None], dim=1)  # (B, c, d, X, Y, Z)
    matrix = jacobian.movedim((1, 2), (-1, -2)) + torch.eye(3).to(disp)  # J^T + I in the last two axes
    solution = torch.linalg.solve(matrix, grad.movedim(1, -1)).movedim(-1, 1)
    grad_disp, _ = interpolate_adjoint(-solution, disp, points, need_points=False)
    assert grad_disp is not None
    return grad_disp


def compose(disps: Sequence[Tensor]) -> Tensor:
    """The field of ``disps[0] o disps[1] o ...`` (last one first) on the grid; nothing is resampled between."""
    points = grid_points(disps[-1]) + disps[-1]
    for disp in reversed(disps[:-1]):
        points = points + interpolate(disp, points)
    return points - grid_points(disps[-1])


def compose_adjoint(grad: Tensor, disps: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of :func:`compose` with respect to each field, None where ``needed`` says so."""
    points = [grid_points(disps[-1]) + disps[-1]]  # points[i]: where disps[-2 - i] is looked up
    for disp in reversed(disps[1:-1]):
        points.append(points[-1] + interpolate(disp, points[-1]))
    grads: list[Tensor | None] = []
    for disp, need, at in zip(disps[:-1], needed, reversed(points), strict=False):
        grad_disp, grad_points = interpolate_adjoint(grad, disp, at, need_values=need)
        assert grad_points is not None
        grads.append(grad_disp)
        grad = grad + grad_points
    return [*grads, grad if needed[-1] else None]


def _warp_points(disp: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """Where each level voxel looks: from the level grid through the full-resolution field and back."""
    if factor == 1:
        return grid_points(disp) + disp
    level = grid_points(disp.new_empty(1, 1, *shape))
    full = factor * (level + 0.5) - 0.5
    moved = full + interpolate(disp, full.expand(len(disp), *(-1,) * 4))
    return (moved + 0.5) / factor - 0.5


def warp(values: Tensor, disp: Tensor, factor: int) -> Tensor:
    """``values`` of the level with spacing ``factor``, pulled through the full-resolution field ``disp``."""
    return interpolate(values, _warp_points(disp, factor, values.shape[2:]))


def warp_adjoint(
    grad: Tensor, values: Tensor, disp: Tensor, factor: int, need_values: bool, need_disp: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`warp` with respect to ``values`` and ``disp`` (None where not needed)."""
    points = _warp_points(disp, factor, values.shape[2:])
    grad_values, grad_points = interpolate_adjoint(grad, values, points, need_values, need_disp)
    if grad_points is None or factor == 1:
        return grad_values, grad_points
    level = grid_points(disp.new_empty(1, 1, *values.shape[2:]))
    full = (factor * (level + 0.5) - 0.5).expand(len(disp), *(-1,) * 4)
    grad_disp, _ = interpolate_adjoint(grad_points / factor, disp, full, need_points=False)
    return grad_values, grad_disp
