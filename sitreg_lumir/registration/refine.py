"""Instance optimisation: the predicted control points, improved for one very pair, and never beyond their bound.

Images are ``(1, 1, X, Y, Z)`` in [0, 1], fields ``(1, 3, X, Y, Z)`` in voxels. Both sides are treated alike, so
exchanging the images exchanges the results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.deform.ops import warp, warp_mask
from sitreg_lumir.deform.state import SymmetricState
from sitreg_lumir.deform.update import Maps
from sitreg_lumir.losses import diffusion, ndv_sum
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.sitreg import Stage
from sitreg_lumir.registration.contrasts import (
    Compared,
    channel_lncc,
    in_both_contrasts,
    of_one_contrast,
    outside_lesion,
)

SIMILARITIES = {"lncc": (0.2, 2), "mind": (0.03, 3)}  # and their learning rates and levels
_PUBLISHED_VOXELS = 160 * 224 * 192  # the grid on which the weight of the NDV is 1e-5
_LARGEST_SHARE = 1 - 1e-6  # of the bound: the inverse of the tanh is finite there
_BETAS = (0.7, 0.9)  # of Adam: in a few dozen steps, much memory of earlier slopes holds back
_FULL_RATE_STEPS = 30  # fewer cannot make good for first steps that are too long
_EPSILON = 1e-3  # of Adam: below it, slopes of the sum over voxels are noise, which is not blown up to whole steps
_RENEWED = 10  # steps after which the intensities are carried over anew, by the fields that are better by then

Updates = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Refined:
    """What instance optimisation found.

    Attributes:
        disp: ``(1, 3, X, Y, Z)``, voxels, fixed grid: ``warp(moving, disp)`` matches the fixed image.
        disp_inv: the same with the roles swapped, on the moving grid.
        control_points: of all updates, coarsest first: of the moving and of the fixed side, voxels of the level.
        steps: how many steps led to this result, at most those asked for; 0: the prediction was kept.
        objective: of the prediction, and of the result, compared in the same way; lower is better.
        dissimilarity: its part that compares the images, of both; in [-1, 0], lower is better.
        carried_over: whether intensities of different contrasts were compared, each carried over to the other one.
    """

    disp: Tensor
    disp_inv: Tensor
    control_points: Updates
    steps: int
    objective: tuple[float, float]
    dissimilarity: tuple[float, float]
    carried_over: bool

    @property
    def improved(self) -> bool:
        """Whether the objective fell; otherwise all is as predicted."""
        return self.steps > 0


class _Value(NamedTuple):
    """Of some fields, mean of both directions."""

    objective: float
    dissimilarity: float


@dataclass(frozen=True)
class _Weights:
    """The window of the LNCC, voxels, and the weights of the regularisers for a mean over voxels, and a sum."""

    window: int
    diffusion: float
    ndv: float


def control_points_of(stages: Sequence[Stage], levels: int) -> list[tuple[Tensor, Tensor]]:
    """The control points of all stages, coarsest first, as :func:`refine` takes them.

    Args:
        stages: of :func:`~sitreg_lumir.network.sitreg.run_stages`, of all levels.
        levels: of the network.

    Raises:
        ValueError: stages are missing.
    """
    found = [stage.level for stage in stages]
    if found != list(reversed(range(levels))):
        raise ValueError(f"stages of all {levels} levels are needed, coarsest first, got {found}")
    return [(stage.control_points, stage.control_points_reverse) for stage in stages]


@torch.inference_mode(False)
@torch.enable_grad()
def refine(
    control_points: Updates,
    *,
    fixed: Tensor,
    moving: Tensor,
    fixed_mask: Tensor,
    moving_mask: Tensor,
    steps: int,
    similarity: str = "lncc",
    fixed_lesion: Tensor | None = None,
    moving_lesion: Tensor | None = None,
    mind: Mind | None = None,
    window: int = 11,
    diffusion_weight: float = 1.0,
    ndv_weight: float = 1e-5,
    learning_rate: float | None = None,
    levels: int | None = None,
    bound_multiplier: float = 0.99,
    tolerance: float = 1e-2,
) -> Refined:
    """Improves the control points of the finest stages for this pair, by Adam, and gives the best fields that it met.

    The variables are ``v`` in ``control points = bound * tanh(v)``, with each level's own bound: every update stays
    invertible, and the result diffeomorphic up to resampling. The objective is the training loss of the last fields,
    mean of both directions: ``lncc + diffusion_weight * diffusion + ndv_weight * folded volume``.

    ``lncc`` compares intensities: as they are if both images are of one contrast, else in both contrasts, the mean
    (:mod:`~sitreg_lumir.registration.contrasts`), carried over anew every ten steps by the fields of then. What is the
    best is told from later fields only, and from the prediction, which is compared anew.

    ``mind`` is the mean LNCC of the six MIND channels. The moving image's descriptor is computed on its own grid and
    warped: descriptors of a warped image would see its interpolation, need MIND's gradient in each step, and differ
    little where the field turns little over a voxel. Squared differences gave a worse overlap of tissues.

    Args:
        control_points: of each stage, coarsest first, down to level 0: of the moving and of the fixed side,
            ``(1, 3, ...)``, voxels of the level; of an ensemble the averages. Left as they are.
        fixed: ``(1, 1, X, Y, Z)``, [0, 1].
        moving: the same shape.
        fixed_mask: the brain, ``(1, 1, X, Y, Z)``, bool or 0/1.
        moving_mask: the same.
        steps: of the optimisation; 0 gives the prediction.
        similarity: ``lncc``, of intensities, or ``mind``; each for any contrasts.
        fixed_lesion: what has no counterpart in the other image, ``(1, 1, X, Y, Z)``, bool or 0/1, or None. It is left
            out of the comparison, with all voxels whose MIND patch sees it: the regularisers alone move it.
        moving_lesion: the same of the moving image.
        mind: the descriptor; by default the published one.
        window: of the LNCC, voxels.
        diffusion_weight: as in training.
        ndv_weight: of the folded volume on a grid of 160x224x192, as in the final epochs; scaled on other grids.
        learning_rate: of Adam, in the argument of the tanh, at first (less for under 30 steps), a tenth at the end;
            by default the similarity's: with ``mind``, not what the network was trained for, it stays near its answer.
        levels: how many are improved, the finest; what came before stays as predicted, and its maps are composed once.
            By default two with ``lncc``, which in the same time got further than one or three, and three with ``mind``.
        bound_multiplier: share of the control point bound that the network uses.
        tolerance: of the inversions, voxels.

    Returns:
        the best of all steps by the objective, the prediction included: never something worse.

    Raises:
        ValueError: shapes do not belong together, control points lie beyond their bound, or an option is out of range.

    Source: instance-specific optimisation: Balakrishnan et al., VoxelMorph, IEEE TMI 2019; bounded updates: Honkamaa &
    Marttinen, SITReg, Machine Learning for Biomedical Imaging 2024.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    learning_rate = SIMILARITIES[similarity][0] if learning_rate is None else learning_rate
    levels = SIMILARITIES[similarity][1] if levels is None else levels
    if steps < 0 or levels < 1 or learning_rate <= 0 or not 0 < bound_multiplier < 1:
        raise ValueError(
            "steps must not be negative, levels and learning_rate positive, and bound_multiplier between 0 and 1, "
            f"got {steps}, {levels}, {learning_rate} and {bound_multiplier}"
        )
    _check_images(
        fixed=fixed, moving=moving, fixed_mask=fixed_mask, moving_mask=moving_mask,
        fixed_lesion=fixed_lesion, moving_lesion=moving_lesion,
    )  # fmt: skip
    shape = tuple(fixed.shape[2:])
    bounds = [bound_multiplier * control_point_bound((2**level,) * 3) for level in reversed(range(len(control_points)))]
    _check_control_points(control_points, bounds, shape)
    descriptor = (Mind() if mind is None else mind) if similarity == "mind" else None
    images = (
        outside_lesion(fixed, fixed_mask, fixed_lesion, descriptor),
        outside_lesion(moving, moving_mask, moving_lesion, descriptor),
    )
    weights = _Weights(window, diffusion_weight, ndv_weight * _PUBLISHED_VOXELS / fixed.numel())
    points = [(first.detach().clone(), second.detach().clone()) for first, second in control_points]
    kept, best, best_step = points[:-levels], points[-levels:], 0
    with torch.no_grad():
        start = _compose(kept, Maps(), len(points), shape, tolerance).maps
    arguments = [
        tuple(torch.atanh((side / bound).clamp(-_LARGEST_SHARE, _LARGEST_SHARE)).requires_grad_() for side in update)
        for update, bound in zip(best, bounds[-levels:], strict=True)
    ]
    rate = learning_rate * min(1.0, steps / _FULL_RATE_STEPS)
    optimizer = torch.optim.Adam(
        [side for update in arguments for side in update], lr=rate, betas=_BETAS, eps=_EPSILON, foreach=False
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), rate / 10)
    for step in range(steps + 1):
        with torch.set_grad_enabled(learning := step < steps):
            updates = [
                (bound * torch.tanh(first), bound * torch.tanh(second))
                for (first, second), bound in zip(arguments, bounds[-levels:], strict=True)
            ]
            fields = _fields(updates, start, shape, tolerance)
        now = [field.detach() for field in fields]
        if step == 0:
            predicted = now
            carried_over = similarity == "lncc" and not of_one_contrast(*images, *now)
        if step == 0 or (carried_over and learning and step % _RENEWED == 0):
            compared = in_both_contrasts(*images, *now) if carried_over else images
            before = after = _both_ways(predicted, compared, weights)[0]  # what was met before was measured otherwise
            best, best_step = points[-levels:], 0
        met, slopes = _both_ways(now, compared, weights, learning)
        if met.objective < after.objective:
            best, best_step, after = [(first.detach(), second.detach()) for first, second in updates], step, met
        if learning:
            optimizer.zero_grad()
            torch.autograd.backward(fields, slopes)
            optimizer.step()
            schedule.step()
        del updates, fields, now, slopes  # room for the next step's
    with torch.no_grad():
        disp, disp_inv = _fields(best, start, shape, tolerance)
    objective, dissimilarity = zip(before, after, strict=True)
    return Refined(disp, disp_inv, [*kept, *best], best_step, objective, dissimilarity, carried_over)


