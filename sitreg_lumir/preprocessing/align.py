"""Aligns one scan to the MNI152 template, independently of any other scan: an affine by mutual information.

Each scan of a pair is aligned independently, never one scan to the other: that keeps a registration symmetric. Mutual
information needs no particular contrast, so a T2 scan can be aligned to the T1 template.

The result does not depend on how the header turns or shifts the scan: it is presented along its own axes, centred, and
scaled to the template's volume, and the header gives only two of several starting points.
"""

import math
from dataclasses import dataclass
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
from sitreg_lumir.preprocessing.intensity import Mask, Matrix, inverse, normalise, smoothing, support_mask
from sitreg_lumir.preprocessing.mutual_information import (
    UNIT_MM,
    Level,
    levels,
    mutual_information,
    optimise,
    to_matrix,
)
from sitreg_lumir.preprocessing.search import by_header, is_small, place, search, turn_of
from sitreg_lumir.preprocessing.template import Template, computed_once

# A scan stays where it is if aligning it would move its brain by no more than this (mm, mean over the brain), or would
# hardly raise the mutual information (relative). On miniLUMIR, aligned by other means, brains would move by 0.3 to 0.8
# mm, brains half cut off by up to 2.2 mm; a brain shown 10 % too large moves by 5 mm or more.
NEEDED_MM = 4.0
NEEDED_GAIN = 0.01

SCALES = (0.5, 2.5)  # of a brain against MNI152 along any direction; a newborn's needs 1.7, larger ones were wrong

_FINEST_MM = 3.0  # 2 mm takes three times as long and places miniLUMIR no better
_MARGIN_MM = 9.0  # background around the template that is compared, too, for the brain's outline
_PAD_MM = 30.0  # background added around a skull-stripped scan
_CUT_MM2 = 1500.0  # area of brain on a face of the field of view from which it counts as cut there (3.4 mm deep)
_DARKEST = np.float32(64)  # of 255, the darkest tissue: with tissue as dark as background, T2 scans end up 2 mm off
_TOP_MM = 125.0  # of a whole head, from the top: about where the brain is
_WIDEST_MM = 1500.0  # a field of view wider than this holds voxel sizes in another unit
_HEAD_SIZES = (0.85, 0.65)  # of starting points: without them a head is shrunk onto the template's brain
_STRETCHED = 1.3  # scales along different directions of whole brains against MNI152 differ by less
_MUCH_BETTER = 1.1  # relative: what another place has to gain
_EQUALLY_GOOD = 0.002  # relative: of starts whose mutual information differs less, the first is taken


@dataclass(frozen=True, eq=False)
class Alignment:
    """The affine that brings a scan onto the template.

    Attributes:
        prealign: ``(4, 4)``, the scan's world -> the model's world, RAS, mm.
        mi_before: mutual information of the scan and the template where the header puts it, nats; 0 if far off.
        mi_after: mutual information of the scan and the template once aligned, nats.
        overlap_before: Dice coefficient of the scan's and the template's brain within the scan's field of view; NaN
            without a mask.
        overlap_after: Dice coefficient of both brains once aligned; NaN without a mask.
        moved_mm: mean distance by which ``prealign`` moves the brain's voxels, mm.
        corners_mm: mean distance by which ``prealign`` moves the corners of the template's brain box, mm.
        part: whether the scan was taken for a part of a brain, which is turned, shifted and scaled evenly only.
    """

    prealign: Matrix
    mi_before: float
    mi_after: float
    overlap_before: float
    overlap_after: float
    moved_mm: float
    corners_mm: float
    part: bool = False

    @property
    def turn(self) -> str:
        """By what right angle the header turns the brain, in words; empty if it does not."""
        return turn_of(self.prealign)

    @property
    def remark(self) -> str:
        """What is unusual about it, in a few words that follow others; empty if nothing is."""
        turned = f", turned by {self.turn}" if self.turn else ""
        return turned + (", as a part of a brain" if self.part else "")

    @property
    def needed(self) -> bool:
        """Whether the scan does not lie on the template yet."""
        return self.moved_mm > NEEDED_MM and self.mi_after > (1 + NEEDED_GAIN) * self.mi_before


@dataclass(frozen=True, eq=False)
class _OwnFrame:
    """A scan along its own axes, coarse to fine: ``own`` maps its voxels to its own frame, units of UNIT_MM."""

    levels: list[Level]
    own: Matrix
    cut: bool  # the field of view cuts the brain


