"""Looks for a scan's place where the usual starting points led to none: turned by a wrong header, or part of a brain.

Outlines mislead such a search: half a brain stretched onto the template has its outline, and mutual information of what
both show leads half a brain some centimetres away from its place. What decides, and what is raised at first, is how
well coarse structures agree. Turns are proper ones only, which never exchange left and right: an image and its mirror
image both lie well on the symmetric template, so that images cannot tell which of them is right.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations, product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.geometry.transforms import transform_by
from sitreg_lumir.preprocessing.intensity import Mask, Matrix
from sitreg_lumir.preprocessing.mutual_information import UNIT_MM, Level, optimise, to_matrix
from sitreg_lumir.preprocessing.structure import StructureMatch, local_correlation, structure_match

CLEAR = 2.2
"""Correlation of coarse structures, multiple of what chance gives, above which a place is beyond doubt."""
PART_SCALES = (0.8, 1.25)
"""Of a part of a brain against what its header says: less than brains differ by, more than voxel sizes are wrong by."""

_Start: TypeAlias = tuple[Matrix, Matrix]  # a turn (3, 3), and template -> scan after that turn (4, 4)
_BRAIN = 32.0  # raised intensities above this are brain
_SCORED = 1  # index of the level on which structures are compared while places are refined, at last it is the finest
_SMALLER = 0.85  # of the template along an axis: a part may lie at either end of it
_NEAR_MM, _DEEP_MM = 9.0, 8.0
_TRIED, _REFINED = 10, (4, 2, 1)  # starting points, and places that are kept of each level
_SMALL = 1.2  # scale onto the template's volume from which a brain is rather a part of one
_GROWN = 1.05  # of the template against a brain
_FIRST_STEPS = np.diag([0.15] * 6 + [0.08])  # of the climb: radians, units of UNIT_MM (9 mm), logarithm of the scale
_CLIMBED = 300  # places that a climb tries, at most
_DIGITS = 9  # as in `optimise`


@dataclass(frozen=True, eq=False)
class Placement:
    """A place of the scan.

    Attributes:
        transform: ``(4, 4)``, template -> scan, both in units of ``UNIT_MM``.
        match: how well the coarse structures of scan and template agree.
        inside: share of the scan's brain that lies in the template's, 0..1.
        part: whether the scan was taken for a part of a brain.
    """

    transform: Matrix
    match: StructureMatch
    inside: float
    part: bool

    @property
    def score(self) -> float:
        """Higher is better; 0 where nothing can be compared."""
        return self.match.correlation * self.inside if np.isfinite(self.match.correlation) else 0.0

    @property
    def clear(self) -> bool:
        """Whether the structures agree far better than by chance."""
        return bool(self.match.correlation > CLEAR * self.match.by_chance)


def place(target: Level, scan: Level, transform: Matrix, part: bool) -> Placement:
    """Measures how well the scan's structures agree with the template's under ``transform``, template -> scan."""
    values, brain, share = _on_template(target, scan, transform)
    of_template, spacing = target.values > _BRAIN, float(target.grid[0, 0]) * UNIT_MM
    return Placement(transform, structure_match(target.values, of_template, values, brain, spacing), share, part)


def is_small(header: Matrix) -> bool:
    """Whether a brain, whose own frame has a whole brain's size, is rather small for a whole one."""
    return _size(header) > _SMALL


def _size(matrix: Matrix) -> float:
    return float(np.abs(np.linalg.det(matrix[:3, :3])) ** (1 / 3))


def by_header(targets: list[Level], levels: list[Level], header: Matrix) -> list[Placement]:
    """The place that the header says, and the best near it for a part of a brain; arguments as those of `search`."""
    as_stored = place(targets[-1], levels[-1], header, True)
    return [as_stored, *(_refined(targets, levels, [(np.eye(3), header)], True) if as_stored.clear else [])]


