"""What a file of a mask means, and whether it can be the mask of a scan's brain: refused in one line otherwise."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.orientation import spacing_of
from sitreg_lumir.io.read import Scan
from sitreg_lumir.preprocessing.intensity import HIGHEST, LOWEST, Mask, Matrix
from sitreg_lumir.preprocessing.skull_check import LARGEST_LITRES

SMALLEST_LITRES = 0.12
"""A smaller mask within the field of view is no brain: a newborn's has 0.3 litres."""
CUT_CM2 = 20.0
"""Largest connected area of a mask's surface that may run through tissue, as it does through the brainstem. Masks that
are 4 mm too small have 5, such that miss a fifth of the brain, are 8 mm too small or shifted by 15 mm 45 and more."""

_SIGNED = 0.35  # negative values against the largest: splines leave ripples of 0.2, signed distances are beyond
_LEVELS, _EQUAL = 0.35, 0.4  # of label maps: least share of voxels below the maximum, least share of equal neighbours
_SPREAD = 0.6  # largest share of a soft mask's voxels between a tenth and nine tenths of its maximum
_AIR = 0.35  # largest share of a mask that shows what the border of the field of view shows
_AIR_LEVEL = 0.15  # of the range of intensities: a border brighter than that is not air
_HOLE_LITRES = 0.1
_STEP_MM, _RAY_MM = 2.0, (2.0, 3.0, 4.0, 5.0)
_BAND = 1.2  # standard deviations around the brain's median that count as its tissue
_IN_BAND = 0.75  # share of the samples along a ray
_EDGE_MM = 4.0  # of the brain, left out of its median


def inside_of(values: NDArray[Any], name: str) -> Mask:
    """Where a mask's values say inside: above half of their maximum, or above 0 in a label map.

    Args:
        values: ``(X, Y, Z)``: two values, a soft mask (also with ripples of interpolation), or a label map.
        name: of the mask, for errors.

    Returns:
        bool, ``(X, Y, Z)``.

    Raises:
        InputError: the values are those of a signed distance or of an image.
    """
    low, high = float(values.min()), float(values.max())
    if low < 0 and (high <= 0 or -low > _SIGNED * high):
        raise InputError(
            f"{name}: holds values from {low:.4g} to {high:.4g}, as a signed distance does, and no mask; store 1 "
            "inside and 0 outside"
        )
    if _is_label_map(values, high):
        return np.asarray(values > 0, dtype=np.bool_)
    inside = values > high / 2
    if low < 0:  # with ripples, the maximum lies above the value of the inside
        high = float(np.median(values[inside]))
        inside = values > high / 2
    between = np.count_nonzero((values > 0.1 * high) & (values < 0.9 * high))
    if between > _SPREAD * np.count_nonzero(values > 0.1 * high):
        raise InputError(
            f"{name}: few of its values are 0 or the largest, {high:.4g}, so it is no mask but an image, a distance or "
            "a probability; store 1 inside and 0 outside"
        )
    return np.asarray(inside, dtype=np.bool_)


def _is_label_map(values: NDArray[Any], high: float) -> bool:
    """Whether values are whole numbers, several of them in pieces: labels, not steps of a soft mask."""
    labelled = values > 0
    below = labelled & (values < high)
    if np.count_nonzero(below) <= _LEVELS * np.count_nonzero(labelled):
        return False
    if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
        return False
    equal = (values[1:] == values[:-1]) & below[1:]
    return bool(np.count_nonzero(equal) > _EQUAL * np.count_nonzero(below[1:]))


def refuse_inverted(inside: Mask, affine: Matrix, name: str) -> None:
    """Refuses a mask that is 1 around a brain and 0 in it.

    Args:
        inside: bool, ``(X, Y, Z)``, on the mask's own grid.
        affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm.
        name: of the mask.

    Raises:
        InputError: it is.
    """
    faces = [inside.take(end, axis) for axis in range(3) for end in (0, -1)]
    if 2 * sum(np.count_nonzero(face) for face in faces) <= sum(face.size for face in faces) or inside.all():
        return
    pieces, _ = ndimage.label(~inside)
    sizes = np.bincount(pieces.ravel())
    hole = 1 + int(sizes[1:].argmax())
    litres = sizes[hole] * abs(float(np.linalg.det(affine[:3, :3]))) / 1e6
    touching = sum(np.count_nonzero(pieces.take(end, axis) == hole) for axis in range(3) for end in (0, -1))
    if litres > _HOLE_LITRES and touching < 0.05 * sizes[hole]:
        raise InputError(f"{name}: is inverted, 0 in a brain of {litres:.1f} litres and 1 around it; store 1 inside")


