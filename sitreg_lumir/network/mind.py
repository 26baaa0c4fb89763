"""The MIND descriptor: what a voxel's neighbourhood looks like, whatever the contrast."""

import torch
from torch import Tensor, nn

from sitreg_lumir.deform.backends.torch.images import mind_distances
from sitreg_lumir.deform.ops import mind


class Mind(nn.Module):
    """Six channels that compare each voxel's patch with its six neighbours' patches.

    ``exp(-D_r / V)`` with ``D_r`` the Gaussian-weighted squared difference to the patch shifted by ``r`` and
    ``V`` the mean of the six. An affine change of the intensities changes nothing. Where ``V <= 1e-6`` (flat
    background) the descriptor is 1. Always computed in float32 (or float64), outside autocast.

    ``forward``: ``(B, 1, X, Y, Z)``, intensity in [0, 1] -> ``(B, 6, X, Y, Z)``, no unit, in (0, 1].

    Args:
        sigma: of the patch's Gaussian ``exp(-|p|^2 / sigma^2)``, voxels.
        radius: of the patch, voxels.

    Examples:
        >>> image = torch.rand(1, 1, 8, 10, 6)
        >>> features = sitreg_lumir.Mind()(image)
        >>> features.shape, bool(torch.allclose(features, sitreg_lumir.Mind()(1 - image), atol=1e-5))
        (torch.Size([1, 6, 8, 10, 6]), True)

    Source: Heinrich et al., MIND, Medical Image Analysis 2012; sigma 0.5: Honkamaa & Marttinen 2025. The order
    of the channels, the edge replication and the guard are this project's.
    """

    channels = 6

    def __init__(self, sigma: float = 0.5, radius: int = 2) -> None:
        super().__init__()
        if sigma <= 0 or radius < 1:
            raise ValueError(f"MIND needs sigma > 0 and radius >= 1, got {sigma} and {radius}")
        self.sigma = sigma
        self.radius = radius

    def forward(self, image: Tensor) -> Tensor:
        """The descriptor ``(B, 6, X, Y, Z)`` of images ``(B, 1, X, Y, Z)``."""
        return mind(image if image.dtype == torch.float64 else image.float(), self.sigma, self.radius)

    def distances(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Patch distances ``(B, 6, X, Y, Z)`` and their mean ``(B, 1, X, Y, Z)``, squared intensity."""
        return mind_distances(image, self.sigma, self.radius)
