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
    """

    stages: Sequence[Stage]
    fixed: Tensor
    moving: Tensor
    fixed_mask: Tensor
    moving_mask: Tensor


@dataclass(frozen=True)
class LossTerm:
    """One addend of the loss.

    Attributes:
        name: logged as ``train/<name>``, without its weight.
        scope: ``pair``: called on each :class:`PairOutputs`; ``triplet``: on the list of three.
        weight: of (epoch with fraction, optimiser step); 0 means that the term is not evaluated. A pure function,
            so that resuming has nothing to restore.
        call: the value.
    """

    name: str
    scope: str
    weight: Callable[[float, int], float]
    call: Callable[..., Tensor]


def pair_terms(diffusion_weight: float, stage_weight: float, window: int) -> list[LossTerm]:
    """The terms of the first phase: LNCC and diffusion of the result, and weakly of every earlier stage.

    Args:
        diffusion_weight: of the smoothness against the similarity.
        stage_weight: of each earlier stage against the last.
        window: of the LNCC, voxels.
    """

    def stage_similarity(outputs: PairOutputs, stage: Stage) -> Tensor:
        fixed, moving = (outputs.fixed, outputs.fixed_mask), (outputs.moving, outputs.moving_mask)
        there = similarity(stage.disp, fixed[0], moving[0], fixed[1], moving[1], window)
        back = similarity(stage.disp_inv, moving[0], fixed[0], moving[1], fixed[1], window)
        return (there + back) / 2

    def stage_diffusion(stage: Stage) -> Tensor:
        return (diffusion(stage.disp) + diffusion(stage.disp_inv)) / 2

    def earlier_stages(outputs: PairOutputs) -> Tensor:
        values = [
            stage_similarity(outputs, stage) + diffusion_weight * stage_diffusion(stage)
            for stage in outputs.stages[:-1]
        ]
        return sum(values, start=outputs.fixed.new_zeros(()))

    return [
        LossTerm(
            "lncc",
            "pair",
            lambda epoch, step: 1.0,
            lambda outputs: stage_similarity(outputs, outputs.stages[-1]),
        ),
        LossTerm(
            "diffusion",
            "pair",
            lambda epoch, step: diffusion_weight,
            lambda outputs: stage_diffusion(outputs.stages[-1]),
        ),
        LossTerm("earlier_stages", "pair", lambda epoch, step: stage_weight, earlier_stages),
    ]
