"""What losses need of whole images and fields, in Triton kernels: the part of the backend that does not look up.

Float32, any layout. Scalars are summed up in float64, always in one order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sitreg_lumir.deform.backends.cuda import folding as loops
from sitreg_lumir.deform.backends.cuda import mind as patches
from sitreg_lumir.deform.backends.cuda import windows
from sitreg_lumir.deform.backends.cuda.launch import blocks, launch

_BLOCK = 128  # lanes of a program, one for each thread of four warps


def lncc_and_gradients(
    image_1: Tensor, image_2: Tensor, mask: Tensor | None, window: int, need_1: bool, need_2: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean squared local correlation of two masked images, and its gradients (None where not needed).

    Keeps ten maps in float64 in memory for the time of the call.
    """
    if need_2 and not need_1:
        value, grad_2, _ = lncc_and_gradients(image_2, image_1, mask, window, True, False)
        return value, None, grad_2
    batch, _, *shape = image_1.shape
    volume, stride = image_1[0].numel(), shape[1] * shape[2]
    grid, count = (blocks(shape, _BLOCK), batch), 3 * need_1 + 2 * need_2
    images = (image_1.contiguous(), image_2.contiguous())
    inside = images[0] if mask is None else mask.contiguous().view(torch.int8)  # without a mask nothing reads it
    masked, options = mask is not None, {"window": window, "block": _BLOCK}
    sums, scratch = (image_1.new_empty(5, *image_1.shape, dtype=torch.float64) for _ in range(2))
    totals = image_1.new_empty(grid, dtype=torch.float64)
    args = (*images, inside, scratch, shape[2], volume, batch)
    launch(windows.sum_products, grid, image_1, *args, masked=masked, **options)
    _sum_axis(scratch, sums, 1, options)
    maps = scratch.view(-1).view(torch.float32)[: 5 * image_1.numel()].view(5, *image_1.shape)[:count]
    sizes = (shape[0], stride, volume, batch)
    launch(windows.correlate, grid, image_1, sums, maps, totals, *sizes, count=count, **options)
    value = totals.sum().div(image_1.numel()).to(image_1.dtype)
    if not need_1:
        return value, None, None
    _sum_axis(maps, sums[:count], 2, options)
    _sum_axis(sums[:count], scratch[:count], 1, options)
    grad_1 = torch.empty_like(images[0])
    grad_2 = torch.empty_like(images[1]) if need_2 else None
    targets = (grad_1, grad_1 if grad_2 is None else grad_2)
    rest = (scratch, *targets, *sizes, 1 / image_1.numel())
    launch(windows.correlate_adjoint, grid, image_1, *images, inside, *rest, masked=masked, count=count, **options)
    return value, grad_1, grad_2


def _sum_axis(values: Tensor, sums: Tensor, axis: int, options: dict[str, int]) -> None:
    """Sums ``(Q, B, 1, X, Y, Z)`` over windows along one spatial axis."""
    count, batch, _, *shape = values.shape
    grid = (blocks(shape, options["block"]), count * batch)
    stride = shape[2] if axis == 1 else 1
    launch(windows.sum_axis, grid, values, values, sums, shape[axis], stride, values[0, 0].numel(), **options)


def ndv_sum_and_gradient(disp: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of :func:`ndv_map`, and its gradient (None if not needed)."""
    grad = torch.zeros(disp.shape, dtype=disp.dtype, device=disp.device) if need_grad else None
    return _fold(disp, grad, None), grad


def ndv_map(disp: Tensor) -> Tensor:
    """Volume folded around each inner voxel, ``(B, 1, X-2, Y-2, Z-2)``, voxels^3."""
    volume = disp.new_empty(len(disp), 1, *(size - 2 for size in disp.shape[2:]))
    _fold(disp, None, volume)
    return volume


def _fold(disp: Tensor, grad: Tensor | None, volume: Tensor | None) -> Tensor:
    """Sum of the folded volume; adds to ``grad`` and fills ``volume`` where they are given."""
    grid = (blocks([size - 2 for size in disp.shape[2:]], _BLOCK), len(disp))
    totals = disp.new_empty(grid)
    field = disp.contiguous()
    targets = (field if volume is None else volume, totals, field if grad is None else grad)
    needs = {"need_volume": volume is not None, "need_grad": grad is not None}
    launch(loops.fold, grid, disp, field, *targets, *disp.shape[2:], **needs, block=_BLOCK)
    return totals.sum(dtype=torch.float64).to(disp.dtype)


def diffusion(disp: Tensor, scales: Sequence[Sequence[float]]) -> Tensor:
    """Mean of the squared differences to the next voxel along each axis, times ``scales[axis][component]``."""
    grid = (blocks(disp.shape[2:], _BLOCK), len(disp))
    totals = disp.new_empty(grid)
    args = (disp.contiguous(), totals, *disp.shape[2:], _difference_weights(disp, scales))
    launch(loops.squared_differences, grid, disp, *args, block=_BLOCK)
    return totals.sum(dtype=torch.float64).to(disp.dtype)


def diffusion_adjoint(grad_value: Tensor, disp: Tensor, scales: Sequence[Sequence[float]]) -> Tensor:
    """Gradient of :func:`diffusion` with respect to ``disp``."""
    grid = (blocks(disp.shape[2:], _BLOCK), len(disp))
    grad = torch.empty(disp.shape, dtype=disp.dtype, device=disp.device)
    args = (grad_value, disp.contiguous(), grad, *disp.shape[2:], _difference_weights(disp, scales))
    launch(loops.squared_differences_adjoint, grid, disp, *args, block=_BLOCK)
    return grad


def _difference_weights(disp: Tensor, scales: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Share of each squared difference in the mean, for each component by axis; 0 along axes of one voxel."""
    counts = [disp.numel() // size * (size - 1) for size in disp.shape[2:]]
    return tuple(
        scales[axis][component] / (3 * counts[axis]) if counts[axis] else 0.0
        for component in range(3)
        for axis in range(3)
    )


def mind(image: Tensor, sigma: float, radius: int) -> Tensor:
    """The MIND descriptor: ``(B, 1, X, Y, Z)`` -> ``(B, 6, X, Y, Z)``; 1 where the mean distance is <= 1e-6."""
    batch, _, *shape = image.shape
    grid = (blocks(shape, _BLOCK), batch)
    maps = image.new_empty(4, batch, *shape)
    descriptor = image.new_empty(batch, 6, *shape)
    sizes = (*shape, image[0].numel(), batch, float(sigma))
    options = {"radius": radius, "block": _BLOCK}
    launch(patches.smooth_differences, grid, image, image.contiguous(), maps, *sizes, **options)
    launch(patches.describe, grid, image, maps, descriptor, *sizes, **options)
    return descriptor
