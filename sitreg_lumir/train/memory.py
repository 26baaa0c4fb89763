"""What a training step needs of memory, found out by trial steps on a small grid, and what is chosen for it.

Nearly all that a step holds grows with the number of voxels, so two trial steps of different size tell what a pair
of the real grid takes, whatever the architecture, the loss terms and the precision are. On a GPU PyTorch counts what
it allocates; elsewhere :class:`LiveTensors` counts the tensors that live at once.
"""

import math
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TRIAL_EDGE = {"cuda": 96}  # voxels of the trial grid's axes, at most; a GPU's kernels are chosen by size
_TRIAL_EDGE_ELSEWHERE = 32
_TRIAL_VOXELS = {"cuda": 800_000}  # of the smaller trial step
_TRIAL_VOXELS_ELSEWHERE = 65_000
_USABLE = {"cuda": 0.9}  # share of the free memory that a step may take; an allocator's blocks leave gaps
_USABLE_ELSEWHERE = 0.5  # a process takes up to twice what its tensors do: work spaces, copies in other layouts


class Need(NamedTuple):
    """What a training step needs besides the weights, bytes: ``fixed``, and ``per_pair`` for each pair at once."""

    fixed: float
    per_pair: float

    def of(self, pairs: int) -> float:
        """Bytes for so many pairs at once."""
        return self.fixed + pairs * self.per_pair


class Choice(NamedTuple):
    """Pairs at once, whether activations are computed again, the bytes that takes, and whether they are there."""

    micro_batch: int
    recompute: bool
    bytes: float
    fits: bool


def choose(
    sizes: Sequence[int], needed: Callable[[int, bool], float], room: float | None, recompute: bool | None
) -> Choice:
    """The most pairs at once that have room, without recomputing where one pair has room without.

    Args:
        sizes: pairs at once to choose from.
        needed: bytes of a step with so many pairs at once, with or without recomputing; asked only where it matters.
        room: bytes that may be taken; None where nobody knows, which counts as enough.
        recompute: True or False where that is given, None where it is to be chosen.

    Returns:
        the choice; where nothing has room, the one that needs least, with ``fits`` False.
    """
    ways = (False, True) if recompute is None else (recompute,)
    for again in ways:
        for size in sorted(sizes, reverse=True):
            total = needed(size, again)
            if room is None or total <= room:
                return Choice(size, again, total, True)
    return Choice(min(sizes), ways[-1], needed(min(sizes), ways[-1]), False)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process could still take on its device; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    _, available = system_memory()
    limit = _limit_of_group()
    known = [value for value in (available, limit) if value is not None]
    return min(known) if known else None


def room_on(device: torch.device, sharers: int) -> float | None:
    """Bytes that one of ``sharers`` processes may plan with; those on GPUs have a device each."""
    free = free_memory(device)
    if free is None:
        return None
    if device.type == "cuda":
        return _USABLE["cuda"] * free
    return _USABLE_ELSEWHERE * free / sharers


def measure(step: Callable[[int, tuple[int, int, int]], Any], shape: Sequence[int], device: torch.device) -> Need:
    """What a step needs on the grid ``shape``, by two trial steps.

    Args:
        step: runs a training step of so many pairs on a grid ``(X, Y, Z)``.
        shape: ``(X, Y, Z)`` of the real grid.
        device: where the step runs.
    """
    grid, pairs = trial_grid(shape, device)
    if device.type == "cuda":
        step(pairs, grid)  # compiles kernels, and lets libraries take what they keep
    small, large = (peak_bytes(partial(step, count, grid), device) for count in (pairs, 2 * pairs))
    per_pair = (large - small) / pairs
    scale = math.prod(shape) / math.prod(grid)
    return Need(max(small - pairs * per_pair, 0.0), max(per_pair, 0.0) * scale)


def trial_grid(shape: Sequence[int], device: torch.device) -> tuple[tuple[int, int, int], int]:
    """The grid of trial steps, and the pairs of the smaller one.

    The axes are whole multiples of every level's spacing where the real ones allow it; two pairs at least, since a CPU
    convolves single small volumes in another way than large ones.
    """
    edge = _TRIAL_EDGE.get(device.type, _TRIAL_EDGE_ELSEWHERE)
    x, y, z = (min(int(size), edge) for size in shape)
    voxels = min(_TRIAL_VOXELS.get(device.type, _TRIAL_VOXELS_ELSEWHERE), 2 * math.prod(shape))
    return (x, y, z), max(1 if device.type == "cuda" else 2, round(voxels / (x * y * z)))


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that tensors take at once while ``step`` runs, beyond those that were there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with LiveTensors() as live:
        step()
    peak: int = live.peak
    return peak


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations within the block make, and the most at one time.

    What operations hold only while they run is not counted, nor are tensors that existed before.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def kept_bytes(forward: Callable[[], Any], parameters: Sequence[Tensor]) -> int:
    """Bytes that ``forward`` keeps for its backward pass, parameters left out, each storage counted once."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    total = sum(kept.values())
    del result
    return total


def system_memory() -> tuple[int | None, int | None]:
    """Memory of the machine, and what the system could give of it, bytes; None where it does not say."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if sys.platform == "darwin" else None, None
    entries = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    total, free = (entries.get(name, "").split() for name in ("MemTotal", "MemAvailable"))
    return int(total[0]) * 1024 if total else None, int(free[0]) * 1024 if free else None


def _limit_of_group() -> int | None:
    """What the control group of a container or a cluster's job leaves, bytes; None without a limit."""
    folder = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(int((folder / limit).read_text()) - int((folder / used).read_text()), 0)
        except (OSError, ValueError):
            continue
    return None
