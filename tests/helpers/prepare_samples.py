"""Brains and heads on any grid, made from the MNI152 template."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.preprocessing import align
from sitreg_lumir.preprocessing.intensity import inverse, smoothing
from sitreg_lumir.preprocessing.template import load_template

Array = NDArray[Any]


@dataclass
class Sample:
    """``truth`` ``(4, 4)`` maps the sample's world to the template's."""

    image: Array
    mask: Array
    affine: Array
    truth: Array


@contextmanager
def quick_alignment() -> Iterator[None]:
    """4.5 mm instead of 3 mm as the finest resolution of alignments: a third of the voxels."""
    align._template_levels.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "_FINEST_MM", 4.5)
        yield
    align._template_levels.cache_clear()


def turn(degrees: tuple[float, float, float], shift: tuple[float, float, float] = (0, 0, 0), scale: Any = 1) -> Array:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * scale
    matrix[:3, 3] = shift
    return matrix


def brain(truth: Array, spacing: tuple[float, float, float] = (3, 3, 3), inverted: bool = False) -> Sample:
    """The template's brain, placed where ``truth`` leads to the template; with dark and bright swapped if wanted."""
    template = load_template()
    image = np.where(template.mask, 280 - template.image, 0) if inverted else template.image
    return _sampled(image, template.mask, template.affine, truth, spacing)


def head(truth: Array, spacing: tuple[float, float, float] = (3, 3, 3)) -> Sample:
    """The template's brain within fluid, skull and scalp, with a neck: everything that a skull-stripped brain lacks."""
    plain = brain(np.eye(4), (2, 2, 2))
    pad = 14
    image, mask = np.pad(plain.image, pad), np.pad(plain.mask, pad)
    affine = plain.affine.copy()
    affine[:3, 3] -= 2 * pad
    neck = np.zeros_like(mask)
    neck[40:-40, 45:-60, : pad + 12] = True
    skull = ndimage.binary_closing(mask, iterations=6) | neck
    depth = ndimage.distance_transform_edt(~skull, sampling=2)
    image = np.select([mask, depth <= 3, depth <= 9, depth <= 16], [image, 45, 20, 230], 0)
    return _sampled(image, mask, affine, truth, spacing)


def _sampled(
    image: Array, mask: Array, image_affine: Array, truth: Array, spacing: tuple[float, float, float]
) -> Sample:
    to_world = inverse(truth) @ image_affine
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in image.shape])).reshape(3, -1)
    world = to_world[:3, :3] @ corners + to_world[:3, 3:]
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = world.min(axis=1)
    shape = np.ceil(np.ptp(world, axis=1) / spacing).astype(int) + 1
    sigma = smoothing(inverse(image_affine) @ truth @ affine)
    values, share = (
        resample(ndimage.gaussian_filter(volume.astype(np.float32), sigma), image_affine, truth, shape, affine)
        for volume in (image, mask)
    )
    inside = share >= 0.5
    return Sample(np.where(inside | bool((image[~mask] > 0).any()), values, 0), inside, affine, truth)


def apart(first: Array, second: Array, sample: Sample) -> float:
    """Largest distance, mm, between where two matrices take a sample's brain."""
    points = np.argwhere(sample.mask)[::50] @ sample.affine[:3, :3].T + sample.affine[:3, 3]
    difference = first - second
    return float(np.linalg.norm(points @ difference[:3, :3].T + difference[:3, 3], axis=1).max())
