"""Intensity normalisation: any brain scan as a volume like those the network was trained on, and its brain mask.

A training volume has intensities 0..255, exactly 0 outside the brain and above 0 inside. Every scan is brought to this
form, whatever its contrast, number type, unit or background value.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.resampling import resample

Mask = NDArray[np.bool_]
Matrix = NDArray[np.float64]

LOWEST, HIGHEST = 0.1, 99.9  # percentiles of the brain's intensities that become 0 and 255, robust against outliers
SMALLEST = 1.0  # of 255, the least intensity inside the mask: the smallest above 0 in a uint8 file
_BACKGROUND = 1 / 510  # share of the intensity range that is still background: rounding to 0..255 makes it 0
_Z_SCORED = 0.1  # range below the background's value against that above: in z-scored brains it lies amid the tissue's,
_ROUNDING = 1e-6  # so that only voxels equal to it are background
_NOISE = 5.0  # standard deviations of the border's noise that are still background
_MAD = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
# Interpolation by splines or windowed sinc leaves ripples around a stripped brain. Of the voxels brighter than the
# background they have 7 % and more below _RIPPLE of the range, unrippled brains 2 % and less.
_RIPPLE, _FAINT = 0.04, 0.04
_RIPPLES_BELOW = 0.25  # largest share of ripples darker than the background; in z-scored brains it is that of tissue
_KEPT = 0.65  # least share of the foreground that is left without ripples; else its dim voxels are tissue
_LEAST_LITRES = 0.01  # of a field of view: less comes from voxel sizes in another unit
_SMALLEST_BRAIN = 1000.0  # mm^3; a smaller foreground is no brain (a newborn's has 300 000)


def support_mask(image: NDArray[Any], affine: Matrix, name: str = "image") -> Mask:
    """Finds where a skull-stripped image is not background.

    The background has the median value of the border, give or take noise, and is connected to the border, so that a
    dark voxel inside the brain is not background. Of the rest only the largest connected piece is kept. Ripples of
    interpolation around the brain are background, too.

    Args:
        image: ``(X, Y, Z)``, any number type and unit; the background may have any value.
        affine: ``(4, 4)`` voxel-to-world matrix, RAS, mm.
        name: of the image, for errors.

    Returns:
        bool, ``(X, Y, Z)``.

    Raises:
        InputError: the image shows nothing but background.
    """
    values = np.asarray(image, dtype=np.float32)
    border = np.concatenate([values.take(index, axis).ravel() for axis in range(3) for index in (0, -1)])
    level = np.median(border)
    low, high = (abs(float(value)) for value in np.percentile(values, (LOWEST, HIGHEST)) - level)
    z_scored = min(low, high) > _Z_SCORED * max(low, high)
    noise = _MAD * float(np.median(np.abs(border - level)))
    tolerance = max((_ROUNDING if z_scored else _BACKGROUND) * max(low, high), _NOISE * noise)
    inside = _foreground(np.abs(values - level) <= tolerance)
    limit = _BACKGROUND * max(low, high)
    if _NOISE * noise <= limit and _has_ripples(values, level, limit, high):
        without = _foreground(values - level <= _RIPPLE * high)
        if without.sum() >= _KEPT * np.count_nonzero(values - level > limit):
            inside = without
    problem = (
        "nothing but background, or tissue up to the borders of its field of view; choose another image, or give the "
        "brain's mask (`fixed_mask` or `moving_mask`), with `align=none` if the headers place both scans"
    )
    litres = values.size * abs(float(np.linalg.det(affine[:3, :3]))) / 1e6
    if litres < _LEAST_LITRES:
        problem = (
            f"its field of view has {litres:.2g} litres, too few for a brain; correct the voxel size in the header"
        )
    return _check_size(inside, affine, name, problem)


def _foreground(like_border: Mask) -> Mask:
    """The largest piece of what is not connected to the border through voxels that are like it."""
    ground = np.pad(like_border, 1, constant_values=True)  # one voxel more on each side, which connects all background
    pieces, _ = ndimage.label(ground)
    return _largest_piece((pieces != pieces[0, 0, 0])[1:-1, 1:-1, 1:-1])


def _has_ripples(values: NDArray[np.float32], level: float, limit: float, high: float) -> bool:
    """Whether a stripped image has ripples around the brain: many voxels just above the background's value."""
    above = np.count_nonzero(values > level + limit)
    faint = above - np.count_nonzero(values > level + _RIPPLE * high)
    below = np.count_nonzero(values < level - limit)
    return bool(faint > _FAINT * above and below < _RIPPLES_BELOW * (above + below))


