"""Aligns one scan by itself to the model's frame: an affine by mutual information with the MNI152 template.

One scan at a time, never one scan of a pair to the other: that keeps a registration symmetric. Mutual information asks
for no particular contrast, so a T2 scan finds its place on the T1 template.

The result does not depend on how the header turns or shifts the scan: it is presented along its own axes, centred, and
scaled to the template's volume, and the header is only one more place to start from.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.orientation import spacing_of
from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.geometry.transforms import Points, transform_by
from sitreg_lumir.prepare.conform import Mask, Matrix, inverse, normalise, smoothing, support_mask
from sitreg_lumir.prepare.frame import Frame
from sitreg_lumir.prepare.information import UNIT_MM, Level, information, levels, optimise, to_matrix

# A scan stays where it is if aligning it would move its brain by no more than this (mm, mean over the brain), or would
# hardly raise the mutual information (relative). On miniLUMIR, aligned by other means, brains would move by 0.3 to 0.8
# mm, brains half cut off by up to 2.2 mm; a brain shown 10 % too large moves by 5 mm or more.
NEEDED_MM = 4.0
NEEDED_GAIN = 0.01

SCALES = (0.5, 2.5)  # of a brain against MNI152 along any direction; a newborn's needs 1.7, beyond it went astray

_FINEST_MM = 3.0  # 2 mm takes three times as long and places miniLUMIR no better
_MARGIN_MM = 9.0  # background around the template that counts, too: the brain's outline
_PAD_MM = 30.0  # background added around a stripped scan
_CUT_MM2 = 1500.0  # of brain on a face of the field of view: cut there (3.4 mm deep), and not only touching it
_FOOT = np.float32(64)  # of 255, the darkest tissue: were it as dark as background, T2 scans would go 2 mm astray
_TOP_MM = 125.0  # of a whole head, from the top: about the brain
_WIDEST_MM = 1500.0  # a field of view wider than this holds voxel sizes in another unit
_HEAD_SIZES = (0.85, 0.65)  # of brains against the template, to start from: without, a head is shrunk onto its brain
_SAME = 0.002  # starts whose mutual information differs less, relative, found the same place: the first one counts


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where a scan lies in the model's frame.

    Attributes:
        prealign: ``(4, 4)``, the scan's world -> the model's world, RAS, mm.
        mi_before: mutual information of the scan and the template where the header puts it, nats; 0 if far off.
        mi_after: the same, aligned.
        overlap_before: Dice coefficient of the scan's and the template's brain within the scan's field of view; NaN
            without a mask.
        overlap_after: the same, aligned.
        moved_mm: how far ``prealign`` moves the brain, mean over its voxels, mm.
        corners_mm: how far it moves the corners of the template's brain box, mean, mm.
    """

    prealign: Matrix
    mi_before: float
    mi_after: float
    overlap_before: float
    overlap_after: float
    moved_mm: float
    corners_mm: float

    @property
    def needed(self) -> bool:
        """Whether the scan is not yet in the model's frame."""
        return self.moved_mm > NEEDED_MM and self.mi_after > (1 + NEEDED_GAIN) * self.mi_before


@dataclass(frozen=True, eq=False)
class _View:
    """A scan along its own axes: ``own`` leads from its voxels to its own frame, units of UNIT_MM."""

    levels: list[Level]
    own: Matrix
    cut: bool  # the field of view cuts the brain


