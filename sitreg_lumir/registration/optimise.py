"""Instance optimisation: improves the predicted control points for one pair, within their bound.

Images are ``(1, 1, X, Y, Z)`` in [0, 1], fields ``(1, 3, X, Y, Z)`` in voxels. Both images are treated alike, so
exchanging them exchanges the results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.sitreg import Stage
from sitreg_lumir.registration.objective import Comparison, ImagePair, Weights, objective
from sitreg_lumir.registration.optimised_fields import ExactFields, SampledFields, Updates

SIMILARITIES = {"lncc": (0.2, 2), "mind": (0.03, 3)}  # name: learning rate, levels
_PUBLISHED_VOXELS = 160 * 224 * 192  # of the grid on which the NDV's weight is 1e-5
_LARGEST_SHARE = 1 - 1e-6  # of the bound, so that the inverse of the tanh is finite
_BETAS = (0.7, 0.9)  # of Adam: shorter memory than usual, for a few dozen steps
_FULL_RATE_STEPS = 30  # with fewer steps, the first ones are shorter in proportion
_EPSILON = 1e-3  # of Adam: smaller gradients of the sum over voxels are noise and must not become full steps
_TRANSFER_EVERY = 10  # steps, after which the contrast transfer is repeated with the current fields


@dataclass(frozen=True, eq=False)
class Optimised:
    """The result of instance optimisation.

    Attributes:
        disp: ``(1, 3, X, Y, Z)``, voxels, fixed grid: ``warp(moving, disp)`` matches the fixed image. Of the exact map
            its samples, but more than a voxel from the brain those of the network's fields.
        disp_inv: ``(1, 3, X, Y, Z)``, voxels, moving grid: the inverse of ``disp``.
        control_points: of all updates, coarsest first: of the moving and of the fixed image, voxels of the level.
        steps: number of steps that led to this result; 0 if the prediction was kept.
        objective: of the prediction and of the result, measured alike; lower is better.
        dissimilarity: the objective's image term, of the prediction and of the result; in [-1, 0], lower is better.
        contrasts_transferred: whether the contrasts differ, so that intensities were compared after contrast transfer.
    """

    disp: Tensor
    disp_inv: Tensor
    control_points: Updates
    steps: int
    objective: tuple[float, float]
    dissimilarity: tuple[float, float]
    contrasts_transferred: bool

    @property
    def improved(self) -> bool:
        """Whether the objective fell; if not, the prediction was kept."""
        return self.steps > 0


def control_points_of(stages: Sequence[Stage], levels: int) -> list[tuple[Tensor, Tensor]]:
    """The control points of all stages, coarsest first, as :func:`optimise` takes them.

    Args:
        stages: of :func:`~sitreg_lumir.network.sitreg.run_stages`, of all levels.
        levels: of the network.

    Raises:
        ValueError: stages are missing.
    """
    present = [stage.level for stage in stages]
    if present != list(reversed(range(levels))):
        raise ValueError(f"stages of all {levels} levels are needed, coarsest first, got {present}")
    return [(stage.control_points, stage.control_points_reverse) for stage in stages]


@torch.inference_mode(False)
@torch.enable_grad()
def optimise(
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
    exact_share: float = 0.25,
    finer: ImagePair | None = None,
) -> Optimised:
    """Improves the control points of the finest levels for this pair by Adam, and returns the best fields of all steps.

    The variables are ``v`` in ``control points = bound * tanh(v)``, with each level's own bound: every update stays
    invertible, and the result diffeomorphic up to resampling. The objective is the training loss of the last fields,
    mean of both directions: ``lncc + diffusion_weight * diffusion + ndv_weight * folded volume``.

    ``lncc`` compares intensities: as they are if both images are of one contrast, else in both contrasts, the mean
    of both (:mod:`~sitreg_lumir.registration.contrast_transfer`). The contrast transfer is repeated every ten
    steps with the current fields; then the best fields are sought again, among later ones and the prediction, since all
    must be measured alike.

    ``mind`` is the mean LNCC of the six MIND channels. The moving image's descriptor is computed on its own grid and
    warped: descriptors of a warped image would depend on its interpolation, need MIND's gradient in each step, and
    differ little where the field turns little over a voxel. Squared differences gave a worse overlap of tissues.

    Args:
        control_points: of each stage, coarsest first, down to level 0: of the moving and of the fixed image,
            ``(1, 3, ...)``, voxels of the level; of an ensemble the averages. Not written to.
        fixed: ``(1, 1, X, Y, Z)``, in [0, 1].
        moving: ``(1, 1, X, Y, Z)``, in [0, 1].
        fixed_mask: the fixed brain, ``(1, 1, X, Y, Z)``, bool or 0/1.
        moving_mask: the moving brain, ``(1, 1, X, Y, Z)``, bool or 0/1.
        steps: of the optimisation; with 0 the prediction is returned.
        similarity: ``lncc``, of intensities, or ``mind``; each for any contrasts.
        fixed_lesion: what has no counterpart in the other image, ``(1, 1, X, Y, Z)``, bool or 0/1, or None. It is left
            out of the comparison, with all voxels whose MIND patch reaches into it; only the regularisers act there.
        moving_lesion: what has no counterpart in the fixed image, ``(1, 1, X, Y, Z)``, bool or 0/1, or None.
        mind: the MIND descriptor; by default the published one.
        window: of the LNCC, voxels.
        diffusion_weight: weight of the diffusion term, as in training.
        ndv_weight: weight of the folded volume on a grid of 160x224x192, as in the final epochs; scaled on other grids.
        learning_rate: of Adam on the argument of the tanh, at first (less for under 30 steps), a tenth at the end; by
            default the similarity's, which with ``mind`` keeps the result near the prediction.
        levels: number of the finest levels that are improved; coarser ones stay as predicted and are composed once. By
            default two with ``lncc``, which in equal time gained more than one or three, and three with ``mind``.
        bound_multiplier: share of the control point bound that the network uses.
        tolerance: stop threshold of the inversions, voxels.
        exact_share: share of the steps, the last ones, in which images are compared by the exact map, which is what
            users get. In those before the fields are sampled as the network does: in half the time, but what the
            objective gains where these differ from the exact map is no gain, and folds it between samples.
        finer: both images on a grid whose voxels divide those of the model's grid, ``(1, 1, kX, kY, kZ)``. In the steps
            that see the exact map they are compared there as well, with a window of as many voxels: the image term is
            the mean of both.

    Returns:
        the best fields by the objective, the prediction included, so never worse ones.

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
    if not 0 <= exact_share <= 1:
        raise ValueError(f"exact_share must be between 0 and 1, got {exact_share}")
    if finer is not None and not exact_share:
        raise ValueError("finer images are compared by the exact map: exact_share must not be 0")
    images = ImagePair(fixed, moving, fixed_mask, moving_mask, fixed_lesion, moving_lesion)
    images.check()
    shape = tuple(fixed.shape[2:])
    bounds = [bound_multiplier * control_point_bound((2**level,) * 3) for level in reversed(range(len(control_points)))]
    _check_control_points(control_points, bounds, shape)
    descriptor = (Mind() if mind is None else mind) if similarity == "mind" else None
    comparisons = [Comparison(images, 1, descriptor)]
    if finer is not None:
        finer.check()
        finer_comparison = Comparison(finer, finer.finer_factor(shape), descriptor)
    weights = Weights(window, diffusion_weight, ndv_weight * _PUBLISHED_VOXELS / fixed.numel())
    points = [(first.detach().clone(), second.detach().clone()) for first, second in control_points]
    kept, best, best_step = points[:-levels], points[-levels:], 0
    variables = _BoundedPoints(best, bounds[-levels:])
    fields_of: SampledFields | ExactFields = SampledFields(points, len(kept), shape, tolerance)
    exact_from = steps - ceil(exact_share * steps) if exact_share else steps + 1
    optimizer, schedule = _adam(variables.arguments, learning_rate, steps)
    for step in range(steps + 1):
        with torch.set_grad_enabled(learning := step < steps):
            updates = variables.updates()
            fields = fields_of(updates)
        current = [field.detach() for field in fields]
        if step == exact_from:
            with torch.no_grad():
                brains = fixed_mask.bool(), moving_mask.bool()
                fields_of = ExactFields([*kept, *updates], len(kept), current, brains, tolerance)
                predicted: Sequence[Tensor] = fields_of(points[-levels:]) if step else ()
            with torch.set_grad_enabled(learning):
                fields = fields_of(updates)
            current = [field.detach() for field in fields]
            if finer is not None:
                comparisons.append(finer_comparison)
        if step == 0:
            predicted = current
            contrasts_transferred = similarity == "lncc" and not comparisons[0].same_contrast(current)
        transfer = contrasts_transferred and (step == 0 or (learning and step % _TRANSFER_EVERY == 0))
        if contrasts_transferred and (transfer or step == exact_from):
            for comparison in comparisons if transfer else comparisons[1:]:
                comparison.transfer_contrasts(current)
        if transfer or step in (0, exact_from):
            before, _ = objective(predicted, comparisons, weights)
            after, best, best_step = before, points[-levels:], 0  # earlier steps were compared otherwise
        value, gradients = objective(current, comparisons, weights, learning)
        if value.objective < after.objective:
            best, best_step, after = [(first.detach(), second.detach()) for first, second in updates], step, value
        if learning:
            optimizer.zero_grad()
            torch.autograd.backward(fields, gradients)
            optimizer.step()
            schedule.step()
        del updates, fields, current, gradients  # frees memory for the next step
    with torch.no_grad():
        disp, disp_inv = fields_of(best)
    objectives, dissimilarities = zip(before, after, strict=True)
    return Optimised(disp, disp_inv, [*kept, *best], best_step, objectives, dissimilarities, contrasts_transferred)


