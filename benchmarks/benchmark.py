"""Time and peak memory of the main computations, each in a process of its own.

    python benchmarks/benchmark.py                       # all cases, table and benchmarks/results/benchmark.json
    python benchmarks/benchmark.py forward_1mm step_2mm  # some
    python benchmarks/benchmark.py --backend torch --repeat 1 forward_2mm

A *unit* is one ``grid_sample`` of a 3-channel field at 160x224x192, measured before and after each case in a process of
its own; ratios to it carry over between machines better than seconds. Peak memory is that of the case's process,
libraries included, on a GPU what PyTorch allocated there.
"""

import argparse
import json
import math
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
CASES = {
    "forward_1mm": "one pair, full network on MIND, fields both ways, 160x224x192",
    "forward_1mm_bf16": "the same, convolutions in bfloat16",
    "one_way_1mm": "one pair, the field on the fixed grid alone",
    "ensemble_1mm": "five members, fields both ways, 160x224x192",
    "ensemble_1mm_bf16": "the same, convolutions in bfloat16",
    "forward_2mm": "one pair, 80x112x96",
    "step_2mm": "training step of one pair with deep supervision, 80x112x96",
    "step_2mm_recompute": "the same with recompute: true, for memory",
    "step_2mm_bf16": "the same with convolutions in bfloat16",
    "consistency_2mm": "triplet step with NDV and group consistency on one device, 80x112x96",
    "plain_triplet_2mm": "three plain training steps one after the other, 80x112x96",
}
GPU_CASES = {
    "step_1mm_bf16": "training step of one pair with deep supervision, 160x224x192, convolutions in bfloat16",
    "consistency_1mm_bf16": "triplet step with NDV and group consistency, 160x224x192, convolutions in bfloat16",
}


def main() -> None:
    """Runs the named cases and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = CASES | GPU_CASES
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(known)} (default: all of the device)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements after one that warms up (default: 3)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--backend", default="auto", help="auto, torch, cpu or cuda (default: auto)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "benchmark.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = sorted(set(options.cases) - set(known))
    if unknown:
        parser.error(f"unknown case {unknown[0]}; choose from {', '.join(known)}")
    if options.one:
        case = options.cases[0] if options.cases else None
        print(json.dumps(measure(case, options.repeat, options.threads, options.device)))
        return
    common = ["--one", "--repeat", str(options.repeat), "--device", options.device]
    common += ["--threads", str(options.threads)] if options.threads else []
    environment = {**os.environ, "SITREG_LUMIR_BACKEND": options.backend}

    def alone(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, __file__, *arguments, *common]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])

    results = {}
    unit = alone()["seconds"]
    print(f"{'case':22} {'seconds':>8} {'units':>7} {'peak GB':>8}  (median of {options.repeat})")
    for case in options.cases or (known if options.device == "cuda" else CASES):
        results[case] = result = alone(case)
        unit_before, unit = unit, alone()["seconds"]
        result["unit_seconds"] = [unit_before, unit]
        result["units"] = 2 * result["seconds"] / (unit_before + unit)
        numbers = f"{result['seconds']:8.2f} {result['units']:7.1f} {result['peak_gb']:8.2f}"
        print(f"{case:22} {numbers}  {known[case]}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"conditions": conditions(options.device), "results": results}, indent=1) + "\n")
    print(f"written: {options.out}")


def conditions(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def measure(case: str | None, repeat: int, threads: int | None, device: str) -> dict[str, Any]:
    """Median seconds and peak memory of one case, or of the unit, in this process."""
    import torch

    from sitreg_lumir.train import settings

    settings.prepare_process()
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    parts = (case or "unit_1mm").split("_")
    kind = "_".join(part for part in parts if part not in (*SHAPES, "bf16", "recompute"))
    shape = SHAPES[next(part for part in parts if part in SHAPES)]
    if kind == "unit":
        compute, repeat = _unit(shape, device), 7
    else:
        if "recompute" in parts:
            settings.give_back_freed_memory()
        elif kind in ("forward", "ensemble", "one_way"):
            settings.keep_freed_memory_of_small_grids(math.prod(shape))
        else:
            settings.keep_freed_memory()
        compute = _case(kind, shape, torch.device(device), "recompute" in parts)
    precision = torch.autocast(device, torch.bfloat16, enabled="bf16" in parts)

    def run() -> float:
        start = time.perf_counter()
        with precision:
            compute()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run()  # compiles and fills the allocator
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [run() for _ in range(repeat)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    return {"seconds": median(seconds), "peak_gb": peak, "all_seconds": seconds}


def _unit(shape: tuple[int, ...], device: str) -> Callable[[], Any]:
    """One grid_sample of a 3-channel field."""
    import torch

    field = torch.rand(1, 3, *shape, device=device)
    axes = [torch.linspace(-1, 1, size, device=device) for size in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flip(-1)[None]
    grid = grid + 0.02 * torch.rand_like(grid)
    return lambda: torch.nn.functional.grid_sample(field, grid, align_corners=True, padding_mode="border")


def _case(kind: str, shape: tuple[int, ...], device: Any, recompute: bool) -> Callable[[], None]:
    """The computation to be measured."""
    import torch

    from sitreg_lumir.network.ensemble import Ensemble
    from sitreg_lumir.train.final_epochs import GroupConsistency, NdvPenalty, add_term
    from sitreg_lumir.train.terms import LossTerm
    from sitreg_lumir.train.triplets import View, three_pairs_in_turn

    modules = [random_module(recompute).to(device) for _ in range(5 if kind == "ensemble" else 1)]
    images = [brain(shape, seed).to(device) for seed in range(3)]
    module = modules[0]
    if kind in ("forward", "ensemble", "one_way"):
        ensemble = Ensemble([member.network for member in modules], module.input_transform)

        def forward() -> None:
            with torch.inference_mode():
                ensemble.run(fixed=images[0], moving=images[1], inverse=kind != "one_way")

        return forward
    views = [View(image, image > 0, module.inputs(image)) for image in images]
    if kind == "consistency":
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
        step = three_pairs_in_turn(module.pair_step, views)
        cycle = consistency.value(step.disps, step.disps_inv, [view.mask for view in views])
        (step.loss + 40 * cycle).backward()

    return {"step": step, "plain_triplet": plain_triplet, "consistency": consistency_step}[kind]


def random_module(recompute: bool = False) -> Any:
    """The full network on MIND with random weights and updates of a realistic size."""
    import torch

    from sitreg_lumir.train.module import MindRegistration

    module = MindRegistration(recompute=recompute)
    with torch.no_grad():
        for head in module.network.heads:
            head.final.weight.normal_(std=0.2)
    return module


def brain(shape: tuple[int, ...], seed: int) -> Any:
    """A smooth random image in an ellipsoid, 0 outside; ``(1, 1, X, Y, Z)`` in [0, 1]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, *(size // 8 for size in shape), generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in shape), indexing="ij")
    return image * (sum(axis.square() for axis in axes) < 0.8)


if __name__ == "__main__":
    main()
