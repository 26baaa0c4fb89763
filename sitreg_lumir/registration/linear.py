"""Rigid and affine registration of two scans to one another: between scans of one person, or before anything finer.

Mutual information needs no particular contrast. The pair is registered in both directions, and the result lies half way
between the one and the inverse of the other: exchanging the scans gives the inverse.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.geometry.transforms import Matrix, transform_by
from sitreg_lumir.preprocessing.intensity import inverse, normalise, smoothing
from sitreg_lumir.preprocessing.mutual_information import UNIT_MM, Level, levels, optimise
from sitreg_lumir.registration.pair import square_root
from sitreg_lumir.registration.scan import PlacedScan

TransformKind: TypeAlias = Literal["deformable", "affine", "rigid"]
TRANSFORMS: tuple[TransformKind, ...] = ("deformable", "affine", "rigid")

_FINEST_MM = 2.0
_MARGIN_MM = 4.0  # around the brain that is compared, too, for its outline
_PAD_MM = 24.0  # of background around a brain that is not cut
_CUT_MM2 = 1500.0  # area of brain on a face of the field of view from which it counts as cut there
_DARKEST = np.float32(64)  # of 255, the darkest tissue, so that it differs from the background in every contrast


@dataclass(frozen=True, eq=False)
class LinearResult:
    """What registered a pair.

    Attributes:
        matrix: ``(4, 4)``, fixed world -> moving world, RAS, mm.
        apart_mm: how far the two directions' results lie apart, mean over the fixed brain, mm.
        mutual_information: of the scans under the result, mean of both directions, nats.
    """

    matrix: Matrix
    apart_mm: float
    mutual_information: float


@dataclass(frozen=True, eq=False)
class _Frame:
    """A scan along its own axes, coarse to fine: ``from_world`` leads from its world to units of UNIT_MM."""

    scans: list[Level]
    targets: list[Level]
    from_world: Matrix


def register_linearly(
    fixed: PlacedScan, moving: PlacedScan, prealigns: tuple[Matrix, Matrix], *, rigid: bool
) -> LinearResult:
    """Searches the rigid or affine map from the fixed to the moving world.

    It starts from where the alignments to the template put the scans, and from where the headers put them, and goes on
    from the better one.

    Args:
        fixed: the fixed scan and its brain.
        moving: the moving scan and its brain.
        prealigns: of both scans, ``(4, 4)``, world -> model world, RAS, mm.
        rigid: turns and shifts alone; else also scales and shears.

    Raises:
        InputError: a scan is constant in its brain.
    """
    frames = [_frame(scan) for scan in (fixed, moving)]
    middles = [_middle(scan) for scan in (fixed, moving)]
    aligned = inverse(prealigns[1]) @ prealigns[0]
    starts = [np.eye(4), _nearest_rigid(aligned, middles[0]) if rigid else aligned]

    def one_way(direction: int) -> tuple[Matrix, float]:
        target, scan = frames[direction], frames[1 - direction]
        these = starts if direction == 0 else [inverse(start) for start in starts]
        begun = [scan.from_world @ start @ inverse(target.from_world) for start in these]
        best, value = begun[0], 0.0
        for reference, image in zip(target.targets, scan.scans, strict=True):
            results = [optimise(reference, image, start, even=False, rigid=rigid) for start in begun]
            best, value = max(results, key=lambda result: result[1])
            begun = [best]
        return inverse(scan.from_world) @ best @ target.from_world, value

    with ThreadPoolExecutor(min(2, torch.get_num_threads())) as threads:
        (forward, first), (back, second) = threads.map(one_way, (0, 1))
    back = inverse(back)
    matrix = forward @ square_root(inverse(forward) @ back)
    brain = np.argwhere(fixed.brain)[::100].T.astype(np.float64)
    points = transform_by(fixed.affine, brain)
    apart = np.linalg.norm(transform_by(forward, points) - transform_by(back, points), axis=0)
    return LinearResult(matrix, float(apart.mean()), (first + second) / 2)


def no_updates(shape: tuple[int, int, int], levels: int) -> SplineUpdates:
    """Updates that move nothing, for the map of a pair that is registered by its alignments alone.

    Args:
        shape: ``(X, Y, Z)`` of the model's grid.
        levels: stages; the finest has a control point at each voxel.
    """
    sizes = [tuple(-(-size // 2**level) for size in shape) for level in reversed(range(levels))]
    return SplineUpdates([(torch.zeros(3, *size), torch.zeros(3, *size)) for size in sizes], shape)


def _frame(scan: PlacedScan) -> _Frame:
    """A scan and its neighbourhood of the brain along the array's axes, mm from the middle, never mirrored."""
    spacing, shape = scan.spacing, np.array(scan.shape)
    own = np.diag([*spacing / UNIT_MM, 1.0])
    if np.linalg.det(scan.affine[:3, :3]) < 0:
        own[0, 0] *= -1
    own[:3, 3] = -own[:3, :3] @ np.argwhere(scan.brain).mean(axis=0)
    pad = np.where(_cut_faces(scan.brain, spacing), 0, _PAD_MM / spacing[:, None])
    where = np.argwhere(scan.brain)
    low = np.maximum(where.min(axis=0) - pad[:, 0], -0.5 - pad[:, 0])
    high = np.minimum(where.max(axis=0) + pad[:, 1], shape - 0.5 + pad[:, 1])
    ends = np.sort(transform_by(own, np.stack([low, high], axis=1)), axis=1)
    step = _FINEST_MM / UNIT_MM
    grid = np.diag([step] * 3 + [1.0])
    grid[:3, 3] = ends[:, 0] + step / 2
    size = np.maximum(np.ptp(ends, axis=1) // step, 1).astype(int)
    values = normalise(scan.data, scan.brain, str(scan.path))
    raised = np.where(scan.brain, _DARKEST + values * (1 - _DARKEST / 255), np.float32(0))
    smooth = ndimage.gaussian_filter(raised, smoothing(inverse(own) @ grid))
    sampled = resample(smooth, own, np.eye(4), size, grid)
    brain = resample(scan.brain.astype(np.float32), own, np.eye(4), size, grid) >= 0.5
    compared = ndimage.binary_dilation(brain, iterations=round(_MARGIN_MM / _FINEST_MM))
    return _Frame(levels(sampled, grid, None), levels(sampled, grid, compared), own @ inverse(scan.affine))


def _cut_faces(brain: NDArray[np.bool_], spacing: NDArray[np.float64]) -> NDArray[np.bool_]:
    """``(3, 2)``: at which faces of the field of view, low and high, the brain is cut."""
    area = spacing.prod() / spacing
    return np.array([[brain.take(end, axis).sum() * area[axis] > _CUT_MM2 for end in (0, -1)] for axis in range(3)])


def _middle(scan: PlacedScan) -> NDArray[np.float64]:
    return transform_by(scan.affine, np.argwhere(scan.brain).mean(axis=0)[:, None])


def _nearest_rigid(matrix: Matrix, middle: NDArray[np.float64]) -> Matrix:
    """The turn and shift nearest to an affine, which agree with it at ``middle`` ``(3, 1)``."""
    left, _, right = np.linalg.svd(matrix[:3, :3])
    rigid = np.eye(4)
    rigid[:3, :3] = left @ np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))]) @ right
    rigid[:3, 3:] = transform_by(matrix, middle) - rigid[:3, :3] @ middle
    return rigid


