"""The MIND descriptor: what a voxel's neighbourhood looks like, whatever the contrast."""

import math
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEIGHBOURS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))


class Mind(nn.Module):
    """Six channels that compare each voxel's patch with its six neighbours' patches.

    ``exp(-D_r / V)`` with ``D_r`` the Gaussian-weighted squared difference to the patch shifted by ``r`` and
    ``V`` the mean of the six. An affine change of the intensities changes nothing. Where ``V <= 1e-6`` (flat
    background) the descriptor is 1. Always computed in float32 (or float64), outside autocast.

    ``forward``: ``(B, 1, X, Y, Z)``, intensity in [0, 1] -> ``(B, 6, X, Y, Z)``, no unit, in (0, 1].

    Args:
        sigma: of the patch's Gaussian ``exp(-|p|^2 / sigma^2)``, voxels.
        radius: of the patch, voxels.

    Source: Heinrich et al., MIND, Medical Image Analysis 2012; sigma 0.5: Honkamaa & Marttinen 2025. The order
    of the channels, the edge replication and the guard are this project's.
    """

    def __init__(self, sigma: float = 0.5, radius: int = 2) -> None:
        super().__init__()
        if sigma <= 0 or radius < 1:
            raise ValueError(f"MIND needs sigma > 0 and radius >= 1, got {sigma} and {radius}")
        self.sigma = sigma
        self.radius = radius

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 5 or image.shape[1] != 1:
            raise ValueError(f"image must be (B, 1, X, Y, Z), got {tuple(image.shape)}")
        with torch.autocast(image.device.type, enabled=False):
            image = image if image.dtype == torch.float64 else image.float()
            distance, variance = self.distances(image)
            flat = variance <= 1e-6
            return torch.exp(-distance / variance.masked_fill(flat, 1)).masked_fill(flat, 1)

    def distances(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Patch distances ``(B, 6, X, Y, Z)`` and their mean ``(B, 1, X, Y, Z)``, squared intensity."""
        reach = self.radius + 1
        padded = F.pad(image, (reach,) * 6, mode="replicate")
        centre = padded[:, :, 1:-1, 1:-1, 1:-1]
        distances = []
        for shift in NEIGHBOURS:
            slices = [slice(1 + step, size - 1 + step) for step, size in zip(shift, padded.shape[2:], strict=True)]
            distances.append(self._smooth((centre - padded[:, :, *slices]).square()))
        distance = torch.cat(distances, dim=1)
        return distance, distance.mean(dim=1, keepdim=True)

    def _smooth(self, squares: Tensor) -> Tensor:
        """Gaussian-weighted sum over the patch, one axis after the other; each shrinks by twice the radius."""
        weights = [math.exp(-(offset**2) / self.sigma**2) for offset in range(self.radius + 1)]
        for axis in (2, 3, 4):
            size = squares.shape[axis] - 2 * self.radius
            total = squares.narrow(axis, self.radius, size) * weights[0]
            for offset, side in product(range(1, self.radius + 1), (-1, 1)):
                total = total.add(squares.narrow(axis, self.radius + side * offset, size), alpha=weights[offset])
            squares = total
        return squares
