"""The objective of instance optimisation: how alike the images are under a pair of fields, and how smooth these are.

Fields are ``(1, 3, X, Y, Z)``, voxels of the model's grid. Images are compared there, and perhaps on a finer grid too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.deform.ops import warp, warp_mask
from sitreg_lumir.losses import diffusion, ndv_sum
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.registration.contrast_transfer import (
    ComparedImage,
    channel_lncc,
    same_contrast,
    transfer_contrasts,
    without_lesion,
)


@dataclass(frozen=True, eq=False)
class ImagePair:
    """Both images of a pair on one grid, ``(1, 1, X, Y, Z)`` each.

    Attributes:
        fixed: in [0, 1].
        moving: in [0, 1].
        fixed_mask: the fixed brain, bool or 0/1.
        moving_mask: the moving brain, bool or 0/1.
        fixed_lesion: what has no counterpart in the moving image, bool or 0/1, or None.
        moving_lesion: what has no counterpart in the fixed image, bool or 0/1, or None.
    """

    fixed: Tensor
    moving: Tensor
    fixed_mask: Tensor
    moving_mask: Tensor
    fixed_lesion: Tensor | None = None
    moving_lesion: Tensor | None = None

    def to(self, device: torch.device) -> "ImagePair":
        """The same images on a device."""
        moved = {name: image.to(device) for name, image in vars(self).items() if image is not None}
        return replace(self, **moved)

    def check(self) -> None:
        """Refuses images that do not belong together.

        Raises:
            ValueError: names the first argument whose shape is wrong.
        """
        if self.fixed.ndim != 5 or tuple(self.fixed.shape[:2]) != (1, 1):
            shape = tuple(self.fixed.shape)
            raise ValueError(f"one pair at a time is optimised: fixed must be (1, 1, X, Y, Z), got {shape}")
        for name, image in vars(self).items():
            if image is not None and image.shape != self.fixed.shape:
                expected = tuple(self.fixed.shape)
                raise ValueError(f"{name} must be {expected} as fixed is, got {tuple(image.shape)}")

    def finer_factor(self, shape: Sequence[int]) -> int:
        """How many voxels of this grid divide a voxel of a grid of that shape, along each axis.

        Raises:
            ValueError: not the same whole number along all axes.
        """
        factor = self.fixed.shape[2] // shape[0]
        if factor < 1 or tuple(self.fixed.shape[2:]) != tuple(factor * size for size in shape):
            raise ValueError(f"finer must have a multiple of {tuple(shape)} voxels, got {tuple(self.fixed.shape[2:])}")
        return factor


@dataclass(frozen=True)
class Weights:
    """The LNCC's window, voxels, and the weights of the diffusion (a mean over voxels) and of the NDV (a sum)."""

    window: int
    diffusion: float
    ndv: float


class Value(NamedTuple):
    """The objective and its image term for a pair of fields, mean of both directions."""

    objective: float
    dissimilarity: float


class Comparison:
    """What is compared on one grid.

    Args:
        images: on that grid.
        factor: voxels of that grid along each axis of a voxel of the fields' grid.
        mind: its channels are compared; None for intensities.

    Attributes:
        compared: the features of both images that are compared.
    """

    def __init__(self, images: ImagePair, factor: int, mind: Mind | None) -> None:
        self.factor = factor
        self.images = (
            without_lesion(images.fixed, images.fixed_mask, images.fixed_lesion, mind),
            without_lesion(images.moving, images.moving_mask, images.moving_lesion, mind),
        )
        self.compared: tuple[ComparedImage, ComparedImage] = self.images

    def same_contrast(self, fields: Sequence[Tensor]) -> bool:
        """Whether both images have one contrast, by fields that may be rough."""
        return same_contrast(*self.images, *(self.upsampled(field) for field in fields))

    def transfer_contrasts(self, fields: Sequence[Tensor]) -> None:
        """Compares both images in the contrasts of both, matched by these fields."""
        self.compared = transfer_contrasts(*self.images, *(self.upsampled(field) for field in fields))

    def upsampled(self, field: Tensor) -> Tensor:
        """The field at the voxels of this grid, in its voxels, linear between its samples."""
        if self.factor == 1:
            return field
        return self.factor * F.interpolate(field, scale_factor=self.factor, mode="trilinear", align_corners=False)

    def dissimilarity(self, disp: Tensor, inverse: bool, window: int) -> Tensor:
        """The negative LNCC of the warped image, in [-1, 0].

        Args:
            disp: ``(1, 3, X, Y, Z)``, voxels of the fields' grid.
            inverse: whether it warps the fixed image, and not the moving one.
            window: of the LNCC, voxels of this grid.
        """
        target, source = self.compared[::-1] if inverse else self.compared
        disp = self.upsampled(disp)
        mask = warp_mask(source.mask, disp) & target.mask
        return channel_lncc(warp(source.values, disp), target.values, mask, window)


def objective(
    fields: Sequence[Tensor], comparisons: Sequence[Comparison], weights: Weights, learning: bool = False
) -> tuple[Value, list[Tensor]]:
    """The mean over both directions; with ``learning`` also each direction's gradient of the objective by its field.

    The image term is the mean over the grids on which images are compared. These gradients are computed here, before
    those of the maps, so that only one comparison's activations are in memory at a time. They are of a sum over voxels,
    so that their size, like Adam's epsilon, does not depend on the grid.

    Args:
        fields: both ways, voxels.
        comparisons: of each grid.
        weights: of the terms.
        learning: whether gradients are needed.
    """
    values: list[tuple[float, float]] = []
    gradients: list[Tensor] = []
    for inverse, field in enumerate(fields):
        disp = field.detach().requires_grad_(learning)
        gradient, image, total = torch.zeros(()), 0.0, 0.0
        for number, comparison in enumerate(comparisons):
            with torch.set_grad_enabled(learning):
                dissimilarity = comparison.dissimilarity(disp, bool(inverse), weights.window)
                term = dissimilarity / len(comparisons)
                if number == 0:
                    term = term + weights.diffusion * diffusion(disp) + weights.ndv * ndv_sum(disp)
                if learning:
                    (of_term,) = torch.autograd.grad(term * disp[0, 0].numel(), disp)
                    gradient = gradient + of_term if number else of_term
            image, total = image + float(dissimilarity.detach()) / len(comparisons), total + float(term.detach())
        if learning:
            gradients.append(gradient)
        values.append((total, image))
    return Value(*((forward + backward) / 2 for forward, backward in zip(*values, strict=True))), gradients
