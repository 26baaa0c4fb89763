"""Time and peak memory of the main computations, each in a process of its own.

    python benchmarks/benchmark.py                       # all cases, table and benchmarks/results/benchmark.json
    python benchmarks/benchmark.py forward_1mm step_2mm  # some

A *unit* is one ``grid_sample`` of a 3-channel field at 160x224x192 (an eighth of it at 80x112x96), measured in the same
process just before; ratios to it carry over between machines better than seconds.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

SHAPES = {"1mm": (160, 224, 192), "2mm": (80, 112, 96)}
CASES = ("forward_1mm", "forward_2mm", "step_2mm", "consistency_2mm", "plain_triplet_2mm")
DESCRIPTION = {
    "forward_1mm": "one pair, full network on MIND, fields both ways, 160x224x192",
    "forward_2mm": "the same, 80x112x96",
    "step_2mm": "training step of one pair with deep supervision, full network, 80x112x96",
    "consistency_2mm": "triplet step with NDV and group consistency, pairs recomputed in turn, 80x112x96",
    "plain_triplet_2mm": "three plain training steps one after the other, 80x112x96",
}


def main() -> None:
    """Runs the named cases and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument(
        "--repeat", type=int, default=3, help="measurements of each, after one that warms up (default: 3)"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    parser.add_argument("--backend", default="auto", help="auto, torch or cpu (default: auto)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "benchmark.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        parser.error(f"unknown case {unknown[0]}; choose from {', '.join(CASES)}")
    if options.one:
        print(json.dumps(measure(options.cases[0], options.repeat, options.threads)))
        return
    results = {}
    print(f"{'case':18} {'seconds':>8} {'units':>7} {'peak GB':>8}  (median of {options.repeat})")
    for case in options.cases or CASES:
        command = [sys.executable, __file__, case, "--one", "--repeat", str(options.repeat)]
        if options.threads:
            command += ["--threads", str(options.threads)]
        environment = {**os.environ, "SITREG_LUMIR_BACKEND": options.backend}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        result = json.loads(done.stdout.splitlines()[-1])
        results[case] = result
        print(
            f"{case:18} {result['seconds']:8.1f} {result['units']:7.1f} {result['peak_gb']:8.2f}  {DESCRIPTION[case]}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"conditions": conditions(), "results": results}, indent=1) + "\n")
    print(f"written: {options.out}")


def conditions() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def measure(case: str, repeat: int, threads: int | None) -> dict[str, Any]:
    """Median time, units and peak memory of one case, in this process."""
    import torch

    from sitreg_lumir.train.settings import prepare_process

    prepare_process()
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    name, grid = case.rsplit("_", 1)
    run = _case(name, SHAPES[grid])
    run()  # compiles and fills the allocator
    seconds, units = [], []
    for _ in range(repeat):
        unit = _unit(SHAPES[grid]) * (8 if grid == "2mm" else 1)
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        units.append(seconds[-1] / unit)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    return {"seconds": median(seconds), "units": median(units), "peak_gb": peak, "all_seconds": seconds}


def _unit(shape: tuple[int, ...]) -> float:
    """Seconds of one grid_sample of a 3-channel field, median of 3."""
    import torch

    field = torch.rand(1, 3, *shape)
    axes = [torch.linspace(-1, 1, size) for size in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flip(-1)[None]
    grid = grid + 0.02 * torch.rand_like(grid)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.nn.functional.grid_sample(field, grid, align_corners=True, padding_mode="border")
        times.append(time.perf_counter() - start)
    return median(times)


def _case(name: str, shape: tuple[int, ...]) -> Callable[[], None]:
    """The computation to be measured."""
    import torch

    from sitreg_lumir.train.final_epochs import GroupConsistency, NdvPenalty, add_term
    from sitreg_lumir.train.module import MindRegistration
    from sitreg_lumir.train.terms import LossTerm
    from sitreg_lumir.train.triplets import View, three_pairs_in_turn

    module = MindRegistration()
    with torch.no_grad():  # updates of a realistic size, not those of an untrained network
        for head in module.network.heads:
            head.final.weight.normal_(std=0.2)
    images = [_brain(shape, seed) for seed in range(3)]
    if name == "forward":

        def forward() -> None:
            with torch.inference_mode():
                module(fixed=images[0], moving=images[1])

        return forward
    views = [View(image, image > 0, module.inputs(image)) for image in images]
    if name == "consistency":
        penalty, consistency = NdvPenalty(0, 8e-5), GroupConsistency(0)
        add_term(module, LossTerm("ndv_sum", "pair", penalty.weight_at, penalty.value))
    module.active_terms = lambda scope: [(t, t.weight(1.0, 0)) for t in module.terms if t.scope == scope]  # type: ignore

    def step() -> None:
        module.zero_grad()
        module.values = {}
        module.pair_step(views[0], views[1])[0].backward()

    def plain_triplet() -> None:
        module.zero_grad()
        for rank in range(3):
            module.values = {}
            (module.pair_step(views[rank], views[(rank + 1) % 3])[0] / 3).backward()

    def consistency_step() -> None:
        module.zero_grad()
        module.values = {}
        found = three_pairs_in_turn(module.pair_step, views)
        cycle = consistency.value(found.disps, found.disps_inv, [view.mask for view in views])
        (found.loss + 40 * cycle).backward()

    return {"step": step, "plain_triplet": plain_triplet, "consistency": consistency_step}[name]


def _brain(shape: tuple[int, ...], seed: int) -> Any:
    """A smooth random image in an ellipsoid, 0 outside; ``(1, 1, X, Y, Z)`` in [0, 1]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, *(size // 8 for size in shape), generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in shape), indexing="ij")
    return image * (sum(axis.square() for axis in axes) < 0.8)


if __name__ == "__main__":
    main()
