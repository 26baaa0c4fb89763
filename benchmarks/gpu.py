"""Everything that only a GPU can show, in one call: correctness first, then timings; about 8 minutes at most.

    python benchmarks/gpu.py --out results

1. Each operation and its adjoint of the GPU backend against the torch backend on the CPU, on small odd shapes.
2. The kernels' times and bandwidths at 160x224x192, against a plain copy and against the torch backend.
3. Agreement of whole forward passes between backends, and of bfloat16 with float32.
4. The cases of ``benchmark.py``: forward passes, ensembles, training and consistency steps, in seconds and peak memory.
5. Training pairs per second in bfloat16-mixed precision.

Writes ``gpu.json`` and prints tables. What fails in 1 ends it with exit code 1.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from agreement import compare
from benchmark import CASES, GPU_CASES, conditions
from kernels import all_kernels, measure, table

from sitreg_lumir.deform.backends import backend_of
from sitreg_lumir.deform.backends.torch import backend as torch_backend

SMALL_SHAPES = ((7, 9, 11), (12, 10, 17), (33, 21, 40))
TOLERANCE = 2e-3  # relative to the largest number: sums of float32 in another order


def main() -> None:
    """Runs all parts within the time given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=460, help="no case is begun after this (default: 460)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here; on a CPU use benchmarks/benchmark.py and benchmarks/kernels.py")
    options.out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Any] = {"conditions": conditions("cuda")}
    started = time.perf_counter()

    def keep(name: str, value: Any) -> None:
        measured[name] = value
        (options.out / "gpu.json").write_text(json.dumps(measured, indent=1) + "\n")

    keep("correctness", correctness())
    wrong = [name for name, error in measured["correctness"].items() if not error <= TOLERANCE]
    print(
        f"correctness: {len(measured['correctness'])} comparisons, {len(wrong)} beyond {TOLERANCE:g}: {wrong}",
        flush=True,
    )
    if wrong:
        sys.exit(1)
    keep("kernels", measure(torch.device("cuda"), (160, 224, 192), 10))
    print(table(measured["kernels"]), flush=True)
    keep("agreement", compare(None, None, "cuda", True))
    print(json.dumps(measured["agreement"]), flush=True)
    torch.cuda.empty_cache()
    keep("cases", {})
    for case in [*GPU_CASES, *CASES]:
        if time.perf_counter() - started > options.seconds:
            print(f"{case}: left out, the time is up")
            continue
        command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), case, "--one", "--device", "cuda"]
        done = subprocess.run([*command, "--repeat", "5"], stdout=subprocess.PIPE, text=True, check=False)
        result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
        keep("cases", {**measured["cases"], case: result})
        print(f"{case:24} {result}", flush=True)
    steps = measured["cases"].get("step_1mm_bf16", {})
    if "seconds" in steps:
        keep("pairs_per_second", 1 / steps["seconds"])
    print(f"written: {options.out / 'gpu.json'}, {time.perf_counter() - started:.0f} s")


def correctness() -> dict[str, float]:
    """Largest difference of each operation from the torch backend on the CPU, relative to the largest number there."""
    errors = {}
    backend = backend_of(torch.zeros(1, device="cuda"))
    for shape in SMALL_SHAPES:
        on_gpu, on_cpu = (all_kernels(torch.device(device), shape, 1e-4) for device in ("cuda", "cpu"))
        for own, expected in zip(on_gpu, on_cpu, strict=True):
            name = f"{own.name} {'x'.join(map(str, shape))}"
            errors[name] = largest_difference(own.call(backend), expected.call(torch_backend))
    return errors


def largest_difference(actual: Any, expected: Any) -> float:
    """Of tensors or nested tuples of them, relative; of masks the share that differs."""
    if actual is None and expected is None:
        return 0.0
    if isinstance(expected, list | tuple):
        return max(largest_difference(first, second) for first, second in zip(actual, expected, strict=True))
    if expected.dtype == torch.bool:
        return float((actual.cpu() != expected).double().mean())
    return float((actual.cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


if __name__ == "__main__":
    main()
