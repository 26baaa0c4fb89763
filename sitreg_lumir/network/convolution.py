"""Convolutions whose weights' gradients are sums over a whole volume that are right at any size.

On a CPU, PyTorch's add up 860 000 products one after the other in float32, in an order that depends on the number of
threads. What it computes per voxel, the results and the gradients of what is convolved, has neither fault.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sitreg_lumir.deform.cpu.convolution import tiles_of_windows, weight_gradient
from sitreg_lumir.deform.cpu.threads import run
from sitreg_lumir.deform.ops import compiled_on_cpu
from sitreg_lumir.network.normalization import channel_sums, dense

_TASKS = 16  # a gradient is shared out among so many threads at most: by parts of the volume, or of the weights
_TILE_SUMS = 2**12  # tiles times outputs of a task, whose sums stay in a processor's own cache


class Convolution(nn.Conv3d):
    """:class:`torch.nn.Conv3d` with zero padding, cubic windows and one stride for all axes."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(in_channels, channels, kernel_size, stride, padding)

    def forward(self, values: Tensor) -> Tensor:
        return convolve(values, self.weight, self.bias, int(self.stride[0]), int(self.padding[0]))


def convolve(
    values: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> Tensor:  # fmt: skip
    """:func:`torch.nn.functional.conv3d`; on a CPU with exact gradients of weight and bias, independent of threads.

    Under autocast, and on other devices, it is PyTorch's own.

    Args:
        values: ``(B, C, X, Y, Z)``.
        weight: ``(N, C, K, K, K)``.
        bias: ``(N,)`` or None.
        stride: of the windows, voxels.
        padding: zeros before and behind each axis, voxels.

    Returns:
        ``(B, N, I, J, K)``.
    """
    half = torch.is_autocast_enabled(values.device.type) or values.dtype not in (torch.float32, torch.float64)
    learning = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if half or not learning or not compiled_on_cpu(values):
        return _results(values, weight, bias, stride, padding)
    result: Tensor = _Convolve.apply(values, weight, bias, stride, padding)
    return result


def _results(values: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    if not _is_product(values, weight):
        return F.conv3d(values, weight, bias, stride, padding)
    if not _channels_are_innermost(values):  # products take a volume by voxel whatever its layout, and spare a copy
        items = [F.linear(item.flatten(1).T, weight.flatten(1), bias) for item in values]
        by_voxel = items[0][None] if len(items) == 1 else torch.stack(items)
        result: Tensor = by_voxel.unflatten(1, values.shape[2:]).movedim(-1, 1)
        return result
    return F.linear(values.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def _is_product(values: Tensor, weight: Tensor) -> bool:
    """Whether a convolution is a product of matrices, which a CPU does several times faster than as a convolution."""
    simple = values.device.type == "cpu" and values.dtype == torch.float32 and weight.shape[2] == 1
    return simple and (values.is_contiguous() or _channels_are_innermost(values))


def _channels_are_innermost(values: Tensor) -> bool:
    return values.is_contiguous(memory_format=torch.channels_last_3d)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Any:
        ctx.save_for_backward(values, weight)
        ctx.stride, ctx.padding = stride, padding
        return _results(values, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values, weight = ctx.saved_tensors
        (grad,) = grads
        by_values = by_weight = by_bias = None
        if ctx.needs_input_grad[0] and _is_product(grad, weight):
            by_values = _results(grad, weight.transpose(0, 1), None, 1, 0)
        elif ctx.needs_input_grad[0]:
            by_values, _, _ = torch.ops.aten.convolution_backward(
                grad, values, weight, None, [ctx.stride] * 3, [ctx.padding] * 3, [1] * 3, False, [0] * 3, 1,
                [True, False, False],
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            by_weight = _by_weight(values, grad, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            by_bias = torch.from_numpy(channel_sums(dense(grad))[0].sum(axis=0)).to(grad.dtype)
        return by_values, by_weight, by_bias, None, None


def _by_weight(values: Tensor, grad: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    planes, outputs = len(grad) * grad.shape[2], grad.shape[1]
    channels, kernel = values.shape[1], weight.shape[2]
    all_tiles = tiles_of_windows(kernel, channels, values.element_size())
    tiles = min(all_tiles, max(1, _TILE_SUMS // outputs))
    tasks = -(-all_tiles // tiles)
    length = -(-planes // min(planes, -(-_TASKS // tasks)))
    totals = torch.zeros(-(-planes // length), outputs, kernel**3 * channels, dtype=torch.float64)
    sizes = kernel, stride, padding, length, tiles
    run(weight_gradient, len(totals) * tasks, _by_voxel(values), _by_voxel(grad), *sizes, totals.numpy())
    by_window = (totals[0] if len(totals) == 1 else totals.sum(0)).view(outputs, kernel, kernel, kernel, channels)
    return by_window.movedim(-1, 1).to(weight.dtype, memory_format=torch.contiguous_format)


def _by_voxel(values: Tensor) -> Any:
    return values.detach().movedim(1, -1).contiguous().numpy()
