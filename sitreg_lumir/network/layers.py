"""The network's layers: convolutions, and group normalisation with ReLU, right at any size and in any layout.

On a CPU, PyTorch adds up whole volumes one voxel after the other in float32: at 160x224x192 the statistics of a
normalisation are off by up to 0.2 standard deviations, and sums over volumes depend on the number of threads. There
such sums are computed in compiled loops instead; what PyTorch computes per voxel has neither fault.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sitreg_lumir.deform import autograd
from sitreg_lumir.deform.backends import compiled_on_cpu
from sitreg_lumir.deform.backends.cpu import layers as cpu_layers
from sitreg_lumir.deform.backends.torch import layers as torch_layers


class Convolution(nn.Conv3d):
    """:class:`torch.nn.Conv3d` with zero padding, cubic windows and one stride for all axes."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(in_channels, channels, kernel_size, stride, padding)

    def forward(self, values: Tensor) -> Tensor:
        """Convolves ``(B, C, X, Y, Z)``."""
        return convolve(values, self.weight, self.bias, int(self.stride[0]), int(self.padding[0]))


def convolve(values: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
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
        return torch_layers.convolve(values, weight, bias, stride, padding)
    result: Tensor = autograd.Convolve.apply(values, weight, bias, stride, padding)
    return result


class GroupNormRelu(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` and ReLU in one. On a CPU without gradients it overwrites its input.

    ``forward``: ``(B, C, X, Y, Z)`` -> the same shape, type and layout.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Normalises ``(B, C, X, Y, Z)``, and cuts off what is negative."""
        return group_norm_relu(features, self.num_groups, self.weight, self.bias, self.eps)


def group_norm_relu(features: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance of each group of channels of each volume, then ``max(weight * . + bias, 0)``.

    Sums over a volume run in float64, in an order that does not depend on the number of threads. Half precision is
    computed in float32.

    Args:
        features: ``(B, C, X, Y, Z)``. On a CPU, they are overwritten where no gradient is asked for.
        groups: a divisor of ``C``.
        weight: ``(C,)``.
        bias: ``(C,)``.
        eps: is added to variances.

    Returns:
        the shape, type and layout of ``features``.

    Raises:
        ValueError: the shapes do not belong together.

    Source: Wu & He, Group normalization, ECCV 2018.
    """
    channels = features.shape[1] if features.ndim > 1 else 0
    if features.ndim != 5 or channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"features must be (B, C, X, Y, Z) with C a multiple of {groups} and as many weights, got "
            f"{tuple(features.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if compiled_on_cpu(features):
        if torch.is_grad_enabled():
            result: Tensor = autograd.GroupNormRelu.apply(features, weight, bias, groups, eps)
            return result
        return cpu_layers.normalize(cpu_layers.dense(features), weight, bias, groups, eps, overwrite=True)[0]
    last = cpu_layers.channels_are_last(features)
    with torch.autocast(features.device.type, enabled=False):
        # PyTorch's is right for volumes whose channels lie one behind the other, and on GPUs
        whole = features.to(weight.dtype).contiguous()
        result = F.relu(F.group_norm(whole, groups, weight, bias, eps), inplace=True).to(features.dtype)
    return result.contiguous(memory_format=torch.channels_last_3d) if last else result


class ConvBlock(nn.Module):
    """Convolutions 3x3x3, each followed by group normalisation and ReLU; zero padding keeps the shape."""

    def __init__(self, in_channels: int, channels: int, convolutions: int = 2, groups: int = 4) -> None:
        super().__init__()
        inputs = [in_channels] + [channels] * (convolutions - 1)
        self.convolutions = nn.ModuleList(Convolution(c, channels, kernel_size=3, padding=1) for c in inputs)
        self.normalizers = nn.ModuleList(GroupNormRelu(groups, channels) for _ in inputs)

    def forward(self, features: Tensor) -> Tensor:
        """Convolves, normalises and rectifies ``(B, C, X, Y, Z)``."""
        return self.after_first(self.convolutions[0](fastest_layout(features)))

    def after_first(self, features: Tensor) -> Tensor:
        """The block from behind its first convolution on."""
        normalized: Tensor = self.normalizers[0](features)
        for convolution, normalizer in zip(self.convolutions[1:], self.normalizers[1:], strict=True):
            normalized = normalizer(convolution(normalized))
        return normalized


def fastest_layout(features: Tensor) -> Tensor:
    """The same values with channels innermost on a CPU, where convolutions run 2 to 4 times as fast that way."""
    if features.device.type != "cpu" or features.dtype == torch.float64:
        return features
    return features.contiguous(memory_format=torch.channels_last_3d)
