"""The head: from the features of both images, met half-way, to an update that can be inverted."""

import torch
from torch import Tensor, nn

from sitreg_lumir.network.layers import ConvBlock, Convolution


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
        """Control points of both sides: see the class."""
        return self.both_orders(first + second, first - second)

    def both_orders(self, total: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
        """``forward`` from ``first + second`` and ``first - second``: one batch holds both orders."""
        orders = [torch.cat([difference, total], dim=1), torch.cat([-difference, total], dim=1)]
        raw, raw_reverse = self.final(self.block(torch.cat(orders))).chunk(2)
        return self.bounded(raw), self.bounded(raw_reverse)

    def bounded(self, raw: Tensor) -> Tensor:
        """Values of any size -> voxels of the level, within the bound; float32 or float64."""
        with torch.autocast(raw.device.type, enabled=False):
            return self.bound * torch.tanh(raw if raw.dtype == torch.float64 else raw.float())
