"""What a backend must be able to do: each operation on deformations and images, and its gradient.

A backend is a module with these functions; mypy checks each of the three against this protocol where ``choice`` hands
it out. Fields are ``(B, 3, X, Y, Z)``, voxels, channel = array axis. Shapes are checked before, in ``ops``. Functions
named ``*_adjoint`` map the gradient of an operation's result to the gradients of its inputs, None where not needed.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from sitreg_lumir.deform.bspline import Coefficients, Steps


class Backend(Protocol):
    """The operations, as plain functions of tensors that autograd does not see; ``torch.backend`` explains each."""

    NAME: str  # torch, cpu or cuda

    def copies_shared(self) -> AbstractContextManager[None]:
        """A block that changes no field which is looked up in it, so that copies of such fields may be kept."""
        ...

    def interpolate(self, values: Tensor, points: Tensor) -> Tensor:
        """``values`` ``(B, C, X, Y, Z)`` at ``points`` ``(B, 3, I, J, K)``, voxels -> ``(B, C, I, J, K)``."""
        ...

    def interpolate_adjoint(
        self, grad: Tensor, values: Tensor, points: Tensor, need_values: bool = True, need_points: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients with respect to ``values`` and ``points``."""
        ...

    def mask_at(self, mask: Tensor, points: Tensor, relative: bool) -> Tensor:
        """Where a bool mask, trilinear with zeros outside, is at least 1 - 1e-3; bool ``(B, 1, ...)``."""
        ...

    def upsample_control_points(self, control_points: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
        """Control points ``(B, 3, ceil(X / factor), ...)``, level voxels -> field of ``shape``, full voxels."""
        ...

    def upsample_control_points_adjoint(self, grad: Tensor, factor: int) -> Tensor:
        """Gradient with respect to the control points."""
        ...

    def invert(self, disp: Tensor, tolerance: float, max_iterations: int) -> Tensor:
        """The inverse of ``x + disp(x)`` as a field, to ``tolerance`` voxels."""
        ...

    def invert_adjoint(self, grad: Tensor, disp: Tensor, inverse: Tensor) -> Tensor:
        """Gradient with respect to ``disp``."""
        ...

    def compose(self, disps: Sequence[Tensor]) -> Tensor:
        """The field of ``disps[0] o disps[1] o ...``, the last one applied first."""
        ...

    def compose_adjoint(self, grad: Tensor, disps: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
        """Gradients with respect to each field."""
        ...

    def move_points(
        self,
        points: Tensor,
        steps: Steps,
        coefficients: Coefficients,
        jacobians: bool,
        tolerance: float,
        max_iterations: int,
    ) -> tuple[Tensor, Tensor | None, bool]:
        """Points ``(3, N)`` through continuous updates, see ``deform.splines``; and whether inversions converged."""
        ...

    def trace_points(
        self,
        points: Tensor,
        steps: Steps,
        coefficients: Coefficients,
        tolerance: float,
        max_iterations: int,
        path: Tensor,
    ) -> tuple[Tensor, bool]:
        """Fills and returns ``path`` ``(S, 3, N)``, the points' ways; and whether inversions converged."""
        ...

    def trace_points_adjoint(
        self,
        grad: Tensor,
        points: Tensor,
        steps: Steps,
        coefficients: Coefficients,
        path: Tensor,
        needed: Sequence[bool],
    ) -> Tensor:
        """Gradient of where points end with respect to the coefficients of the ``needed`` updates."""
        ...

    def warp(self, values: Tensor, disp: Tensor, factor: int) -> Tensor:
        """``values`` of the level with spacing ``factor``, pulled through a full-resolution field."""
        ...

    def warp_adjoint(
        self, grad: Tensor, values: Tensor, disp: Tensor, factor: int, need_values: bool, need_disp: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients with respect to ``values`` and ``disp``."""
        ...

    def lncc_and_gradients(
        self, image_1: Tensor, image_2: Tensor, mask: Tensor | None, window: int, need_1: bool, need_2: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Mean squared local correlation of two masked images ``(B, 1, X, Y, Z)``, and its gradients."""
        ...

    def ndv_map(self, disp: Tensor) -> Tensor:
        """Volume folded around each inner voxel, ``(B, 1, X-2, Y-2, Z-2)``, voxels^3."""
        ...

    def ndv_sum_and_gradient(self, disp: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
        """Sum of :meth:`ndv_map`, and its gradient."""
        ...

    def diffusion(self, disp: Tensor, scales: Sequence[Sequence[float]]) -> Tensor:
        """Mean squared forward difference along each axis, times ``scales[axis][component]``."""
        ...

    def diffusion_adjoint(self, grad_value: Tensor, disp: Tensor, scales: Sequence[Sequence[float]]) -> Tensor:
        """Gradient with respect to ``disp``."""
        ...

    def mind(self, image: Tensor, sigma: float, radius: int) -> Tensor:
        """The MIND descriptor: ``(B, 1, X, Y, Z)`` -> ``(B, 6, X, Y, Z)``."""
        ...