def align_to_frame(
    image: NDArray[Any], affine: Matrix, mask: Mask | None, frame: Frame, name: str = "image"
) -> Alignment:
    """The affine from a scan's world to the template's.

    A brain that the field of view cuts is only turned, shifted and scaled evenly: what is left of it does not tell how
    it is stretched.

    Args:
        image: ``(X, Y, Z)``, any contrast, number type and unit.
        affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm, axes orthogonal.
        mask: bool, the image's shape: the brain. None for a whole head: only the template's brain is then compared,
            which is less sure.
        frame: the template.
        name: of the image, for errors.

    Raises:
        InputError: the scan shows nothing, or no sensible affine was found.
    """
    head = mask is None
    seen = support_mask(image, affine, name) if mask is None else mask
    view = _view(image, affine, seen, frame, head, name)
    targets, place = _template(frame, not head)
    header = view.own @ inverse(affine) @ place  # template -> scan if the header is right
    first = 1 if head else 0  # at 9 mm scalp and skull look like a brain's rim
    found = [optimise(targets[first], view.levels[first], start, even=True) for start in _starts(header, head)]
    most = max(value for _, value in found)
    best = next(transform for transform, value in found if value >= (1 - _SAME) * most)
    for target, level in list(zip(targets, view.levels, strict=True))[first:]:
        best, _ = optimise(target, level, best, even=view.cut)
    prealign = place @ inverse(best) @ view.own @ inverse(affine)
    scales = np.linalg.svd(prealign[:3, :3], compute_uv=False)
    if most <= 0 or np.linalg.det(prealign[:3, :3]) <= 0 or scales.min() < SCALES[0] or scales.max() > SCALES[1]:
        raise InputError(f"{name}: found no place in the MNI152 frame; give a brain mask, or --initial-transform")
    before = information(targets[-1], view.levels[-1], header, [best])
    after = information(targets[-1], view.levels[-1], best, [header] if before > 0 else [])
    here, there = (math.nan if head else _overlap(seen, affine, matrix, frame) for matrix in (np.eye(4), prealign))
    box = np.argwhere(frame.mask)
    corners = np.array(list(product(*zip(box.min(axis=0), box.max(axis=0), strict=True))), dtype=np.float64).T
    brain = np.argwhere(frame.mask if head else seen)[::100].T.astype(np.float64)
    return Alignment(
        prealign=prealign,
        mi_before=before,
        mi_after=after,
        overlap_before=here,
        overlap_after=there,
        moved_mm=_moved(prealign, transform_by(frame.affine if head else affine, brain)),
        corners_mm=_moved(prealign, transform_by(frame.affine, corners)),
    )


def _moved(prealign: Matrix, points: Points) -> float:
    """Mean distance, mm, by which a matrix moves points ``(3, N)``."""
    return float(np.linalg.norm(transform_by(prealign, points) - points, axis=0).mean())