class _BoundedPoints:
    """Control points as ``bound * tanh(argument)``: no step of the optimiser takes them beyond their bound.

    Args:
        points: of each level, coarsest first, of the moving and of the fixed image, voxels of the level.
        bounds: of each level, voxels of the level.
    """

    def __init__(self, points: Updates, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.arguments = [
            torch.atanh((image_points / bound).clamp(-_LARGEST_SHARE, _LARGEST_SHARE)).requires_grad_()
            for update, bound in zip(points, bounds, strict=True)
            for image_points in update
        ]

    def updates(self) -> list[tuple[Tensor, Tensor]]:
        """The control points of each level, coarsest first, with gradients to the arguments."""
        pairs = zip(self.arguments[::2], self.arguments[1::2], self.bounds, strict=True)
        return [(bound * torch.tanh(first), bound * torch.tanh(second)) for first, second, bound in pairs]


def _adam(arguments: list[Tensor], learning_rate: float, steps: int) -> tuple[Adam, CosineAnnealingLR]:
    """Adam with a learning rate that falls to a tenth over the steps, and is smaller for fewer than 30 steps."""
    rate = learning_rate * min(1.0, steps / _FULL_RATE_STEPS)
    optimizer = Adam(arguments, lr=rate, betas=_BETAS, eps=_EPSILON, foreach=False)
    return optimizer, CosineAnnealingLR(optimizer, max(steps, 1), rate / 10)


def _check_control_points(control_points: Updates, bounds: Sequence[float], shape: tuple[int, ...]) -> None:
    if not control_points:
        raise ValueError("control_points must not be empty")
    for level, update, bound in zip(reversed(range(len(bounds))), control_points, bounds, strict=True):
        expected = (1, 3, *(-(-size // 2**level) for size in shape))
        for points in update:
            if tuple(points.shape) != expected:
                raise ValueError(f"control points of level {level} must be {expected}, got {tuple(points.shape)}")
            largest = float(points.abs().max())
            if not largest <= bound * (1 + 1e-5):  # allows for rounding; NaN fails, too
                raise ValueError(
                    f"control points of level {level} must keep within their bound of {bound:.6g}, got {largest:.6g}"
                )
