"""Convolutions in plain torch, as products of matrices where a CPU does these several times faster."""

import torch
from torch import Tensor
from torch.nn import functional as F


def convolve(values: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """``(B, C, X, Y, Z)`` by windows ``(N, C, K, K, K)`` with zero padding -> ``(B, N, I, J, K)``."""
    if not _is_product(values, weight):
        return F.conv3d(values, weight, bias, stride, padding)
    if not _channels_are_innermost(values):  # products take a volume by voxel whatever its layout, and spare a copy
        items = [F.linear(item.flatten(1).T, weight.flatten(1), bias) for item in values]
        by_voxel = items[0][None] if len(items) == 1 else torch.stack(items)
        result: Tensor = by_voxel.unflatten(1, values.shape[2:]).movedim(-1, 1)
        return result
    return F.linear(values.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def convolve_adjoint(grad: Tensor, values: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Gradient of :func:`convolve` with respect to ``values``."""
    if _is_product(grad, weight):
        return convolve(grad, weight.transpose(0, 1), None, 1, 0)
    by_values: Tensor = torch.ops.aten.convolution_backward(
        grad, values, weight, None, [stride] * 3, [padding] * 3, [1] * 3, False, [0] * 3, 1, [True, False, False]
    )[0]
    return by_values


def weight_gradient(values: Tensor, grad: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Gradient of :func:`convolve` with respect to ``weight``, as PyTorch adds it up."""
    by_weight: Tensor = torch.ops.aten.convolution_backward(
        grad, values, weight, None, [stride] * 3, [padding] * 3, [1] * 3, False, [0] * 3, 1, [False, True, False]
    )[1]
    return by_weight


def _is_product(values: Tensor, weight: Tensor) -> bool:
    """Whether windows of one voxel meet dense values, float32, on a CPU."""
    simple = values.device.type == "cpu" and values.dtype == torch.float32 and weight.shape[2] == 1
    return simple and (values.is_contiguous() or _channels_are_innermost(values))


def _channels_are_innermost(values: Tensor) -> bool:
    return values.is_contiguous(memory_format=torch.channels_last_3d)
