"""The clean and the augmented view of an image, made on its device."""

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.data.curves import apply_curve, random_curve

_CURVES = 4  # the first word of the curves' seeds: of no other kind of draws


def clean_view(stored: Tensor) -> tuple[Tensor, Tensor]:
    """What the loss compares: intensities 0..1, and the mask of the brain.

    Args:
        stored: stored intensities 0..255, any shape and number type.

    Returns:
        ``stored / 255`` float32, and ``stored > 0`` bool, both of the same shape.

    Examples:
        >>> image, mask = sitreg_lumir.clean_view(torch.tensor([0, 51, 255]))
        >>> image, mask
        (tensor([0.0000, 0.2000, 1.0000]), tensor([False,  True,  True]))
    """
    return stored.float() / 255, stored > 0


def downsampled_by_two(clean: Tensor) -> tuple[Tensor, Tensor]:
    """A clean view at half resolution: means of 2x2x2 voxels, and the mask of where they are above 0.

    Args:
        clean: ``(B, 1, X, Y, Z)``; the last plane of an odd axis is left out.

    Returns:
        the view and the bool mask, ``(B, 1, X // 2, Y // 2, Z // 2)``.
    """
    coarse = F.avg_pool3d(clean, 2)
    return coarse, coarse > 0


class Augmentation:
    """What the network sees instead of the clean view: blur, gamma, inversion, noise, then the mask again.

    The views stand for contrasts and scanners that training never shows, and must leave the anatomy readable
    for MIND, which keeps the local pattern of differences and forgets their sign and size. Probabilities and
    ranges are our choice, the paper states none. Each step is left out for half of the images, so that plain
    T1 stays common and combinations vary.

    * Blur up to a standard deviation of 1 voxel (2.4 voxels full width at half maximum): thick slices and
      other resolutions; more would close the sulci. Background enters at the rim, as in partial volume.
    * Gamma ``max * (I / max) ** gamma`` from 0.67 to 1.5, as often above as below 1: other contrast between
      the same tissues, the order of which stays; beyond, grey and white matter (about 0.2 apart) come too
      close to the noise.
    * Inversion, inside the mask ``I -> 1 - I``: a T2-like order. MIND ignores it inside and sees the rim
      change.
    * Noise up to a standard deviation of 0.05: a noisy scan. MIND divides by the local variance, so that
      where tissue is flat any noise becomes pattern; at 0.05 the edges between tissues still stand out about
      fourfold. The values are not clipped to 0..1: clipping would make flat patches where the image is near 0
      or 1.

    * Off by default, random curves of intensity inside the mask, after gamma: half of them only rise or only fall, the
      others also change the order of the tissues (:mod:`~sitreg_lumir.data.curves`), as FLAIR, T2* and proton
      density do. Their draws are their own: switching them on changes no other.

    A pure function of the image and its seed. The noise is drawn on the image's device, so that it differs
    between CPU and GPU, all else does not.

    Args:
        blur_probability, gamma_probability, inversion_probability, noise_probability: in 0..1.
        blur_sigma: range of the standard deviation, voxels, uniform.
        gamma: range of the exponent, uniform in its logarithm.
        noise_sigma: range of the standard deviation, in units of the 0..1 intensities, uniform.
        curve_probability: in 0..1, of a random curve of intensity.

    Raises:
        ValueError: a probability or range that makes no sense.

    Examples:
        >>> image = torch.rand(1, 1, 8, 10, 6)
        >>> augmentation = sitreg_lumir.Augmentation(noise_probability=1.0)
        >>> augmented = augmentation(image, image > 0.2, torch.tensor([3]))
        >>> bool((augmented[image <= 0.2] == 0).all())
        True
    """

    def __init__(
        self,
        blur_probability: float = 0.5,
        blur_sigma: tuple[float, float] = (0.0, 1.0),
        gamma_probability: float = 0.5,
        gamma: tuple[float, float] = (0.67, 1.5),
        inversion_probability: float = 0.5,
        noise_probability: float = 0.5,
        noise_sigma: tuple[float, float] = (0.0, 0.05),
        curve_probability: float = 0.0,
    ) -> None:
        self.probabilities = (blur_probability, gamma_probability, inversion_probability, noise_probability)
        if not all(0 <= p <= 1 for p in (*self.probabilities, curve_probability)):
            raise ValueError(
                f"augmentation probabilities must lie in 0..1, got {self.probabilities} and {curve_probability}"
            )
        for name, (low, high) in (("blur_sigma", blur_sigma), ("gamma", gamma), ("noise_sigma", noise_sigma)):
            if not 0 <= low <= high or (name == "gamma" and low == 0):
                raise ValueError(
                    f"augmentation range {name} must be (low, high) with 0 <= low <= high, got {low, high}"
                )
        self.blur_sigma = blur_sigma
        self.gamma = gamma
        self.noise_sigma = noise_sigma
        self.curve_probability = (curve_probability,)  # a tuple as all of them, for the card

    @torch.no_grad()
    def __call__(self, image: Tensor, mask: Tensor, seeds: Tensor) -> Tensor:
        """The augmented views.

        Args:
            image: clean views, ``(B, 1, X, Y, Z)``, 0..1; left as they are.
            mask: bool, the same shape.
            seeds: ``(B,)`` int64, one per image.

        Returns:
            ``(B, 1, X, Y, Z)`` float32, exactly 0 outside the mask.
        """
        if image.ndim != 5 or mask.shape != image.shape or seeds.shape != image.shape[:1]:
            raise ValueError(
                f"expected image and mask (B, 1, X, Y, Z) and seeds (B,), got {tuple(image.shape)}, "
                f"{tuple(mask.shape)} and {tuple(seeds.shape)}"
            )
        with torch.autocast(image.device.type, enabled=False):
            views = [
                self._augment(single.float(), inside, seed)
                for single, inside, seed in zip(image, mask, seeds.tolist(), strict=True)
            ]
        return torch.stack(views)

    def _augment(self, image: Tensor, mask: Tensor, seed: int) -> Tensor:
        """One image, ``(1, X, Y, Z)``; all parameters are drawn, needed or not, that none shifts another."""
        from monai.transforms import AdjustContrast, GaussianSmooth  # type: ignore[attr-defined]

        draws = torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        blur, gamma, inversion, noise = (
            draw < probability for draw, probability in zip(draws[:4], self.probabilities, strict=True)
        )
        if blur:
            image = _plain(GaussianSmooth(sigma=_between(*self.blur_sigma, draws[4]))(image))
        if gamma:
            low, high = (math.log(limit) for limit in self.gamma)
            image = _plain(AdjustContrast(gamma=math.exp(_between(low, high, draws[5])))(image))
        image = self._curved(image, mask, seed)
        if inversion:
            image = torch.where(mask, 1 - image, 0.0)
        if noise:
            generator = torch.Generator(image.device).manual_seed((seed + 1) % 2**63)  # another stream than the draws
            normal = torch.randn(image.shape, generator=generator, device=image.device)
            image = image + _between(*self.noise_sigma, draws[6]) * normal
        return torch.where(mask, image, 0.0)

    def _curved(self, image: Tensor, mask: Tensor, seed: int) -> Tensor:
        """Perhaps with a random curve of intensity, by draws of its own."""
        (probability,) = self.curve_probability
        if not probability:
            return image
        words = np.random.SeedSequence((_CURVES, seed)).generate_state(3, np.uint64)
        curved, monotone = (float(word) / 2**64 for word in words[:2])
        if curved >= probability:
            return image
        return torch.where(mask, apply_curve(image, random_curve(int(words[2]), monotone < 0.5)), image)


def _between(low: float, high: float, fraction: float) -> float:
    return low + (high - low) * fraction


def _plain(image: object) -> Tensor:
    """A plain tensor: MONAI's transforms wrap theirs with metadata."""
    return cast(Tensor, image).as_subclass(Tensor)
