"""``auto``: how many pairs a device takes at once and whether it recomputes, from the memory that is free."""

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.lightning_internals import step_context
from sitreg_lumir.data.sampler import split_batch
from sitreg_lumir.train.memory import Choice, Need, choose, free_memory, measure, room_on
from sitreg_lumir.train.settings import give_back_freed_memory, keep_freed_memory
from sitreg_lumir.train.triplets import View, three_pairs_in_turn

if TYPE_CHECKING:
    from sitreg_lumir.train.registration import RegistrationModule

_TRIPLET_AT_MOST = 4  # pairs kept at once that a triplet takes less than
_STATE = 3  # copies of the weights beside them: gradients, and Adam's two means


def settle(module: "RegistrationModule", data: LumirDataModule) -> None:
    """Replaces ``auto`` in ``data.micro_batch`` and ``model.recompute`` by values, the same in all processes.

    The gradient is that of the whole batch, whatever is chosen. On a GPU as many pairs are taken at once as have room.
    Elsewhere one: more would not be faster. Activations are computed again only where one pair has no room without.
    A run that goes on within an epoch keeps its micro batch. Says in one line what was chosen, and why.

    Args:
        module: on its device; its Trainer runs.
        data: set up.
    """
    if not data.automatic and not module.automatic:
        return
    trainer, device = module.trainer, module.device
    processes = trainer.world_size
    sizes = _sizes(data, processes, device)
    recompute = None if module.automatic else module.recompute
    sharers = max(1, processes // trainer.num_nodes)
    room = room_on(device, sharers)
    if len(sizes) == 1 and recompute is not None:
        choice = Choice(sizes[0], recompute, 0.0, True)  # nothing is left to choose
    else:
        choice = _same_everywhere(choose(sizes, _requirement(module, data, processes, room), room, recompute), device)
    if data.automatic:
        data.micro_batch = choice.micro_batch
    if module.automatic:
        module.recompute = choice.recompute
        if device.type == "cpu":
            (give_back_freed_memory if choice.recompute else keep_freed_memory)()
    if trainer.is_global_zero:
        print(line(choice, data.shape, device, free_memory(device), room), flush=True)


def line(
    choice: Choice, shape: tuple[int, int, int], device: torch.device, free: float | None, room: float | None
) -> str:
    """What was chosen, and why; ``free`` and ``room`` (what may be planned with) in bytes."""
    text = f"memory: micro_batch {choice.micro_batch}, recompute {'true' if choice.recompute else 'false'}"
    if not choice.bytes:
        return text
    grid = "x".join(map(str, shape))
    pairs = "1 pair needs" if choice.micro_batch == 1 else f"{choice.micro_batch} pairs at once need"
    text += f", since at {grid} {pairs} about {choice.bytes / 1e9:.2f} GB beside the weights"
    if free is None or room is None:
        return text
    text += f", and of {free / 1e9:.1f} GB free on {device} this process plans with {room / 1e9:.1f} GB"
    if not choice.fits:
        text += "; that may not be enough: a smaller network or grid needs less"
    return text


def _sizes(data: LumirDataModule, processes: int, device: torch.device) -> list[int]:
    """Pairs at once that may be chosen."""
    if data.pairs_until == 0:
        return [1]  # triplets only, which come one by one
    if not data.automatic:
        return [split_batch(data.batch_size, processes, data.micro_batch)[0]]
    if data.resumed_micro_batch is not None:
        return [data.resumed_micro_batch]
    share, _ = split_batch(data.batch_size, processes, None)
    return [1] if device.type != "cuda" else [size for size in range(1, share + 1) if share % size == 0]


def _requirement(
    module: "RegistrationModule", data: LumirDataModule, processes: int, room: float | None
) -> Callable[[int, bool], float]:
    """Bytes of a step with so many pairs at once, or of a triplet where one comes and might not have ``room``."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    state = weights * (_STATE + (processes > 1))  # processes exchange gradients in buffers of their own

    @cache
    def need(triplet: bool, recompute: bool) -> Need:
        try:
            return measure(_trial_step(module, triplet, recompute), data.shape, module.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return Need(math.inf, math.inf)

    def needed(pairs: int, recompute: bool) -> float:
        if data.pairs_until == 0:
            return state + need(True, recompute).of(1)
        total = state + need(False, recompute).of(pairs)
        enough = room is None or state + need(False, recompute).of(_TRIPLET_AT_MOST) <= room
        if data.pairs_until is None or enough:
            return total
        return max(total, state + need(True, recompute).of(1))

    return needed


def _trial_step(
    module: "RegistrationModule", triplet: bool, recompute: bool
) -> Callable[[int, tuple[int, int, int]], None]:
    """A step of so many pairs, or triplets, on any grid, as training takes it, that leaves no trace.

    Its images are noise, and all loss terms take part. Where memory is counted by tensors, the gradients of large
    weights are left out: on a small grid they would hide the activations.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if module.device.type != "cuda":
        parameters = [parameter for parameter in parameters if parameter.ndim < 2] or parameters

    def step(count: int, grid: tuple[int, int, int]) -> None:
        generator = torch.Generator(module.device).manual_seed(0)
        size = (3 if triplet else 2, count, 1, *grid)
        stored = torch.randint(0, 256, size, dtype=torch.uint8, device=module.device, generator=generator)
        with module.trial(recompute), torch.enable_grad():
            with step_context(module.trainer):
                loss = forward(stored)
            torch.autograd.grad(loss, parameters, allow_unused=True)

    def forward(stored: Tensor) -> Tensor:
        views = [View(*module.clean(images), None) for images in stored]
        views = [view._replace(network_input=module.inputs(view.clean)) for view in views]
        if not triplet:
            return module.pair_step(views[0], views[1])[0]
        fields = three_pairs_in_turn(module.pair_step, views)
        loss, masks = fields.loss, [view.mask for view in views]
        for term, weight in module.active_terms("triplet"):
            loss = loss + weight * term.call(fields.disps, fields.disps_inv, masks)
        return loss

    return step


def _same_everywhere(choice: Choice, device: torch.device) -> Choice:
    """What all processes can do: the fewest pairs, and recomputing if one of them has to."""
    if not (dist.is_available() and dist.is_initialized()):
        return choice
    common = torch.tensor(
        [choice.micro_batch, not choice.recompute, choice.fits, -choice.bytes], dtype=torch.float64, device=device
    )
    dist.all_reduce(common, op=dist.ReduceOp.MIN)
    micro_batch, keep, fits, most = common.tolist()
    return Choice(int(micro_batch), not keep, -most, bool(fits))
