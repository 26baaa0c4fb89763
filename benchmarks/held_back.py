"""Training subjects that are held back, and scores of their pairs that need no labels.

Tissue classes are found in each image independently: intensities of three classes and a smooth bias field in turn.
Overlap of tissues rewards what label maps reward (cortex, white matter, ventricles, deep grey matter), but also fields
that match tissues by wild deformations: read it together with the folded volume, the spread of the volume change and
the error around a cycle of three people.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.data.images import Image
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.data.views import downsampled_by_two
from sitreg_lumir.deform.jacobian import jacobian_determinant
from sitreg_lumir.deform.ops import compose, mask_at, warp, warp_labels
from sitreg_lumir.io.read import read_volume
from sitreg_lumir.metrics import ndv

SEED, HELD_BACK = 2025, 24
TISSUES = {1: "outer CSF", 2: "cortex", 3: "white", 4: "ventricles", 5: "deep grey"}
_DEEP = 24.0  # mm from the brain's surface: farther inside, fluid is ventricles and grey matter the nuclei
_BIAS_SIGMA = 24.0  # mm, of the smooth field that intensities are divided by
_ROUNDS = 6  # of classes and field in turn


@dataclass(frozen=True)
class Brain:
    """One held-back image.

    Attributes:
        name: of its file.
        image: ``(1, 1, X, Y, Z)``, intensity in [0, 1].
        mask: bool, the brain.
        tissues: int64, the keys of ``TISSUES``, 0 outside.
    """

    name: str
    image: Tensor
    mask: Tensor
    tissues: Tensor


def split(root: Path, seed: int = SEED, count: int = HELD_BACK) -> tuple[list[Image], list[Image]]:
    """The training images of a data set: those that are trained on, and those held back, in a drawn order."""
    images = list(read_dataset(root, training=True).training)
    order = np.random.default_rng(seed).permutation(len(images))
    held = [images[index] for index in order[:count]]
    return [image for image in images if image not in held], held


def read_brain(image: Image, voxel_size: float) -> Brain:
    """One image with its tissues."""
    stored, _ = read_volume(image.path)
    inside = stored > 0
    values = stored.astype(np.float32) / 255
    classes = tissues(values, inside, voxel_size)
    return Brain(image.name, *(torch.from_numpy(array)[None, None] for array in (values, inside, classes)))


def tissues(values: NDArray[np.float32], inside: NDArray[np.bool_], voxel_size: float) -> NDArray[np.int64]:
    """Tissue classes of a T1 image of a skull-stripped brain.

    Args:
        values: ``(X, Y, Z)``, intensity.
        inside: the brain.
        voxel_size: mm.

    Returns:
        the keys of ``TISSUES``, 0 outside the brain.

    Source: classes and bias field in turn, after Van Leemput et al., Automated model-based tissue classification, 1999.
    """
    log = np.log(np.maximum(values, 1e-3), dtype=np.float32)
    sigma = _BIAS_SIGMA / voxel_size
    field = np.zeros_like(log)
    centres = np.quantile(values[inside], (0.1, 0.45, 0.8))
    for _ in range(_ROUNDS):
        even = values * np.exp(-field)
        for _ in range(20):
            limits = (centres[1:] + centres[:-1]) / 2
            classes = np.digitize(even, limits)
            centres = np.array([even[inside & (classes == k)].mean() for k in range(3)])
        weight = (inside & (classes > 0)).astype(np.float32)  # fluid is too dark to tell a factor
        off = np.where(weight > 0, log - np.log(centres[classes]), 0).astype(np.float32)
        field = ndimage.gaussian_filter(off, sigma) / np.maximum(ndimage.gaussian_filter(weight, sigma), 1e-3)
    depth = ndimage.distance_transform_edt(ndimage.binary_fill_holes(inside)) * voxel_size
    labels = np.where(inside, classes + 1, 0)
    labels[(labels == 1) & (depth > _DEEP)] = 4
    labels[(labels == 2) & (depth > _DEEP)] = 5
    return labels.astype(np.int64)


def score(disp: Tensor, disp_inv: Tensor, fixed: Brain, moving: Brain, voxel_size: float) -> dict[str, float]:
    """Scores of a pair's fields, each the mean of both directions.

    Returns:
        ``dice_<tissue>``, their mean ``dice``, correlation of the gradients' sizes ``edges``, ``ndv`` in percent, the
        standard deviation of the logarithm of the volume change ``log_jac``, and the mean distance in mm by which
        there and back misses the start, ``inverse_mm``; all but ``ndv`` in the brain.
    """
    ways = (_directed(disp, disp_inv, fixed, moving, voxel_size), _directed(disp_inv, disp, moving, fixed, voxel_size))
    return {name: (ways[0][name] + ways[1][name]) / 2 for name in ways[0]}


def _directed(disp: Tensor, back: Tensor, fixed: Brain, moving: Brain, voxel_size: float) -> dict[str, float]:
    inside = fixed.mask[0, 0]
    scores: dict[str, float] = {}
    warped = warp_labels(moving.tissues, disp)[0, 0]
    for value, name in TISSUES.items():
        first, second = warped == value, fixed.tissues[0, 0] == value
        scores[f"dice_{name}"] = float(2 * (first & second).sum() / (first.sum() + second.sum()).clamp(min=1))
    scores["dice"] = float(np.mean(list(scores.values())))
    sizes = [_edges(image)[inside] for image in (warp(moving.image, disp), fixed.image)]
    scores["edges"] = float(torch.corrcoef(torch.stack(sizes))[0, 1])
    scores["ndv"] = ndv(disp[0], fixed.mask[0, 0])
    inner = fixed.mask[0, 0, 1:-1, 1:-1, 1:-1]
    scores["log_jac"] = float(jacobian_determinant(disp)[0][inner].clamp(min=1e-3).log().std())
    both = inside & mask_at(moving.mask, disp, relative=True)[0, 0]
    scores["inverse_mm"] = float(compose(back, disp)[0].square().sum(0).sqrt()[both].mean()) * voxel_size
    return scores


def cycle_mm(disps: list[Tensor], first: Brain, voxel_size: float) -> float:
    """Mean distance by which three fields around a cycle miss the start, mm, in the brain whose grid it starts on.

    Args:
        disps: ``(1, 3, X, Y, Z)``, voxels: outermost first, the last on the grid of ``first``.
        first: whose voxels are followed.
        voxel_size: mm.
    """
    return float(compose(*disps)[0].square().sum(0).sqrt()[first.mask[0, 0]].mean()) * voxel_size


def _edges(image: Tensor) -> Tensor:
    """Size of the gradient, ``(X, Y, Z)``."""
    return torch.stack(torch.gradient(image[0, 0])).square().sum(0).sqrt()


def augmented(brain: Brain, half: bool) -> tuple[Tensor, Tensor]:
    """Image and mask, perhaps at half resolution."""
    return downsampled_by_two(brain.image) if half else (brain.image, brain.mask)


def full(field: Tensor, like: Tensor) -> Tensor:
    """A field, perhaps of half resolution, on the grid of an image, voxels."""
    if field.shape[2:] == like.shape[2:]:
        return field
    return 2 * F.interpolate(field, size=like.shape[2:], mode="trilinear", align_corners=False)


def mean_scores(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each score."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """A table with a row per choice."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| | " + " | ".join(name.removeprefix("dice_") for name in names) + " |", "|" + "---|" * (len(names) + 1)]
    for choice, row in rows.items():
        lines.append(f"| {choice} | " + " | ".join(f"{row[name]:.4g}" if name in row else "-" for name in names) + " |")
    return "\n".join(lines)