def _view(image: NDArray[Any], affine: Matrix, seen: Mask, frame: Frame, head: bool, name: str) -> _View:
    """A scan along its own axes, coarse to fine.

    The axes of the own frame are the array's, put in the order and direction closest to RAS; its origin is about the
    middle of the brain; and unless the brain is cut, its unit makes the brain as large as the template's.
    """
    spacing = spacing_of(affine)
    cut = np.ones((3, 2), dtype=np.bool_) if head else _cut_faces(seen, spacing)
    volume = float(seen.sum() * spacing.prod())  # mm^3
    scale = 1.0 if cut.any() else (frame.mask.sum() / volume) ** (1 / 3)
    if not SCALES[0] < scale < SCALES[1]:
        problem = f"a brain of {volume / 1e6:.2g} litres is too {'small' if scale > 1 else 'large'} to be one"
        raise InputError(f"{name}: {problem}; give its mask, or mend the voxel size in the header")
    own = np.eye(4)
    own[:3, :3] = _axes(affine) * spacing * scale / UNIT_MM
    places = own[:3, :3] @ np.argwhere(seen).T
    if head:  # face and neck tell nothing
        places = places[:, places[2] > places[2].max() - _TOP_MM / UNIT_MM]
    own[:3, 3] = -places.mean(axis=1)

    pad = np.where(cut, 0, _PAD_MM / (spacing * scale)[:, None])  # voxels; beyond a cut nothing is known
    ends = own[:3, :3] @ np.stack([-pad[:, 0] - 0.5, np.array(seen.shape) + pad[:, 1] - 0.5], axis=1) + own[:3, 3:]
    widest = float(np.ptp(ends, axis=1).max()) * UNIT_MM
    if widest > _WIDEST_MM:
        raise InputError(f"{name}: its field of view is {widest:.0f} mm wide; mend the voxel size in the header")
    step = _FINEST_MM / UNIT_MM
    grid = np.diag([step] * 3 + [1.0])
    grid[:3, 3] = ends.min(axis=1) + step / 2
    shape = np.maximum(np.ptp(ends, axis=1) // step, 1).astype(int)
    values = _footed(normalise(image, seen, name), seen)
    smooth = ndimage.gaussian_filter(values, smoothing(inverse(own) @ grid))
    sampled = resample(smooth, own, np.eye(4), shape, grid)
    return _View(levels(sampled, grid, None), own, bool(cut.any()) and not head)


@lru_cache(maxsize=2)
def _template(frame: Frame, with_outline: bool) -> tuple[list[Level], Matrix]:
    """The template around its middle, coarse to fine, in units of UNIT_MM, and from those units to its world."""
    place = np.diag([UNIT_MM] * 3 + [1.0])
    place[:3, 3] = frame.affine[:3, :3] @ ndimage.center_of_mass(frame.mask) + frame.affine[:3, 3]
    counted = ndimage.distance_transform_edt(~frame.mask) <= _MARGIN_MM if with_outline else frame.mask
    where = np.argwhere(counted)
    grid = frame.affine @ np.diag([_FINEST_MM] * 3 + [1.0])  # the template's voxels are 1 mm
    grid[:3, 3] = transform_by(frame.affine, where.min(axis=0).astype(np.float64))
    shape = (np.ptp(where, axis=0) // _FINEST_MM + 1).astype(int)
    smooth = ndimage.gaussian_filter(_footed(frame.image, frame.mask), smoothing(inverse(frame.affine) @ grid))
    values, shares = (
        resample(volume, frame.affine, np.eye(4), shape, grid) for volume in (smooth, counted.astype(np.float32))
    )
    return levels(values, inverse(place) @ grid, shares >= 0.5), place


def _footed(values: NDArray[np.float32], mask: Mask) -> NDArray[np.float32]:
    """Intensities 0..255 as _FOOT..255 inside the mask and 0 outside."""
    return np.where(mask, _FOOT + values * (1 - _FOOT / 255), np.float32(0))


def _starts(header: Matrix, head: bool) -> list[Matrix]:
    """Where to start from, template -> scan: the scan as it lies, turned or scaled, and as the header says."""
    if head:
        turns = [Rotation.from_euler("x", angle, degrees=True).as_matrix() for angle in (0, 20, -20)]
        starts = [to_matrix(size * turn) for size in _HEAD_SIZES for turn in turns]
    else:
        turns = [Rotation.from_euler(axis, sign * 30, degrees=True).as_matrix() for axis in "xyz" for sign in (1, -1)]
        starts = [to_matrix(turn) for turn in (np.eye(3), *turns)]
    return [*starts, to_matrix(header[:3, :3]), header]


def _axes(affine: Matrix) -> Matrix:
    """The signed permutation that turns array axes to about RAS, never mirrored against the world."""
    directions = affine[:3, :3] / spacing_of(affine)
    candidates = [
        np.eye(3)[list(order)] * np.array(signs)
        for order in permutations(range(3))
        for signs in product((1.0, -1.0), repeat=3)
    ]
    proper = [one for one in candidates if np.linalg.det(one) * np.linalg.det(directions) > 0]
    return max(proper, key=lambda one: float((one * directions).sum()))


def _cut_faces(mask: Mask, spacing: NDArray[np.float64]) -> Mask:
    """``(3, 2)``: at which faces of the field of view, low and high, the brain is cut."""
    area = spacing.prod() / spacing
    return np.array([[mask.take(end, axis).sum() * area[axis] > _CUT_MM2 for end in (0, -1)] for axis in range(3)])


def _overlap(mask: Mask, affine: Matrix, prealign: Matrix, frame: Frame) -> float:
    """Dice coefficient of the scan's and the template's brain, on the scan's grid thinned to about 3 mm."""
    step = [max(1, round(3 / size)) for size in spacing_of(affine)]
    thin = mask[:: step[0], :: step[1], :: step[2]]
    share = resample(frame.mask.astype(np.float32), frame.affine, prealign, thin.shape, affine @ np.diag([*step, 1.0]))
    brain = share >= 0.5
    return float(2 * (thin & brain).sum() / max(1, thin.sum() + brain.sum()))