def search(targets: list[Level], levels: list[Level], header: Matrix, cut: bool) -> list[Placement]:
    """Places of a turned whole brain and of a part of a brain, until one is clear.

    Args:
        targets: the template, coarse to fine.
        levels: the scan, coarse to fine, its origin in the brain's middle, axes about those of its header.
        header: template -> scan if the header is right; its scale is that of the scan's own frame.
        cut: whether the field of view cuts the brain.
    """
    size = _size(header)
    parts_first = cut or is_small(header)
    places: list[Placement] = []
    for part in (parts_first, not parts_first):
        if part:
            starts = [(np.eye(3), header), *_part_starts(targets[0], levels[0], size)]
        else:
            starts = [(turn, np.eye(4)) for turn in _turns()[1:]]
        for placement in _refined(targets, levels, starts, part):
            scale = size / float(np.linalg.det(placement.transform[:3, :3]) ** (1 / 3))
            if not part or PART_SCALES[0] < scale < PART_SCALES[1]:
                places.append(placement)
        if any(placement.clear for placement in places):
            break
    return places


def _refined(targets: list[Level], levels: list[Level], starts: list[_Start], part: bool) -> list[Placement]:
    """The best of the starts, of which fewer are followed to each finer level.

    At first structures decide: always at the coarsest level, and until the finest for a part of a brain.
    """

    def score(start: _Start) -> float:
        return _coarse_score(targets[0], levels[0], to_matrix(start[0]) @ start[1])

    kept = sorted(starts, key=score, reverse=True)[:_TRIED]
    placements: list[Placement] = []
    for index, (target, level) in enumerate(zip(targets, levels, strict=True)):
        optimised = []
        for turn, start in kept:
            if index == 0 or (part and index < len(levels) - 1):
                transform = to_matrix(turn.T) @ _climb(target, level, to_matrix(turn) @ start)
            else:
                shown = _shown(target, level, to_matrix(turn) @ start) if part else target
                transform, _ = optimise(shown, _turned(level, turn), start, even=part)
            scored = max(index, _SCORED)
            placement = place(targets[scored], levels[scored], to_matrix(turn) @ transform, part)
            if placement.score > 0 and np.linalg.det(transform[:3, :3]) > 0:
                optimised.append((placement, (turn, transform)))
        optimised = sorted(optimised, key=lambda pair: -pair[0].score)[: _REFINED[index]]
        placements, kept = [pair[0] for pair in optimised], [pair[1] for pair in optimised]
    return placements


def _climb(target: Level, scan: Level, start: Matrix) -> Matrix:
    """Turns, shifts and scales evenly from ``start``, template -> scan, to where the structures agree best."""

    def moved(steps: Any) -> Matrix:
        turn = Rotation.from_rotvec(steps[:3]).as_matrix()
        return to_matrix(np.exp(steps[6]) * turn, steps[3:6]) @ start

    simplex = np.vstack([np.zeros(7), _FIRST_STEPS])
    best = minimize(
        lambda steps: -_coarse_score(target, scan, moved(steps)),
        np.zeros(7),
        method="Nelder-Mead",
        options={"initial_simplex": simplex, "maxfev": _CLIMBED, "xatol": 5e-3, "fatol": 1e-3},
    )
    return np.round(moved(best.x), _DIGITS)


def _turned(level: Level, turn: Matrix) -> Level:
    """A scan turned by a right angle, exactly: what lay at ``turn @ x`` lies at ``x``.

    The optimiser's parameters of a rotation end at half a turn, so that it must not start near that.
    """
    order = np.abs(turn).argmax(axis=0)  # of the scan's axes
    signs = turn[order, range(3)]
    values = level.values.transpose(order)[tuple(slice(None, None, int(sign)) for sign in signs)]
    spacing, first = level.grid.diagonal()[:3][order], level.grid[:3, 3][order]
    last = first + spacing * (np.array(values.shape) - 1)
    return Level(values, to_matrix(np.diag(spacing), np.where(signs > 0, first, -last)), None)


def _coarse_score(target: Level, scan: Level, transform: Matrix) -> float:
    """A quick score of a starting point."""
    values, brain, share = _on_template(target, scan, transform)
    spacing = float(target.grid[0, 0]) * UNIT_MM
    correlation = local_correlation(target.values, target.values > _BRAIN, values, brain, spacing)
    return correlation * share if np.isfinite(correlation) else 0.0


