"""The loss as a list of terms, each with a name, a scope and a weight that may change with time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sitreg_lumir.measures.losses import diffusion, similarity
from sitreg_lumir.network.sitreg import Stage


@dataclass(frozen=True)
class PairOutputs:
    """What one training step knows of one pair.

    Attributes:
        stages: coarsest first, each with fields at full resolution; the last one is the result.
        fixed: clean view, ``(B, 1, X, Y, Z)``, [0, 1].
        moving: clean view.
        fixed_mask: bool, ``(B, 1, X, Y, Z)``.
        moving_mask: bool.
        window: of the LNCC at this resolution, voxels.

    Examples:
        >>> fixed, moving = torch.rand(2, 1, 1, 8, 10, 6)
        >>> outputs = sitreg_lumir.PairOutputs([], fixed, moving, fixed > 0, moving > 0)
        >>> outputs.window
        11
    """

    stages: Sequence[Stage]
    fixed: Tensor
    moving: Tensor
    fixed_mask: Tensor
    moving_mask: Tensor
    window: int = 11


@dataclass(frozen=True)
class LossTerm:
    """One addend of the loss.

    Attributes:
        name: logged as ``train/<name>``, without its weight.
        scope: ``pair``: called on each :class:`PairOutputs`; ``triplet``: on the list of three.
        weight: of (epoch with fraction, optimiser step); 0 means that the term is not evaluated. A pure function,
            so that resuming has nothing to restore.
        call: the value.
        earlier: whether it looks at the stages before the last.
        inverse: whether it looks at inverse fields.

    Examples:
        >>> term = sitreg_lumir.LossTerm(
        ...     "energy", "pair", lambda epoch, step: 0.01, lambda outputs: outputs.stages[-1].disp.square().mean()
        ... )
        >>> term.weight(2.5, 1000)
        0.01
    """

    name: str
    scope: str
    weight: Callable[[float, int], float]
    call: Callable[..., Tensor]
    earlier: bool = False
    inverse: bool = True


def pair_terms(
    diffusion_weight: float, stage_weight: float, stage_every: int = 1, one_direction: bool = False
) -> list[LossTerm]:
    """The terms of the first phase: LNCC and diffusion of the result, and weakly of every earlier stage.

    Args:
        diffusion_weight: of the smoothness against the similarity.
        stage_weight: of each earlier stage against the last.
        stage_every: earlier stages count in every so many-th step only, with so many times the weight.
        one_direction: of the fields on the fixed grid alone.
    """

    def stage_similarity(outputs: PairOutputs, stage: Stage) -> Tensor:
        fixed, moving = (outputs.fixed, outputs.fixed_mask), (outputs.moving, outputs.moving_mask)
        there = similarity(stage.disp, fixed[0], moving[0], fixed[1], moving[1], outputs.window)
        if one_direction:
            return there
        back = similarity(stage.disp_inv, moving[0], fixed[0], moving[1], fixed[1], outputs.window)
        return (there + back) / 2

    def stage_diffusion(stage: Stage) -> Tensor:
        if one_direction:
            return diffusion(stage.disp)
        return (diffusion(stage.disp) + diffusion(stage.disp_inv)) / 2

    def earlier_stages(outputs: PairOutputs) -> Tensor:
        values = [
            stage_similarity(outputs, stage) + diffusion_weight * stage_diffusion(stage)
            for stage in outputs.stages[:-1]
        ]
        return sum(values, start=outputs.fixed.new_zeros(()))

    def of_last(value: Callable[[PairOutputs], Tensor], name: str, weight: float) -> LossTerm:
        return LossTerm(name, "pair", lambda epoch, step: weight, value, inverse=not one_direction)

    return [
        of_last(lambda outputs: stage_similarity(outputs, outputs.stages[-1]), "lncc", 1.0),
        of_last(lambda outputs: stage_diffusion(outputs.stages[-1]), "diffusion", diffusion_weight),
        LossTerm(
            "earlier_stages",
            "pair",
            lambda epoch, step: 0.0 if step % stage_every else stage_every * stage_weight,
            earlier_stages,
            earlier=True,
            inverse=not one_direction,
        ),
    ]
