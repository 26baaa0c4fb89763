"""What vectors gain on a CPU: each operation of them beside the plain loops that take over where numba has changed.

python benchmarks/vectors.py                        # at 80x112x96, on all cores
python benchmarks/vectors.py --shape 160 224 192 --threads 1
"""

import argparse
import os
import platform
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from kernels import seconds
from torch import Tensor

from sitreg_lumir.deform.backends.cpu import stepwise, vectorised
from sitreg_lumir.deform.backends.torch import backend as torch_backend


def main() -> None:
    """Prints a table of milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(80, 112, 96))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = "x".join(map(str, options.shape))
    print(f"{platform.machine()}, {options.threads} CPU threads, {shape}, float32\n")
    print("| operation | vectors, ms | plain loops, ms | times as fast |\n|---|---|---|---|")
    for name, call in operations(tuple(options.shape)).items():
        vectors, plain = in_turns(call, options.repeat)
        print(f"| {name} | {1e3 * vectors:.1f} | {1e3 * plain:.1f} | {plain / vectors:.1f} |", flush=True)


def in_turns(call: Callable[[Any], Any], repeat: int) -> tuple[float, float]:
    """Median seconds by vectors and by plain loops, taken in turns."""
    times: dict[Any, list[float]] = {vectorised: [], stepwise: []}
    for _ in range(repeat):
        for module, measured in times.items():
            measured.append(seconds(partial(call, module), torch.device("cpu"), 1))
    return median(times[vectorised]), median(times[stepwise])


def operations(shape: tuple[int, ...]) -> dict[str, Callable[[Any], Any]]:
    """The operations that have both, on smooth fields of some voxels."""
    generator = torch.Generator().manual_seed(0)

    def smooth(channels: int, grid: tuple[int, ...], scale: float) -> Tensor:
        coarse = torch.randn(1, channels, *(max(size // 8, 2) for size in grid), generator=generator)
        return scale * torch.nn.functional.interpolate(coarse, size=grid, mode="trilinear")

    a, b, c, grad = (smooth(3, shape, 0.8) for _ in range(4))
    inverse = torch_backend.invert(a, 1e-2, 50)
    points = smooth(3, tuple(-(-size // 2) for size in shape), 0.3)
    features, feature_grad = (smooth(12, shape, 1).contiguous(memory_format=torch.channels_last_3d) for _ in range(2))
    weight = torch.zeros(12, 12, 3, 3, 3)
    return {
        "upsample, spacing 2": lambda module: module.upsample_control_points(points, 2, shape),
        "invert": lambda module: module.invert(a, 1e-2, 50),
        "invert, adjoint": lambda module: module.invert_adjoint(grad, a, inverse),
        "compose 2 fields": lambda module: module.compose([a, b]),
        "compose 3 fields": lambda module: module.compose([a, b, c]),
        "compose 3 fields, adjoint": lambda module: module.compose_adjoint(grad, [a, b, c], [True] * 3),
        "convolution, gradient of the weight": lambda module: module.weight_gradient(
            features, feature_grad, weight, 1, 1
        ),
    }


if __name__ == "__main__":
    main()
