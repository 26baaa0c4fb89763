"""The feature pyramid and the head that turns features into bounded control points."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sitreg_lumir.deform import autograd
from sitreg_lumir.network.layers import Convolution, GroupNormRelu, convolve

_SLOW_ALONE = 20_480  # up to so many values in a plane, PyTorch on a CPU has fast convolutions for batches only


class ConvBlock(nn.Module):
    """Convolutions 3x3x3, each followed by group normalisation and ReLU; zero padding keeps the shape."""

    def __init__(self, in_channels: int, channels: int, convolutions: int = 2, groups: int = 4) -> None:
        super().__init__()
        inputs = [in_channels] + [channels] * (convolutions - 1)
        self.convolutions = nn.ModuleList(Convolution(c, channels, kernel_size=3, padding=1) for c in inputs)
        self.normalizers = nn.ModuleList(GroupNormRelu(groups, channels) for _ in inputs)

    def forward(self, features: Tensor) -> Tensor:
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


def slow_alone(volume: Tensor, channels: int) -> bool:
    """Whether single volumes ``(1, ..., X, Y, Z)`` of so many channels are convolved several times slower than two."""
    x, y = volume.shape[2:4]
    return volume.device.type == "cpu" and len(volume) == 1 and channels * x * y <= _SLOW_ALONE


class Downsampling(nn.Module):
    """Half resolution: a strided convolution of the features plus the averaged, projected skip path.

    Averages over 2x2x2 voxels (zeros beyond the end count) and their projection are one strided convolution, too.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.convolution = Convolution(in_channels, channels, kernel_size=2, stride=2)
        self.projection = Convolution(in_channels, channels, kernel_size=1)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        main: Tensor = self.convolution(_pad_to_even(features))
        averaging = (self.projection.weight / 8).expand(-1, -1, 2, 2, 2)
        return main + convolve(_pad_to_even(skip), averaging, self.projection.bias, stride=2)


def _pad_to_even(features: Tensor) -> Tensor:
    """One voxel of zeros at the end of each axis of odd length."""
    padding = [pad for size in reversed(features.shape[2:]) for pad in (0, size % 2)]
    return F.pad(features, padding) if any(padding) else features


class Encoder(nn.Module):
    """ResNet-like pyramid: features of two images at every level.

    ``forward``: two ``(B, in_channels, X, Y, Z)`` -> per image a list over levels of
    ``(B, channels[l], ceil(X / 2^l), ...)``, finest first.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], convolutions: int = 2, groups: int = 4) -> None:
        super().__init__()
        self.projection = Convolution(in_channels, channels[0], kernel_size=1)
        self.downsamplings = nn.ModuleList(Downsampling(fine, coarse) for fine, coarse in pairwise(channels))
        self.blocks = nn.ModuleList(ConvBlock(c, c, convolutions, groups) for c in channels)

    def finest(self, image: Tensor) -> list[Tensor]:
        """One image's features of full resolution alone."""
        return [self.blocks[0](self.projection(fastest_layout(image)))]

    def forward(self, first: Tensor, second: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        levels: tuple[list[Tensor], list[Tensor]] = [], []
        batches = [first, second]
        if slow_alone(first, self.projection.out_channels):
            batches = [torch.cat(batches)]
        finest, skips = [], []
        for images in batches:
            skip = self.projection(fastest_layout(images))
            features = self.blocks[0](skip)
            finest.extend(features.chunk(2 // len(batches)))
            if self.downsamplings:
                skips.append(self.downsamplings[0](features, skip))
            del skip
        for own, features in zip(levels, finest, strict=True):
            own.append(features)
        if skips:  # from here on always in one batch: volumes are small
            skip = torch.cat(skips)
            for level, block in enumerate(self.blocks[1:], start=1):
                features = block(skip)
                for own, half in zip(levels, features.chunk(2), strict=True):
                    own.append(half)
                if level < len(self.downsamplings):
                    skip = self.downsamplings[level](features, skip)
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
        self.final = Convolution(channels, 3, kernel_size=1)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.from_sum_and_difference([first + second, first - second])

    def from_sum_and_difference(self, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The same from ``[first + second, first - second]``, taken out of the list to be let go when they are used.

        The first convolution is linear and sees the difference beside the sum: its two halves give both orders.
        """
        convolution = self.block.convolutions[0]
        assert isinstance(convolution, Convolution)
        if slow_alone(parts[0], parts[0].shape[1]):
            total, difference = parts
            both = [torch.cat([difference, total], dim=1), torch.cat([-difference, total], dim=1)]
            raw = self.final(self.block(torch.cat(both)))
            return self._bounded(raw[: len(total)]), self._bounded(raw[len(total) :])
        of_difference, of_sum = convolution.weight.chunk(2, dim=1)
        odd = convolve(fastest_layout(parts.pop()), of_difference, padding=1)
        even = convolve(fastest_layout(parts.pop()), of_sum, convolution.bias, padding=1)
        if torch.is_grad_enabled():
            orders: Tensor = autograd.SumAndDifference.apply(even, odd)
            del even, odd
            raw, raw_reverse = self.final(self.block.after_first(orders)).chunk(2)
        else:  # one order after the other takes half the memory
            waiting = [even - odd, even.add_(odd)]
            del even, odd
            raw, raw_reverse = (self.final(self.block.after_first(waiting.pop())) for _ in range(2))
        return self._bounded(raw), self._bounded(raw_reverse)

    def _bounded(self, raw: Tensor) -> Tensor:
        with torch.autocast(raw.device.type, enabled=False):
            return self.bound * torch.tanh(raw if raw.dtype == torch.float64 else raw.float())
