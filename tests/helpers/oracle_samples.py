"""Fixtures of the stored oracles' form for any seed, computed in float64 by this package.

The stored ones decide what is right. Once the package equals them in float64, its own values for other seeds show
whether a comparison in float32 holds wherever the kinks happen to lie.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.deform.ops import upsample_control_points
from sitreg_lumir.network.official import official_name
from sitreg_lumir.network.sitreg import SITReg

_FINAL_SCALES = (0.075, 0.1, 0.23, 0.7)  # of the heads' last weights, finest first: fields of a few voxels


def smooth_images(seed: int, count: int, shape: Sequence[int]) -> Tensor:
    """Random textures in [0, 1], ``(count, 1, X, Y, Z)``."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 1, *shape)
    for size, weight in ((4, 1.0), (8, 0.6), (16, 0.3)):
        noise = torch.randn(count, 1, size, size, size, generator=generator)
        total += weight * F.interpolate(noise, size=tuple(shape), mode="trilinear", align_corners=False)
    low, high = total.amin((2, 3, 4), keepdim=True), total.amax((2, 3, 4), keepdim=True)
    return (total - low) / (high - low)


def random_network(seed: int) -> SITReg:
    """A network of four levels for one channel, with weights as spread as those of the stored fixtures."""
    generator = torch.Generator().manual_seed(seed)
    network = SITReg(1, (8, 16, 16, 16), (8, 16, 16, 16))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "normalizers" in name:
                parameter.copy_(0.15 * values + name.endswith("weight"))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * values)
            elif ".final." in name:
                parameter.copy_(_FINAL_SCALES[int(name.split(".")[1])] * values)
            else:
                parameter.copy_(values * math.sqrt(2 / parameter[0].numel()))
    return network


def network_sample(seed: int, shape: Sequence[int] = (19, 26, 21), batch: int = 2) -> dict[str, Tensor]:
    """Parameters and images of a network fixture; gradients are computed where they are compared."""
    images = smooth_images(1000 + seed, 2 * batch, shape)
    tensors = {"image_1": images[:batch].clone(), "image_2": images[batch:].clone()}
    for name, value in random_network(seed).state_dict().items():
        tensors[f"param/{official_name(name)}"] = value
    return tensors


def random_field(generator: torch.Generator, shape: Sequence[int], factor: int, share: float, batch: int = 1) -> Tensor:
    """A cubic B-spline field in float32, voxels; it can be inverted for ``share`` below 1."""
    size = [-(-n // factor) for n in shape]
    control_points = 0.4 * share * (2 * torch.rand(batch, 3, *size, generator=generator) - 1)
    return upsample_control_points(control_points, factor, shape)


def similarity_sample(seed: int, shape: Sequence[int] = (14, 20, 16)) -> dict[str, Tensor]:
    """Images, masks and fields of the similarity with warping, without values."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, name in enumerate(("forward", "inverse"), start=1):
        tensors[f"image_{index}"] = smooth_images(2000 + 2 * seed + index, 1, shape)
        tensors[f"mask_{index}"] = _ellipsoid(generator, shape)
        tensors[f"{name}_displacement"] = 1.4 * random_field(generator, shape, 4, 0.9)
    return tensors


def group_sample(seed: int, shape: Sequence[int] = (14, 20, 16)) -> dict[str, Tensor]:
    """Fields of three pairs and masks of three images, without values."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"mask_{k}": _ellipsoid(generator, shape) for k in (1, 2, 3)}
    for kind in ("forward", "inverse"):
        tensors |= {f"{kind}_{k}": random_field(generator, shape, 4, 0.9) for k in (1, 2, 3)}
    return tensors


def _ellipsoid(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """A mask of most of the volume, ``(1, 1, X, Y, Z)``, uint8."""
    axes = [torch.linspace(-1, 1, size) for size in shape]
    radii = 0.85 + 0.3 * torch.rand(3, generator=generator)
    distance = sum(
        (axis / radius) ** 2 for axis, radius in zip(torch.meshgrid(*axes, indexing="ij"), radii, strict=True)
    )
    return (distance < 1).to(torch.uint8)[None, None]
