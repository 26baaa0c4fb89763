"""What losses need of whole images and fields, each in one step that keeps next to nothing for its gradient.

Images are ``(B, 1, X, Y, Z)``, fields ``(B, 3, X, Y, Z)`` in voxels. Backends and half precision are as in ``ops``:
scalars are summed up in float64 and given back in the input's dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sitreg_lumir.deform import torch_backend
from sitreg_lumir.deform.ops import backend_of, in_float


@in_float
def local_correlation(image_1: Tensor, image_2: Tensor, mask: Tensor | None = None, window: int = 11) -> Tensor:
    """Mean squared local correlation of two images, over all voxels and the batch, in [0, 1].

    Both images are multiplied by the mask; masked voxels and the outside enter the windows as zeros. The loss being a
    scalar, its gradient is computed along with it, and only scaled later on.

    Args:
        image_1: ``(B, 1, X, Y, Z)``.
        image_2: the same shape.
        mask: ``(B, 1, X, Y, Z)``, bool or 0/1, or None.
        window: width of the cube, voxels, odd.

    Returns:
        a scalar.

    Raises:
        ValueError: the shapes do not belong together, or the window is even.

    Source: Avants et al., Symmetric diffeomorphic image registration with cross-correlation, MedIA 2008.
    """
    if image_1.ndim != 5 or image_1.shape[1] != 1 or image_2.shape != image_1.shape:
        raise ValueError(f"images must be (B, 1, X, Y, Z) alike, got {tuple(image_1.shape)} and {tuple(image_2.shape)}")
    if mask is not None and mask.shape != image_1.shape:
        raise ValueError(f"mask must be {tuple(image_1.shape)}, got {tuple(mask.shape)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, got {window}")
    mask = None if mask is None else mask.bool()
    result: Tensor = _Correlation.apply(image_1, image_2, mask, window, torch.is_grad_enabled())
    return result


@in_float
def folded_volume(disp: Tensor) -> Tensor:
    """Volume that the map ``x + disp(x)`` folds, summed over all inner voxels and the batch, with its gradient.

    The sum of :func:`~sitreg_lumir.deform.jacobian.non_diffeomorphic_volume`.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels, each axis at least 3 long.

    Returns:
        a scalar, voxels^3, never negative.

    Raises:
        ValueError: ``disp`` has another form.

    Source: Liu et al., On finite difference Jacobian computation, IJCV 2024.
    """
    _check_field(disp, 3)
    result: Tensor = _FoldedVolume.apply(disp, torch.is_grad_enabled())
    return result


@torch.no_grad()
@in_float
def folded_map(disp: Tensor) -> Tensor:
    """:func:`~sitreg_lumir.deform.jacobian.non_diffeomorphic_volume` in one pass, without gradient."""
    _check_field(disp, 3)
    volume: Tensor = backend_of(disp).folded_map(disp)
    return volume


@in_float
def mean_squared_slope(disp: Tensor, voxel_size: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Mean squared slope of a field, by forward differences; an axis of one voxel has none.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels.
        voxel_size: of each axis; only ratios matter.

    Returns:
        a scalar, no unit.

    Raises:
        ValueError: ``disp`` has another form, or a voxel has no size.
    """
    _check_field(disp, 1)
    if len(voxel_size) != 3 or min(voxel_size) <= 0:
        raise ValueError(f"voxel_size must be three positive numbers, got {tuple(voxel_size)}")
    scales = tuple(tuple((own / step) ** 2 for own in voxel_size) for step in voxel_size)
    result: Tensor = _MeanSquaredSlope.apply(disp, scales)
    return result


@in_float
def mind(image: Tensor, sigma: float, radius: int) -> Tensor:
    """The MIND descriptor of :class:`~sitreg_lumir.network.mind.Mind`.

    Args:
        image: ``(B, 1, X, Y, Z)``. An image that is to get a gradient is left to plain torch.
        sigma: of the patch's Gaussian, voxels.
        radius: of the patch, voxels.

    Returns:
        ``(B, 6, X, Y, Z)``, no unit, in (0, 1].

    Raises:
        ValueError: ``image`` has another form, or the patch has no size.
    """
    if image.ndim != 5 or image.shape[1] != 1:
        raise ValueError(f"image must be (B, 1, X, Y, Z), got {tuple(image.shape)}")
    if sigma <= 0 or radius < 1:
        raise ValueError(f"MIND needs sigma > 0 and radius >= 1, got {sigma} and {radius}")
    learning = torch.is_grad_enabled() and image.requires_grad
    descriptor: Tensor = (torch_backend if learning else backend_of(image)).mind(image, sigma, radius)
    return descriptor


def _check_field(disp: Tensor, shortest: int) -> None:
    if disp.ndim != 5 or disp.shape[1] != 3 or min(disp.shape[2:]) < shortest:
        raise ValueError(f"disp must be (B, 3, X, Y, Z) with axes of {shortest} or more, got {tuple(disp.shape)}")


class _Correlation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image_1: Tensor, image_2: Tensor, mask: Tensor | None, window: int, learning: bool
    ) -> Any:  # fmt: skip
        needed = [learning and need for need in ctx.needs_input_grad[:2]]
        value, *grads = backend_of(image_1).correlation(image_1, image_2, mask, window, *needed)
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *(None if grad is None else grad * grads[0] for grad in ctx.saved_tensors), None, None, None


class _FoldedVolume(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, disp: Tensor, learning: bool) -> Any:
        value, grad = backend_of(disp).folding(disp, learning and ctx.needs_input_grad[0])
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.saved_tensors[0] * grads[0], None


class _MeanSquaredSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, disp: Tensor, scales: tuple[tuple[float, ...], ...]) -> Any:
        ctx.save_for_backward(disp)
        ctx.scales = scales
        return backend_of(disp).diffusion(disp, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (disp,) = ctx.saved_tensors
        return backend_of(disp).diffusion_adjoint(grads[0], disp, ctx.scales), None