def _on_template(target: Level, scan: Level, transform: Matrix) -> tuple[NDArray[np.float32], Mask, float]:
    """The scan on the template's grid, its brain there, and the share of that brain within the template's."""
    values = resample(scan.values, scan.grid, transform, target.values.shape, target.grid)
    brain = values > _BRAIN
    scale = float(np.abs(np.linalg.det(transform[:3, :3])) * (target.grid[0, 0] / scan.grid[0, 0]) ** 3)
    visible = (scan.values > _BRAIN).sum() / scale  # voxels of the template's grid that the scan's brain takes up
    return values, brain, float((brain & (target.values > _BRAIN)).sum() / max(1, visible))


def _shown(target: Level, scan: Level, transform: Matrix) -> Level:
    """The template where the scan shows brain, and beyond the brain's surface; not beyond cuts through it."""
    brain = resample(scan.values, scan.grid, transform, target.values.shape, target.grid) > _BRAIN
    spacing = float(target.grid[0, 0]) * UNIT_MM
    near = ndimage.distance_transform_edt(~brain, sampling=spacing) <= _NEAR_MM if brain.any() else brain
    deep = ndimage.distance_transform_edt(target.values > _BRAIN, sampling=spacing) > _DEEP_MM
    return replace(target, mask=target.mask & (brain | (near & ~deep)))


def _part_starts(target: Level, scan: Level, size: float) -> list[_Start]:
    """The part turned in all ways, at the template's middle and, where it is smaller, at either end."""
    low, high = _ends(target.values > _BRAIN, target.grid)
    of_scan = scan.grid[:3, :3] @ np.argwhere(scan.values > _BRAIN)[::7].T + scan.grid[:3, 3:]
    scale = size / _GROWN  # template -> scan
    starts = []
    for turn in _turns():
        turned = turn.T @ of_scan
        first, last = np.percentile(turned, (0.5, 99.5), axis=1)
        shifts = []
        for axis in range(3):
            ends = scale * low[axis], scale * high[axis]
            at = [(first[axis] + last[axis] - ends[0] - ends[1]) / 2]
            if last[axis] - first[axis] < _SMALLER * (ends[1] - ends[0]):
                at += [first[axis] - ends[0], last[axis] - ends[1]]
            shifts.append(at)
        starts += [(turn, to_matrix(scale * np.eye(3), np.array(shift))) for shift in product(*shifts)]
    return starts


def _ends(brain: Mask, grid: Matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The brain's box, in the frame of the grid."""
    where = transform_by(grid, np.argwhere(brain).T.astype(np.float64))
    return where.min(axis=1), where.max(axis=1)


@lru_cache(maxsize=1)
def _turns() -> tuple[NDArray[np.float64], ...]:
    """The 24 turns that bring axes onto axes; the first is none."""
    matrices: list[Any] = [
        np.eye(3)[list(order)] * np.array(signs)
        for order in permutations(range(3))
        for signs in product((1.0, -1.0), repeat=3)
    ]
    return tuple(matrix for matrix in matrices if np.linalg.det(matrix) > 0)


def turn_of(prealign: Matrix) -> str:
    """Names the turn by right angles in a matrix, such as ``180 degrees about the left-right axis``; empty if none."""
    left, _, right = np.linalg.svd(prealign[:3, :3])
    nearest = max(_turns(), key=lambda turn: float((turn * (left @ right)).sum()))
    degrees = round(float(np.degrees(np.arccos(np.clip((np.trace(nearest) - 1) / 2, -1, 1)))))
    if degrees == 0:
        return ""
    fixed = [axis for axis in range(3) if abs(nearest[axis, axis]) == 1 and (degrees != 180 or nearest[axis, axis] > 0)]
    axis = ("left-right", "back-front", "bottom-top")[fixed[0]] if fixed else "diagonal"
    return f"{degrees} degrees about the {axis} axis"