def align_to_template(
    image: NDArray[Any], affine: Matrix, mask: Mask | None, template: Template, name: str = "image"
) -> Alignment:
    """Finds the affine from a scan's world to the template's.

    A brain that the field of view cuts is only turned, shifted and scaled evenly: the visible part does not show how
    the brain is stretched.

    Args:
        image: ``(X, Y, Z)``, any contrast, number type and unit.
        affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm, axes orthogonal.
        mask: bool, the image's shape: the brain. None for a whole head: then only the template's brain is compared,
            which is less reliable.
        template: the MNI152 template.
        name: of the image, for errors.

    Raises:
        InputError: the scan shows nothing, or no plausible affine was found.
    """
    head = mask is None
    visible = support_mask(image, affine, name) if mask is None else mask
    scan = _own_frame(image, affine, visible, template, head, name)
    targets, unit_to_world = _template_levels(template, not head)
    header = scan.own @ inverse(affine) @ unit_to_world  # template -> scan if the header is right
    first = 1 if head else 0  # at the coarsest level scalp and skull look like a brain's rim
    optimised = [optimise(targets[first], scan.levels[first], start, even=True) for start in _starts(header, head)]
    most = max(value for _, value in optimised)
    best = next(transform for transform, value in optimised if value >= (1 - _EQUALLY_GOOD) * most)
    for target, level in list(zip(targets, scan.levels, strict=True))[first:]:
        best, _ = optimise(target, level, best, even=scan.cut)
    part = scan.cut
    if not head:
        best, part = _reconsidered(targets, scan, best, header)
    prealign = unit_to_world @ inverse(best) @ scan.own @ inverse(affine)
    scales = np.linalg.svd(prealign[:3, :3], compute_uv=False)
    if most <= 0 or np.linalg.det(prealign[:3, :3]) <= 0 or scales.min() < SCALES[0] or scales.max() > SCALES[1]:
        raise InputError(f"{name}: cannot be aligned to MNI152; give a brain mask, or `initial_transform`")
    before = mutual_information(targets[-1], scan.levels[-1], header, [best])
    after = mutual_information(targets[-1], scan.levels[-1], best, [header] if before > 0 else [])
    overlap_before, overlap_after = (
        math.nan if head else _overlap(visible, affine, matrix, template) for matrix in (np.eye(4), prealign)
    )
    box = np.argwhere(template.mask)
    corners = np.array(list(product(*zip(box.min(axis=0), box.max(axis=0), strict=True))), dtype=np.float64).T
    brain = np.argwhere(template.mask if head else visible)[::100].T.astype(np.float64)
    return Alignment(
        prealign=prealign,
        mi_before=before,
        mi_after=after,
        overlap_before=overlap_before,
        overlap_after=overlap_after,
        moved_mm=_moved(prealign, transform_by(template.affine if head else affine, brain)),
        corners_mm=_moved(prealign, transform_by(template.affine, corners)),
        part=part,
    )


def _reconsidered(targets: list[Level], scan: _OwnFrame, usual: Matrix, header: Matrix) -> tuple[Matrix, bool]:
    """Another place than the usual one where structures agree much better there, and whether it is that of a part.

    Where the header places the scan well, it is kept; turns, and places of parts, are tried where the usual place is
    doubtful, or the brain small.
    """
    best = place(targets[-1], scan.levels[-1], usual, scan.cut)  # coarser ones leave good scans in doubt
    stretch = np.linalg.svd(usual[:3, :3], compute_uv=False)
    plausible = scan.cut or stretch.max() < _STRETCHED * stretch.min()
    if plausible and best.clear and not is_small(header):
        return usual, scan.cut
    others = by_header(targets, scan.levels, header)
    if not others[0].clear:
        others += search(targets, scan.levels, header, scan.cut)
    for candidate in others:
        if candidate.score > _MUCH_BETTER * best.score or (not plausible and candidate.score > best.score):
            best, plausible = candidate, True
    return best.transform, best.part


def _moved(prealign: Matrix, points: Points) -> float:
    """Mean distance, mm, by which a matrix moves points ``(3, N)``."""
    return float(np.linalg.norm(transform_by(prealign, points) - points, axis=0).mean())


