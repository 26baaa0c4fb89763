"""What losses need of whole images and fields, in compiled CPU loops: the part of the backend that does not look up.

Float32 or float64, any layout. Scalars are summed up in float64, plane by plane, and have the inputs' dtype. Results
do not depend on the number of threads.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.deform.backends.cpu import folding as loops
from sitreg_lumir.deform.backends.cpu import windows
from sitreg_lumir.deform.backends.cpu.threads import run
from sitreg_lumir.deform.backends.torch.images import patch_weights


def lncc_and_gradients(
    image_1: Tensor, image_2: Tensor, mask: Tensor | None, window: int, need_1: bool, need_2: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean squared local correlation of two masked images, and its gradients (None where not needed).

    Keeps three maps in memory for one gradient, five for both.
    """
    if need_2 and not need_1:
        value, grad_2, _ = lncc_and_gradients(image_2, image_1, mask, window, True, False)
        return value, None, grad_2
    batch, _, size_x, size_y, size_z = image_1.shape
    mask = torch.ones(1, size_y, size_z, dtype=torch.bool) if mask is None else mask
    args = (_planes(image_1), _planes(image_2), _planes(mask), size_x, window)
    tasks = batch * -(-size_x // windows.SLAB)
    totals, count = np.empty(tasks), image_1.numel()
    maps = _planes(image_1.new_empty(3 * need_1 + 2 * need_2, *image_1.shape)).reshape(-1, *args[0].shape)
    run(windows.correlate, tasks, *args, totals, maps)
    value = torch.tensor(totals.sum() / count, dtype=image_1.dtype)
    if not need_1:
        return value, None, None
    grad_1, grad_2 = image_1.new_empty(image_1.shape), image_2.new_empty(image_2.shape if need_2 else (1, 1, 1))
    run(windows.correlate_adjoint, tasks, *args, 1 / count, maps, _planes(grad_1), _planes(grad_2))
    return value, grad_1, grad_2 if need_2 else None


def ndv_sum_and_gradient(disp: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of :func:`ndv_map`, and its gradient (None if not needed)."""
    grad = disp.new_zeros(disp.shape if need_grad else (0, 1, 1, 1))
    value = _fold(disp, grad, disp.new_empty(0, 1, 1, 1))
    return value, grad if need_grad else None


def ndv_map(disp: Tensor) -> Tensor:
    """Volume folded around each inner voxel, ``(B, 1, X-2, Y-2, Z-2)``, voxels^3."""
    volume = disp.new_empty(len(disp), 1, *(size - 2 for size in disp.shape[2:]))
    _fold(disp, disp.new_empty(0, 1, 1, 1), volume)
    return volume


def _fold(disp: Tensor, grad: Tensor, volume: Tensor) -> Tensor:
    """Sum of the folded volume; fills ``grad`` and ``volume`` unless they are empty."""
    along_x = -(-(disp.shape[2] - 2) // loops.SLAB)
    slabs = np.arange(len(disp) * along_x)
    totals = np.empty(len(slabs))
    args = (_volumes(disp), totals, _volumes(grad), _volumes(volume))
    for parity in (0, 1):  # neighbours add to the same planes of the gradient
        members = slabs[slabs % along_x % 2 == parity]
        run(loops.fold, len(members), members, *args)
    return torch.tensor(totals.sum(), dtype=disp.dtype)


def diffusion(disp: Tensor, scales: Sequence[Sequence[float]]) -> Tensor:
    """Mean of the squared differences to the next voxel along each axis, times ``scales[axis][component]``."""
    fields, batch = _volumes(disp), len(disp)
    totals = np.empty((len(fields) * disp.shape[2], 3))
    run(loops.squared_differences, len(totals), fields, totals)
    sums = totals.reshape(batch, 3, -1, 3).sum(axis=(0, 2))  # component, axis
    return torch.tensor((sums * _difference_weights(disp, scales)).sum(), dtype=disp.dtype)


def diffusion_adjoint(grad_value: Tensor, disp: Tensor, scales: Sequence[Sequence[float]]) -> Tensor:
    """Gradient of :func:`diffusion` with respect to ``disp``."""
    fields, grad = _volumes(disp), disp.new_empty(disp.shape)
    weights = (float(grad_value) * _difference_weights(disp, scales)).astype(fields.dtype)
    run(loops.squared_differences_adjoint, len(fields) * disp.shape[2], fields, weights, _volumes(grad))
    return grad


def _difference_weights(disp: Tensor, scales: Sequence[Sequence[float]]) -> Any:
    """Share of each squared difference in the mean, by component and axis; 0 along axes of one voxel."""
    counts = [max(disp.numel() // size * (size - 1), 1) for size in disp.shape[2:]]
    return np.array(scales, dtype=np.float64).T / (3 * np.array(counts))


def mind(image: Tensor, sigma: float, radius: int) -> Tensor:
    """The MIND descriptor: ``(B, 1, X, Y, Z)`` -> ``(B, 6, X, Y, Z)``; 1 where the mean distance is <= 1e-6."""
    batch, _, *shape = image.shape
    padded = _volumes(F.pad(image.detach(), (radius + 1,) * 6, mode="replicate"))
    descriptor = image.new_empty(batch, 6, *shape)
    weights = np.array(patch_weights(sigma, radius), dtype=padded.dtype)
    run(windows.compare_patches, batch * shape[0], padded, weights, descriptor.numpy())
    return descriptor.exp_()


def _planes(tensor: Tensor) -> Any:
    """A tensor ``(..., Y, Z)`` as an array of planes."""
    return tensor.detach().contiguous().view(-1, *tensor.shape[-2:]).numpy()


def _volumes(tensor: Tensor) -> Any:
    """A tensor ``(..., X, Y, Z)`` as an array of volumes."""
    return tensor.detach().contiguous().view(-1, *tensor.shape[-3:]).numpy()
