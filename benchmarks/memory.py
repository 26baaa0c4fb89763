"""Memory that a training step of one pair takes, counted on a CPU; nothing of it is measured on a GPU.

    python benchmarks/memory.py              # from trial steps on a small grid, scaled by the number of voxels
    python benchmarks/memory.py --check      # also counts a real step at 80x112x96: some 2.5 GB, half a minute a row

*Kept* is what the forward pass keeps for the backward pass, each storage counted once and weights left out; *peak*
the most that tensors take at one time in both passes together. Libraries' work spaces and what an allocator loses
between blocks come on top, as do weights, gradients and Adam's means (0.24 GB for the full network). In bfloat16 the
numbers are those of a CPU's autocast; that of a GPU keeps other layers in float32.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmark import SHAPES, random_module

from sitreg_lumir.train.memory import Need, kept_bytes, measure, peak_bytes, trial_grid
from sitreg_lumir.train.triplets import View

CPU = torch.device("cpu")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="also count a real step at 80x112x96")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print("| one pair, full network, GB kept / peak | 2 mm, 80x112x96 | 1 mm, 160x224x192 |\n|---|---|---|")
    for bfloat16 in (False, True):
        for recompute in (False, True):
            name = ("bfloat16" if bfloat16 else "float32") + (", `recompute`" if recompute else "")
            module = random_module(recompute)
            module.active_terms = lambda scope, terms=module.terms: [(t, 1.0) for t in terms if t.scope == scope]
            forward = partial(_forward, module, bfloat16)
            cells = []
            for shape in SHAPES.values():
                kept = _kept(module, forward, shape)
                cells.append(
                    f"{kept / 1e9:.1f} / {measure(partial(_step, module, forward), shape, CPU).of(1) / 1e9:.1f}"
                )
            print(f"| {name} | {cells[1]} | {cells[0]} |", flush=True)
            if options.check:
                shape = SHAPES["2mm"]
                kept = kept_bytes(partial(forward, 1, shape), list(module.parameters()))
                peak = peak_bytes(partial(_step, module, forward, 1, shape), CPU)
                print(f"| counted | {kept / 1e9:.3f} / {peak / 1e9:.3f} | |", flush=True)


def _forward(module: Any, bfloat16: bool, pairs: int, grid: tuple[int, int, int]) -> Any:
    """The loss of so many pairs of noise."""
    images = torch.rand(2, pairs, 1, *grid, generator=torch.Generator().manual_seed(0))
    module.values = {}
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        views = [View(image, image > 0.2, module.inputs(image)) for image in images]
        return module.pair_step(views[0], views[1])[0]


def _step(module: Any, forward: Callable[..., Any], pairs: int, grid: tuple[int, int, int]) -> None:
    """Forward and backward; the gradients of large weights, which would hide the rest on a small grid, left out."""
    torch.autograd.grad(forward(pairs, grid), [parameter for parameter in module.parameters() if parameter.ndim < 2])


def _kept(module: Any, forward: Callable[..., Any], shape: tuple[int, int, int]) -> float:
    """Bytes that one pair keeps on a grid: by two small steps, since copies of the weights do not grow with it."""
    grid, pairs = trial_grid(shape, CPU)
    small, large = (kept_bytes(partial(forward, n, grid), list(module.parameters())) for n in (pairs, 2 * pairs))
    voxels = (shape[0] * shape[1] * shape[2]) / (grid[0] * grid[1] * grid[2])
    per_pair = (large - small) / pairs
    return Need(small - pairs * per_pair, per_pair * voxels).of(1)


if __name__ == "__main__":
    main()
