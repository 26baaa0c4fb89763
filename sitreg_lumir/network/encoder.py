"""The feature pyramid: what the network sees of an image at every level."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from sitreg_lumir.network.layers import ConvBlock, Convolution, convolve, fastest_layout


class Downsampling(nn.Module):
    """Half resolution: a strided convolution of the features plus the averaged, projected skip path.

    Averages over 2x2x2 voxels (zeros beyond the end count) and their projection are one strided convolution, too.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.convolution = Convolution(in_channels, channels, kernel_size=2, stride=2)
        self.projection = Convolution(in_channels, channels, kernel_size=1)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """The next level before its block, from the features of this one and the skip path."""
        main: Tensor = self.convolution(_pad_to_even(features))
        averaging = (self.projection.weight / 8).expand(-1, -1, 2, 2, 2)
        return main + convolve(_pad_to_even(skip), averaging, self.projection.bias, stride=2)


def _pad_to_even(features: Tensor) -> Tensor:
    """One voxel of zeros at the end of each axis of odd length."""
    padding = [pad for size in reversed(features.shape[2:]) for pad in (0, size % 2)]
    return F.pad(features, padding) if any(padding) else features


class Encoder(nn.Module):
    """ResNet-like pyramid: features of images at every level.

    ``forward``: ``(B, in_channels, X, Y, Z)`` -> a list over levels of ``(B, channels[l], ceil(X / 2^l), ...)``,
    finest first.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], convolutions: int = 2, groups: int = 4) -> None:
        super().__init__()
        self.projection = Convolution(in_channels, channels[0], kernel_size=1)
        self.downsamplings = nn.ModuleList(Downsampling(fine, coarse) for fine, coarse in pairwise(channels))
        self.blocks = nn.ModuleList(ConvBlock(c, c, convolutions, groups) for c in channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features at every level, finest first, of ``(B, in_channels, X, Y, Z)``."""
        skip = fastest_layout(self.projection(images))
        features = [self.blocks[0](skip)]
        for downsampling, block in zip(self.downsamplings, self.blocks[1:], strict=True):
            skip = downsampling(features[-1], skip)
            features.append(block(skip))
        return features
