"""One triplet in one step, in two ways with one gradient: three processes with a pair each, or one device.

Pair k of a triplet has image k as moving and image k + 1 (cyclically) as fixed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class View(NamedTuple):
    """One image in a training step.

    Attributes:
        clean: ``(B, 1, X, Y, Z)``, [0, 1]: what the loss compares.
        mask: bool, the same shape.
        network_input: ``(B, C, X, Y, Z)``: what the network gets; None where another process needs it.
    """

    clean: Tensor
    mask: Tensor
    network_input: Tensor | None


class TripletFields(NamedTuple):
    """What a triplet's pairs give.

    Attributes:
        loss: mean of the losses of the pairs that this process has.
        disps: the three pairs' last fields, ``(B, 3, X, Y, Z)``, voxels; own ones with gradient.
        disps_inv: their inverse fields.
        gradient_scale: what the gradient of a term of all three has to be multiplied by, since the mean over processes
            divides the share that each of them contributes.
    """

    loss: Tensor
    disps: list[Tensor]
    disps_inv: list[Tensor]
    gradient_scale: float


PairStep = Callable[[View, View], tuple[Tensor, Tensor, Tensor]]


def pair_of(rank: int) -> tuple[int, int]:
    """Positions of the moving and the fixed image of the pair that a rank of a group of three takes."""
    return rank % 3, (rank + 1) % 3


def three_pairs_in_turn(pair_step: PairStep, views: Sequence[View]) -> TripletFields:
    """All pairs on one device, in the memory of one pair: the first two are computed again in the backward pass.

    That pass begins with the last pair, so only its activations are kept.
    """
    results = []
    for rank in range(3):
        moving, fixed = pair_of(rank)
        if rank < 2:
            result = checkpoint(pair_step, views[moving], views[fixed], use_reentrant=False, preserve_rng_state=False)
        else:
            result = pair_step(views[moving], views[fixed])
        results.append(result)
    losses, disps, disps_inv = zip(*results, strict=True)
    return TripletFields(torch.stack(losses).mean(), list(disps), list(disps_inv), 1.0)


def one_pair_each(pair_step: PairStep, views: Sequence[View], rank: int, group: Any) -> TripletFields:
    """This process's pair; the other two fields come from the group's other processes, without gradient."""
    moving, fixed = pair_of(rank)
    loss, disp, disp_inv = pair_step(views[moving], views[fixed])
    own = torch.stack([disp.detach(), disp_inv.detach()])
    received = [torch.empty_like(own) for _ in range(3)]
    dist.all_gather(received, own, group=group)
    disps, disps_inv = ([both[index] for both in received] for index in (0, 1))
    disps[moving], disps_inv[moving] = disp, disp_inv
    return TripletFields(loss, disps, disps_inv, 3.0)


def groups_of_three(rank: int, world_size: int) -> Any:
    """The process group of this rank and its two neighbours; all processes must call it."""
    groups = [dist.new_group([first, first + 1, first + 2]) for first in range(0, world_size, 3)]
    return groups[rank // 3]


def scale_gradient(value: Tensor, scale: float) -> Tensor:
    """The same value, with its gradient multiplied by ``scale``."""
    return value if scale == 1 else scale * value - (scale - 1) * value.detach()