def _own_frame(
    image: NDArray[Any], affine: Matrix, visible: Mask, template: Template, head: bool, name: str
) -> _OwnFrame:
    """A scan along its own axes, coarse to fine.

    The axes of the own frame are the array's, put in the order and direction closest to RAS; its origin is about the
    middle of the brain; and unless the brain is cut, its unit makes the brain as large as the template's.
    """
    spacing = spacing_of(affine)
    cut = np.ones((3, 2), dtype=np.bool_) if head else _cut_faces(visible, spacing)
    volume = float(visible.sum() * spacing.prod())  # mm^3
    scale = 1.0 if cut.any() else (template.mask.sum() / volume) ** (1 / 3)
    if not SCALES[0] < scale < SCALES[1]:
        problem = f"a brain of {volume / 1e6:.2g} litres is too {'small' if scale > 1 else 'large'} to be one"
        raise InputError(f"{name}: {problem}; give its mask, or correct the voxel size in the header")
    own = np.eye(4)
    own[:3, :3] = _axes(affine) * spacing * scale / UNIT_MM
    places = own[:3, :3] @ np.argwhere(visible).T
    if head:  # the face and the neck have no counterpart in the template
        places = places[:, places[2] > places[2].max() - _TOP_MM / UNIT_MM]
    own[:3, 3] = -places.mean(axis=1)

    pad = np.where(cut, 0, _PAD_MM / (spacing * scale)[:, None])  # voxels; beyond a cut the brain is unknown
    ends = own[:3, :3] @ np.stack([-pad[:, 0] - 0.5, np.array(visible.shape) + pad[:, 1] - 0.5], axis=1) + own[:3, 3:]
    widest = float(np.ptp(ends, axis=1).max()) * UNIT_MM
    if widest > _WIDEST_MM:
        raise InputError(f"{name}: its field of view is {widest:.0f} mm wide; correct the voxel size in the header")
    step = _FINEST_MM / UNIT_MM
    grid = np.diag([step] * 3 + [1.0])
    grid[:3, 3] = ends.min(axis=1) + step / 2
    shape = np.maximum(np.ptp(ends, axis=1) // step, 1).astype(int)
    values = _raised(normalise(image, visible, name), visible)
    smooth = ndimage.gaussian_filter(values, smoothing(inverse(own) @ grid))
    sampled = resample(smooth, own, np.eye(4), shape, grid)
    return _OwnFrame(levels(sampled, grid, None), own, bool(cut.any()) and not head)


@computed_once
def _template_levels(template: Template, with_outline: bool) -> tuple[list[Level], Matrix]:
    """The template around its middle, coarse to fine, in units of UNIT_MM, and from those units to its world."""
    unit_to_world = np.diag([UNIT_MM] * 3 + [1.0])
    unit_to_world[:3, 3] = template.affine[:3, :3] @ ndimage.center_of_mass(template.mask) + template.affine[:3, 3]
    compared = ndimage.distance_transform_edt(~template.mask) <= _MARGIN_MM if with_outline else template.mask
    where = np.argwhere(compared)
    grid = template.affine @ np.diag([_FINEST_MM] * 3 + [1.0])  # the template's voxels are 1 mm
    grid[:3, 3] = transform_by(template.affine, where.min(axis=0).astype(np.float64))
    shape = (np.ptp(where, axis=0) // _FINEST_MM + 1).astype(int)
    smooth = ndimage.gaussian_filter(_raised(template.image, template.mask), smoothing(inverse(template.affine) @ grid))
    values, shares = (
        resample(volume, template.affine, np.eye(4), shape, grid) for volume in (smooth, compared.astype(np.float32))
    )
    return levels(values, inverse(unit_to_world) @ grid, shares >= 0.5), unit_to_world


def _raised(values: NDArray[np.float32], mask: Mask) -> NDArray[np.float32]:
    """Maps intensities 0..255 to _DARKEST..255 inside the mask and to 0 outside."""
    return np.where(mask, _DARKEST + values * (1 - _DARKEST / 255), np.float32(0))


def _starts(header: Matrix, head: bool) -> list[Matrix]:
    """The starting points, template -> scan: the scan as it lies, turned or scaled, and as the header places it."""
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
    proper = [axes for axes in candidates if np.linalg.det(axes) * np.linalg.det(directions) > 0]
    return max(proper, key=lambda axes: float((axes * directions).sum()))


def _cut_faces(mask: Mask, spacing: NDArray[np.float64]) -> Mask:
    """``(3, 2)``: at which faces of the field of view, low and high, the brain is cut."""
    area = spacing.prod() / spacing
    return np.array([[mask.take(end, axis).sum() * area[axis] > _CUT_MM2 for end in (0, -1)] for axis in range(3)])


def _overlap(mask: Mask, affine: Matrix, prealign: Matrix, template: Template) -> float:
    """Dice coefficient of the scan's and the template's brain, on the scan's grid thinned to about 3 mm."""
    step = [max(1, round(3 / size)) for size in spacing_of(affine)]
    thin = mask[:: step[0], :: step[1], :: step[2]]
    share = resample(
        template.mask.astype(np.float32), template.affine, prealign, thin.shape, affine @ np.diag([*step, 1.0])
    )
    brain = share >= 0.5
    return float(2 * (thin & brain).sum() / max(1, thin.sum() + brain.sum()))
