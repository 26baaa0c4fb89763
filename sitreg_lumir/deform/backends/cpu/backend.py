"""Every operation on deformations and its adjoint in compiled CPU loops: same results as the torch backend, faster.

Fields are ``(B, 3, X, Y, Z)``, voxels; float32 or float64, any layout. Results do not depend on the number of threads.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from sitreg_lumir.deform.backends.cpu import fallback
from sitreg_lumir.deform.backends.cpu.fallback import working
from sitreg_lumir.deform.backends.cpu.images import diffusion as diffusion
from sitreg_lumir.deform.backends.cpu.images import diffusion_adjoint as diffusion_adjoint
from sitreg_lumir.deform.backends.cpu.images import lncc_and_gradients as lncc_and_gradients
from sitreg_lumir.deform.backends.cpu.images import mind as mind
from sitreg_lumir.deform.backends.cpu.images import ndv_map as ndv_map
from sitreg_lumir.deform.backends.cpu.images import ndv_sum_and_gradient as ndv_sum_and_gradient
from sitreg_lumir.deform.backends.cpu.sampling import interpolate as interpolate
from sitreg_lumir.deform.backends.cpu.sampling import interpolate_adjoint as interpolate_adjoint
from sitreg_lumir.deform.backends.cpu.sampling import mask_at as mask_at
from sitreg_lumir.deform.backends.cpu.sampling import warp as warp
from sitreg_lumir.deform.backends.cpu.sampling import warp_adjoint as warp_adjoint
from sitreg_lumir.deform.backends.cpu.upsampling import (
    upsample_control_points_adjoint as upsample_control_points_adjoint,
)
from sitreg_lumir.deform.bspline import Coefficients, Steps

NAME = "cpu"


def copies_shared() -> AbstractContextManager[None]:
    """Within the block, in this thread, a field that is looked up several times is interleaved once.

    Fields that are looked up must not be changed within the block; the last two are kept, with their copies. Control
    points are upsampled to interleaved fields at once.
    """
    return fallback.copies_shared()


def upsample_control_points(control_points: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """Control points (level voxels) -> field (full-resolution voxels) on a grid of ``shape``."""
    field: Tensor = working("upsample_control_points", control_points.dtype)(control_points, factor, shape)
    return field


def invert(disp: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """The field ``v`` with ``v(x) = -u(clamp(x + v(x)))``, to ``tolerance`` voxels."""
    inverse: Tensor = working("invert", disp.dtype)(disp, tolerance, max_iterations)
    return inverse


def invert_adjoint(grad: Tensor, disp: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of :func:`invert` with respect to ``disp``: a 3x3 solve per voxel and one adjoint look-up."""
    grad_disp: Tensor = working("invert_adjoint", disp.dtype)(grad, disp, inverse)
    return grad_disp


def compose(disps: Sequence[Tensor]) -> Tensor:
    """The field of ``disps[0] o disps[1] o ...`` (last one first) on the grid; nothing is resampled between."""
    composed: Tensor = working("compose", disps[0].dtype)(disps)
    return composed


def move_points(
    points: Tensor, steps: Steps, coefficients: Coefficients, jacobians: bool, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor | None, bool]:
    """Points ``(3, N)`` through continuous updates: see :mod:`sitreg_lumir.deform.splines`."""
    moved: tuple[Tensor, Tensor | None, bool] = working("move_points", coefficients.flat.dtype)(
        points, steps, coefficients, jacobians, tolerance, max_iterations
    )
    return moved


def trace_points(
    points: Tensor, steps: Steps, coefficients: Coefficients, tolerance: float, max_iterations: int, path: Tensor
) -> tuple[Tensor, bool]:
    """Follows points ``(3, N)`` through a chain of continuous updates: see ``torch.splines``."""
    followed: tuple[Tensor, bool] = working("trace_points", coefficients.flat.dtype)(
        points, steps, coefficients, tolerance, max_iterations, path
    )
    return followed


def trace_points_adjoint(
    grad: Tensor, points: Tensor, steps: Steps, coefficients: Coefficients, path: Tensor, needed: Sequence[bool]
) -> Tensor:
    """Gradient of where points end with respect to the coefficients: see ``torch.splines``."""
    gradient: Tensor = working("trace_points_adjoint", coefficients.flat.dtype)(
        grad, points, steps, coefficients, path, needed
    )
    return gradient


def compose_adjoint(grad: Tensor, disps: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of :func:`compose` with respect to each field, None where ``needed`` says so."""
    grads: list[Tensor | None] = working("compose_adjoint", grad.dtype)(grad, disps, needed)
    return grads