def _both_ways(
    fields: Sequence[Tensor], compared: Sequence[Compared], weights: _Weights, learning: bool = False
) -> tuple[_Value, list[Tensor]]:
    """The mean over both directions; with ``learning`` also each direction's slope of the objective by its field.

    Slopes are taken here and not along with the maps' gradient, so that what a comparison keeps in memory is gone
    before the next one. They are those of a sum over voxels, which have one size on all grids, as Adam's epsilon has.
    """
    values: list[tuple[float, float]] = []
    slopes: list[Tensor] = []
    for field, here, there in zip(fields, compared, reversed(compared), strict=True):
        disp = field.detach().requires_grad_(learning)
        with torch.set_grad_enabled(learning):
            mask = warp_mask(there.mask, disp) & here.mask
            dissimilarity = channel_lncc(warp(there.values, disp), here.values, mask, weights.window)
            total = dissimilarity + weights.diffusion * diffusion(disp) + weights.ndv * ndv_sum(disp)
            if learning:
                slopes += torch.autograd.grad(total * disp[0, 0].numel(), disp)
        values.append((float(total.detach()), float(dissimilarity.detach())))
    return _Value(*((one + other) / 2 for one, other in zip(*values, strict=True))), slopes


def _compose(updates: Updates, start: Maps, levels: int, shape: tuple[int, ...], tolerance: float) -> SymmetricState:
    """What ``start`` becomes by the updates of the coarsest of so many levels."""
    state = SymmetricState(shape, tolerance)
    state.maps = start
    for level, update in zip(reversed(range(levels - len(updates), levels)), updates, strict=True):
        state.update(*update, 2**level)
    return state