def check_mask(scan: Scan, brain: Mask, name: str) -> None:
    """Refuses a mask that cannot be that of a scan's brain, whatever the scan's contrast.

    Args:
        scan: that the mask belongs to.
        brain: bool, ``(X, Y, Z)`` of the scan.
        name: of the mask.

    Raises:
        InputError: the mask is too large or too small, lies on background, or its surface runs through tissue.
    """
    litres = brain.sum() * scan.spacing.prod() / 1e6
    if litres > LARGEST_LITRES:
        raise InputError(f"{name}: {litres:.1f} litres are too many for a brain; give the mask of the brain alone")
    faces = any(brain.take(end, axis).any() for axis in range(3) for end in (0, -1))
    if litres < SMALLEST_LITRES and not faces:
        raise InputError(f"{name}: {litres:.2g} litres are too few for a brain; give the mask of the whole brain")
    where = f"give the mask of {scan.path.name}, and see that both headers place it in the same world"
    air = _share_of_air(scan.data, brain)
    if air > _AIR:
        raise InputError(f"{name}: {air:.0%} of it lies on background of {scan.path.name}; {where}")
    cut = cut_area(scan, brain)
    if cut > CUT_CM2:
        raise InputError(
            f"{name}: cuts through tissue of {scan.path.name} on {cut:.0f} cm2 of its surface, as half a mask or one "
            f"of another place does; {where}"
        )


def _share_of_air(image: NDArray[Any], brain: Mask) -> float:
    """Share of a mask's voxels that look like the border of the image; 0 where the border is no air."""
    values = np.asarray(image, dtype=np.float32)
    border = np.concatenate([values.take(index, axis).ravel() for axis in range(3) for index in (0, -1)])
    level = float(np.median(border))
    low, high = (float(value) for value in np.percentile(values[::2, ::2, ::2], (LOWEST, HIGHEST)))
    if level - low > _AIR_LEVEL * (high - low):
        return 0.0
    noise = float(np.median(np.abs(border - level)))
    return float((np.abs(values[brain] - level) <= max(3 * noise, 1e-3 * (high - low))).mean())


def cut_area(scan: Scan, brain: Mask) -> float:
    """The largest connected area, cm2, where a mask's surface runs through tissue.

    A surface voxel runs through tissue where the image is as inside along some millimetres outwards: at a brain's own
    surface there is fluid, bone, air or a stripped background. What the field of view cuts does not count.
    """
    step = [max(1, round(_STEP_MM / size)) for size in scan.spacing]
    thin = (slice(None, None, step[0]), slice(None, None, step[1]), slice(None, None, step[2]))
    image = np.asarray(scan.data, dtype=np.float32)
    image = ndimage.uniform_filter(image, step)[thin] if max(step) > 1 else image
    mask = brain[thin]
    spacing = spacing_of(scan.affine) * step
    depth = ndimage.distance_transform_edt(mask, sampling=spacing)
    core = image[depth > _EDGE_MM]
    if core.size < 100:
        return 0.0
    median = float(np.median(core))
    spread = 1.4826 * float(np.median(np.abs(core - median)))
    normals = np.stack(np.gradient(ndimage.gaussian_filter(mask.astype(np.float32), 3.0 / spacing), *spacing))
    surface = np.argwhere(mask & ~ndimage.binary_erosion(mask, border_value=1)).T
    outwards = -normals[:, surface[0], surface[1], surface[2]]
    outwards /= np.maximum(np.linalg.norm(outwards, axis=0), 1e-9)
    like_tissue = np.zeros((len(_RAY_MM), surface.shape[1]), dtype=np.bool_)
    for count, distance in enumerate(_RAY_MM):
        at = surface + outwards * distance / spacing[:, None]
        values = ndimage.map_coordinates(image, at, order=1, mode="constant", cval=np.inf)
        within = ndimage.map_coordinates(mask.astype(np.float32), at, order=1, mode="constant", cval=1) > 0.5
        like_tissue[count] = (np.abs(values - median) <= _BAND * spread) & ~within
    flagged = np.zeros(mask.shape, dtype=np.bool_)
    flagged[tuple(surface[:, like_tissue.mean(axis=0) >= _IN_BAND])] = True
    pieces, count = ndimage.label(flagged, np.ones((3, 3, 3)))
    if not count:
        return 0.0
    return float(np.bincount(pieces.ravel())[1:].max() * spacing.prod() ** (2 / 3) / 100)