def mask_on_grid(
    mask: NDArray[Any], mask_affine: Matrix, shape: Sequence[int], affine: Matrix, name: str = "mask"
) -> Mask:
    """Resamples a brain mask to the grid of its image.

    Args:
        mask: ``(X, Y, Z)``, above 0 inside; its grid may be another one than the image's.
        mask_affine: ``(4, 4)`` the mask's voxel-to-world matrix, RAS, mm.
        shape: ``(X, Y, Z)`` of the image.
        affine: ``(4, 4)`` the image's voxel-to-world matrix, RAS, mm.
        name: of the mask, for errors.

    Returns:
        bool, ``shape``.

    Raises:
        InputError: the mask is empty there.
    """
    inside = (np.asarray(mask) > 0).astype(np.float32)
    placed = resample(inside, mask_affine, np.eye(4), shape, affine) >= 0.5
    problem = "the mask is empty on the image's grid, or its header places it elsewhere; give the mask of this image"
    return _check_size(placed, affine, name, problem)


def normalise(image: NDArray[Any], mask: Mask, name: str = "image") -> NDArray[np.float32]:
    """Scales intensities as in the training data: the brain's robust range to 0..255, exactly 0 outside the mask.

    Args:
        image: ``(X, Y, Z)``, any number type and unit.
        mask: bool, ``(X, Y, Z)``, not empty.
        name: of the image, for errors.

    Returns:
        float32, ``(X, Y, Z)``, inside the mask ``SMALLEST`` to 255.

    Raises:
        InputError: the image is constant inside the mask.
    """
    values = np.asarray(image, dtype=np.float32)
    low, high = (float(value) for value in np.percentile(values[mask], (LOWEST, HIGHEST)))
    if not high > low:
        raise InputError(f"{name}: all voxels inside the mask are {low:g}; choose another image or mask")
    scaled = np.clip((values - np.float32(low)) * np.float32(255 / (high - low)), SMALLEST, 255)
    return np.where(mask, scaled, np.float32(0))


def conform(
    image: NDArray[Any],
    affine: Matrix,
    mask: Mask,
    prealign: Matrix,
    shape: Sequence[int],
    model_affine: Matrix,
    name: str = "image",
) -> tuple[NDArray[np.float32], Mask]:
    """Normalises an image and samples it once on the model's grid.

    The image is smoothed first along axes where the model's voxels are larger. Image and mask are sampled separately,
    then the image is divided by the mask, so that the background does not darken the rim of the brain.

    Args:
        image: ``(X, Y, Z)``, any number type and unit.
        affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm.
        mask: bool, ``(X, Y, Z)``: the brain.
        prealign: ``(4, 4)``, the image's world -> the model's world, RAS, mm.
        shape: ``(X, Y, Z)`` of the model's grid.
        model_affine: ``(4, 4)`` the model's voxel-to-world matrix, RAS, mm.
        name: of the image, for errors.

    Returns:
        float32 0..255, ``shape``, exactly 0 outside the brain and at least ``SMALLEST`` inside; and the brain, bool.

    Raises:
        InputError: the image is constant inside the mask, or none of the brain lies in the model's grid.
    """
    to_image = inverse(affine) @ inverse(prealign) @ model_affine  # model voxels -> image voxels
    sigma = smoothing(to_image)
    channels = np.stack([normalise(image, mask, name), mask.astype(np.float32)], axis=-1)
    for channel in range(2):
        channels[..., channel] = ndimage.gaussian_filter(channels[..., channel], sigma, mode="nearest")
    sampled = resample(channels, affine, inverse(prealign), shape, model_affine)
    share = sampled[..., 1]
    problem = "no brain in the model's field of view; align the images (`align=each`) or correct the header"
    brain = _check_size(share >= 0.5, model_affine, name, problem)
    values = np.divide(sampled[..., 0], share, out=np.zeros_like(share), where=brain)
    return np.where(brain, np.clip(values, SMALLEST, 255), np.float32(0)), brain


def smoothing(to_image: Matrix) -> tuple[float, ...]:
    """Standard deviations to smooth an image by before it is sampled linearly on a coarser grid.

    A voxel is modelled as a box of variance 1/12. The Gaussian's variance is that of the coarser grid's box
    minus that of the image's, minus 1/6, the mean variance of linear interpolation over all positions between voxels.

    Args:
        to_image: ``(4, 4)``, voxels of the grid -> voxels of the image.

    Returns:
        standard deviation along each axis of the image, its voxels; 0 where the grid is hardly coarser.
    """
    ratio = np.linalg.norm(to_image[:3, :3], axis=1)
    return tuple(float(sigma) for sigma in np.sqrt(np.maximum((ratio**2 - 1) / 12 - 1 / 6, 0)))


def inverse(matrix: Matrix) -> Matrix:
    """The inverse of a ``(4, 4)`` matrix, float64."""
    return np.asarray(np.linalg.inv(matrix), dtype=np.float64)


def _largest_piece(inside: Mask) -> Mask:
    pieces, count = ndimage.label(inside)
    if count < 2:
        return inside
    sizes = np.bincount(pieces.ravel())
    return np.asarray(pieces == 1 + int(sizes[1:].argmax()), dtype=np.bool_)


def _check_size(mask: Mask, affine: Matrix, name: str, problem: str) -> Mask:
    if mask.sum() * abs(float(np.linalg.det(affine[:3, :3]))) < _SMALLEST_BRAIN:
        raise InputError(f"{name}: {problem}")
    return mask