def _fields(updates: Updates, start: Maps, shape: tuple[int, ...], tolerance: float) -> tuple[Tensor, Tensor]:
    """The fields both ways that ``start`` and the updates down to level 0, coarsest first, compose to."""
    disp, disp_inv = _compose(updates, start, len(updates), shape, tolerance).fields()
    assert disp_inv is not None
    return disp, disp_inv


def _check_images(**images: Tensor | None) -> None:
    fixed = images["fixed"]
    assert fixed is not None
    if fixed.ndim != 5 or tuple(fixed.shape[:2]) != (1, 1):
        raise ValueError(f"one pair at a time is refined: fixed must be (1, 1, X, Y, Z), got {tuple(fixed.shape)}")
    for name, image in images.items():
        if image is not None and image.shape != fixed.shape:
            raise ValueError(f"{name} must be {tuple(fixed.shape)} as fixed is, got {tuple(image.shape)}")


def _check_control_points(control_points: Updates, bounds: Sequence[float], shape: tuple[int, ...]) -> None:
    if not control_points:
        raise ValueError("no control points given")
    for level, update, bound in zip(reversed(range(len(bounds))), control_points, bounds, strict=True):
        expected = (1, 3, *(-(-size // 2**level) for size in shape))
        for points in update:
            if tuple(points.shape) != expected:
                raise ValueError(f"control points of level {level} must be {expected}, got {tuple(points.shape)}")
            largest = float(points.abs().max())
            if not largest <= bound * (1 + 1e-5):  # room for rounding; not a number fails, too
                raise ValueError(
                    f"control points of level {level} must keep within their bound of {bound:.6g}, got {largest:.6g}"
                )
