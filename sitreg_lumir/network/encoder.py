"""The feature pyramid and the head that turns features into bounded control points."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvBlock(nn.Module):
    """Convolutions 3x3x3, each followed by group normalisation and ReLU; zero padding keeps the shape."""

    def __init__(self, in_channels: int, channels: int, convolutions: int = 2, groups: int = 4) -> None:
        super().__init__()
        inputs = [in_channels] + [channels] * (convolutions - 1)
        self.convolutions = nn.ModuleList(nn.Conv3d(c, channels, kernel_size=3, padding=1) for c in inputs)
        self.normalizers = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in inputs)

    def forward(self, features: Tensor) -> Tensor:
        features = fastest_layout(features)
        for convolution, normalizer in zip(self.convolutions, self.normalizers, strict=True):
            features = F.relu(normalizer(convolution(features)), inplace=True)
        return features


def fastest_layout(features: Tensor) -> Tensor:
    """The same values with channels innermost on a CPU, where convolutions run 2 to 4 times as fast that way."""
    if features.device.type != "cpu" or features.dtype == torch.float64:
        return features
    return features.contiguous(memory_format=torch.channels_last_3d)


class Downsampling(nn.Module):
    """Half resolution: a strided convolution of the features plus the averaged, projected skip path."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(in_channels, channels, kernel_size=2, stride=2)
        self.projection = nn.Conv3d(in_channels, channels, kernel_size=1)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        pooled = F.avg_pool3d(_pad_to_even(skip), kernel_size=2)  # padded zeros count in the average
        main: Tensor = self.convolution(_pad_to_even(features))
        projected: Tensor = self.projection(pooled)
        return main + projected


def _pad_to_even(features: Tensor) -> Tensor:
    """One voxel of zeros at the end of each axis of odd length."""
    padding = [pad for size in reversed(features.shape[2:]) for pad in (0, size % 2)]
    return F.pad(features, padding) if any(padding) else features


class Encoder(nn.Module):
    """ResNet-like pyramid: features of one image at every level.

    ``forward``: ``(B, in_channels, X, Y, Z)`` -> list over levels of ``(B, channels[l], ceil(X / 2^l), ...)``.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], convolutions: int = 2, groups: int = 4) -> None:
        super().__init__()
        self.projection = nn.Conv3d(in_channels, channels[0], kernel_size=1)
        self.downsamplings = nn.ModuleList(Downsampling(fine, coarse) for fine, coarse in pairwise(channels))
        self.blocks = nn.ModuleList(ConvBlock(c, c, convolutions, groups) for c in channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        skip = self.projection(fastest_layout(image))
        levels = [self.blocks[0](skip)]
        for downsampling, block in zip(self.downsamplings, self.blocks[1:], strict=True):
            skip = downsampling(levels[-1], skip)
            levels.append(block(skip))
        return levels


class ControlPointHead(nn.Module):
    """Features of both images, warped to the middle -> cubic B-spline control points, within the bound.

    ``forward``: two ``(B, C, X, Y, Z)`` -> two ``(B, 3, X, Y, Z)``, voxels of the level: the update of the
    first image's side and that of the second's. Exchanging the inputs exchanges the outputs.
    """

    def __init__(self, in_channels: int, channels: int, bound: float, convolutions: int = 2, groups: int = 4) -> None:
        super().__init__()
        self.bound = bound
        self.block = ConvBlock(2 * in_channels, channels, convolutions, groups)
        self.final = nn.Conv3d(channels, 3, kernel_size=1)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        difference, total = first - second, first + second
        both_orders = torch.cat([torch.cat([difference, total], dim=1), torch.cat([-difference, total], dim=1)], dim=0)
        raw = self.final(self.block(both_orders))
        with torch.autocast(raw.device.type, enabled=False):
            raw = raw if raw.dtype == torch.float64 else raw.float()
            control_points = self.bound * torch.tanh(raw)
        forward, reverse = control_points.chunk(2, dim=0)
        return forward, reverse
