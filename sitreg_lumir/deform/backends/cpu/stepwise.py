"""What computes where ``vectorised`` does not work: compositions and inversions look-up by look-up, plain loops.

The same results to rounding (inversions: within their tolerance), in more time and memory. Results do not depend on the
number of threads.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sitreg_lumir.deform.backends.cpu import convolution
from sitreg_lumir.deform.backends.cpu.arrays import by_voxel
from sitreg_lumir.deform.backends.cpu.sampling import look_up, look_up_adjoint
from sitreg_lumir.deform.backends.cpu.threads import run
from sitreg_lumir.deform.backends.cpu.upsampling import upsample_control_points as upsample_control_points
from sitreg_lumir.deform.backends.torch.splines import move_points as move_points
from sitreg_lumir.deform.backends.torch.splines import trace_points as trace_points
from sitreg_lumir.deform.backends.torch.splines import trace_points_adjoint as trace_points_adjoint

_PARTS = 16  # so many parts of a volume have sums of their own, for as many threads
_LARGEST = 2**23  # numbers in a volume's sums


def invert(disp: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """The field ``v`` with ``v(x) = -u(clamp(x + v(x)))``, by fixed-point iteration from ``v = -u``.

    Stops when no component of any voxel moves by ``tolerance`` voxels or more.
    """
    inverse = -disp
    for _ in range(max_iterations):
        previous, inverse = inverse, -look_up(disp, inverse, relative=True)
        if float((inverse - previous).abs().max()) < tolerance:
            break
    return inverse


def invert_adjoint(grad: Tensor, disp: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of :func:`invert` with respect to ``disp``: a 3x3 solve per voxel and one adjoint look-up."""
    rows = []
    for component in disp.split(1, dim=1):  # the derivatives of one component along the three axes
        _, row = look_up_adjoint(torch.ones_like(component), component, inverse, True, False, True)
        assert row is not None
        rows.append(row)
    jacobian = torch.stack(rows, dim=1)  # (B, component, axis, X, Y, Z)
    matrix = jacobian.movedim((1, 2), (-1, -2)) + torch.eye(3).to(disp)  # J^T + I in the last two axes
    solution = torch.linalg.solve(matrix, grad.movedim(1, -1)).movedim(-1, 1)
    grad_disp, _ = look_up_adjoint(-solution, disp, inverse, True, True, False)
    assert grad_disp is not None
    return grad_disp


def compose(disps: Sequence[Tensor]) -> Tensor:
    """The field of ``disps[0] o disps[1] o ...`` (last one first) on the grid; nothing is resampled between."""
    composed = disps[-1]
    for disp in reversed(disps[:-1]):
        composed = composed + look_up(disp, composed, relative=True)
    return composed


def compose_adjoint(grad: Tensor, disps: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of :func:`compose` with respect to each field, None where ``needed`` says so."""
    displacements = [disps[-1]]  # displacements[i]: where disps[-2 - i] is looked up, from each voxel
    for disp in reversed(disps[1:-1]):
        displacements.append(displacements[-1] + look_up(disp, displacements[-1], relative=True))
    grads: list[Tensor | None] = []
    for disp, need, at in zip(disps[:-1], needed, reversed(displacements), strict=False):
        grad_disp, grad_points = look_up_adjoint(grad, disp, at, True, need, True)
        assert grad_points is not None
        grads.append(grad_disp)
        grad = grad + grad_points
    return [*grads, grad if needed[-1] else None]


def weight_gradient(values: Tensor, grad: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Gradient of a convolution with respect to its weight: see ``layers``."""
    batch, outputs, planes = grad.shape[:3]
    channels, kernel = values.shape[1], weight.shape[2]
    parts = max(1, min(_PARTS, planes, _LARGEST // weight.numel()))
    length = -(-planes // parts)
    parts = -(-planes // length) * batch
    totals = np.empty((parts, outputs, kernel**3 * channels))
    run(convolution.weight_gradient, parts, by_voxel(values), by_voxel(grad), kernel, stride, padding, length, totals)
    by_window = torch.from_numpy(totals.sum(axis=0)).view(outputs, kernel, kernel, kernel, channels)
    return by_window.permute(0, 4, 2, 3, 1).to(weight.dtype).contiguous()  # windows are ordered by z, x, y