def judge_linear(summary: dict[str, Any]) -> tuple[str, list[str]]:
    """``ok``, ``check`` or ``failed``, and why, for a rigid or affine map: two persons' brains hardly match.

    Args:
        summary: of :func:`~sitreg_lumir.registration.summary.summarise`, with the entry ``linear``.
    """
    similarity, linear = summary["similarity"]["registered"], summary["linear"]
    failed: list[str] = []
    check: list[str] = []
    rules: Sequence[tuple[float | None, float, float, bool, str]] = (
        (linear["directions_apart_mm"], 2.0, 10.0, False, "the two directions differ by {:.1f} mm"),
        (similarity["brain_overlap"], 0.9, 0.7, True, "the brains overlap by {:.2f} (Dice)"),
        (
            None if not similarity["mind_by_chance"] else similarity["mind"] / similarity["mind_by_chance"],
            0.93,
            0.985,
            False,
            "the structures match hardly better than by chance ({:.2f} of the difference)",
        ),
    )
    for value, limit, limit_failed, low, text in rules:
        if value is None or not np.isfinite(value):
            failed.append("the brains do not overlap")
            continue
        sign = -1 if low else 1
        if sign * value > sign * limit_failed:
            failed.append(text.format(value))
        elif sign * value > sign * limit:
            check.append(text.format(value))
    return ("failed" if failed else "check" if check else "ok"), list(dict.fromkeys(failed + check))
