"""Time of every operation on deformations and images: the device's backend against the torch backend.

    python benchmarks/kernels.py                # at 80x112x96 on a CPU, at 160x224x192 on a GPU
    python benchmarks/kernels.py --shape 160 224 192

On a GPU also the bandwidth of each operation, counting every number that must be read or written once, as a share of
that of a plain copy measured beside it.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sitreg_lumir.deform.backends import backend_of
from sitreg_lumir.deform.backends.torch import backend as torch_backend
from sitreg_lumir.deform.splines import coefficients_of, steps_of


@dataclass(frozen=True)
class Kernel:
    """One operation.

    Attributes:
        name: as in the table.
        call: of a backend, on tensors that are there.
        numbers: floats that must be read or written, per voxel of full resolution.
    """

    name: str
    call: Callable[[Any], Any]
    numbers: float


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"default here: {default}")
    parser.add_argument("--shape", type=int, nargs=3, help="default: 80 112 96 on a CPU, 160 224 192 on a GPU")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    shape = options.shape or ((80, 112, 96) if options.device == "cpu" else (160, 224, 192))
    measured = measure(torch.device(options.device), tuple(shape), options.repeat)
    print(json.dumps(measured, indent=1) if options.json else table(measured))


def measure(device: torch.device, shape: tuple[int, ...], repeat: int) -> dict[str, Any]:
    """Median milliseconds of each operation in the device's backend and in torch, taken in turns."""
    kernels = all_kernels(device, shape)
    backend = backend_of(torch.zeros(1, device=device))
    voxels = shape[0] * shape[1] * shape[2]
    copied = torch.rand(12 * voxels, device=device)
    target = torch.empty_like(copied)
    copy = seconds(lambda: target.copy_(copied), device, repeat)
    rows = {}
    for kernel in kernels:
        times = {"backend": [], "torch": []}
        for _ in range(repeat):
            for name, module in (("backend", backend), ("torch", torch_backend)):
                times[name].append(seconds(partial(kernel.call, module), device, 1))
        own, plain = median(times["backend"]), median(times["torch"])
        rows[kernel.name] = {
            "milliseconds": 1e3 * own,
            "torch_milliseconds": 1e3 * plain,
            "times_as_fast": plain / own,
            "gigabytes_per_second": 4e-9 * kernel.numbers * voxels / own,
            "share_of_copy": kernel.numbers / own / (24 / copy),
        }
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "shape": list(shape),
        "backend": backend.__name__,
        "copy_gigabytes_per_second": 4e-9 * 24 * voxels / copy,
        "kernels": rows,
    }


def seconds(call: Callable[[], Any], device: torch.device, repeat: int) -> float:
    """Median seconds of one call, after one that warms up."""
    call()
    times = []
    for _ in range(repeat):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def all_kernels(device: torch.device, shape: tuple[int, ...], tolerance: float = 1e-2) -> list[Kernel]:
    """The operations with inputs of realistic size: updates of some voxels, brains with a mask."""
    generator = torch.Generator().manual_seed(0)

    def smooth(channels: int, grid: tuple[int, ...], scale: float) -> Tensor:
        coarse = torch.randn(1, channels, *(max(size // 8, 2) for size in grid), generator=generator)
        return scale * torch.nn.functional.interpolate(coarse, size=grid, mode="trilinear").to(device)

    def last(values: Tensor) -> Tensor:
        return values.contiguous(memory_format=torch.channels_last_3d)

    a, b, c, grad = (smooth(3, shape, 0.8) for _ in range(4))
    inverse = torch_backend.invert(a, tolerance, 50)
    half = tuple(-(-size // 2) for size in shape)
    level = smooth(3, half, 0.3)
    fine, fine_grad = last(smooth(12, shape, 1)), last(smooth(12, shape, 1))
    coarse, coarse_grad = last(smooth(32, half, 1)), last(smooth(32, half, 1))
    image, second_image = smooth(1, shape, 1).abs(), smooth(1, shape, 1).abs()
    mask = image > 0.1
    weights = [[1.0] * 3] * 3
    unit = torch.ones((), device=device)
    spline = [(smooth(3, size, 0.2)[0], smooth(3, size, 0.2)[0]) for size in (half, shape)]
    many = torch.rand(3, max(a[0, 0].numel() // 8, 1), generator=generator, dtype=torch.float64).to(device)
    many = many * torch.tensor(shape, device=device)[:, None]
    moving = (many, steps_of(2, False), coefficients_of(spline, shape))
    return [
        Kernel("upsample, spacing 2", lambda m: m.upsample_control_points(level, 2, shape), 3 + 3 / 8),
        Kernel("upsample, adjoint", lambda m: m.upsample_control_points_adjoint(grad, 2), 3 + 3 / 8),
        Kernel("invert", lambda m: m.invert(a, tolerance, 50), 6),
        Kernel("invert, adjoint", lambda m: m.invert_adjoint(grad, a, inverse), 12),
        Kernel("compose 2", lambda m: m.compose([a, b]), 9),
        Kernel("compose 3", lambda m: m.compose([a, b, c]), 12),
        Kernel("compose 2, adjoint", lambda m: m.compose_adjoint(grad, [a, b], [True] * 2), 15),
        Kernel("compose 3, adjoint", lambda m: m.compose_adjoint(grad, [a, b, c], [True] * 3), 21),
        Kernel("warp image", lambda m: m.warp(image, a, 1), 5),
        Kernel("warp image, adjoint", lambda m: m.warp_adjoint(image, second_image, a, 1, False, True), 8),
        Kernel("warp 12 features", lambda m: m.warp(fine, a, 1), 27),
        Kernel("warp 12 features, adjoint", lambda m: m.warp_adjoint(fine_grad, fine, a, 1, True, True), 42),
        Kernel("warp 32 features, spacing 2", lambda m: m.warp(coarse, a, 2), 11),
        Kernel("the same, adjoint", lambda m: m.warp_adjoint(coarse_grad, coarse, a, 2, True, True), 18),
        Kernel("warp mask", lambda m: m.mask_at(mask, a, True), 3.5),
        Kernel("MIND", lambda m: m.mind(image, 0.5, 2), 7),
        Kernel("LNCC", lambda m: m.lncc_and_gradients(image, second_image, mask, 11, False, False), 2.25),
        Kernel("LNCC with gradient", lambda m: m.lncc_and_gradients(image, second_image, mask, 11, True, False), 3.25),
        Kernel("folding", lambda m: m.ndv_sum_and_gradient(a, False), 3),
        Kernel("folding with gradient", lambda m: m.ndv_sum_and_gradient(a, True), 6),
        Kernel("diffusion", lambda m: m.diffusion(a, weights), 3),
        Kernel("move an eighth as many points", lambda m: m.move_points(*moving, False, tolerance, 200)[0], 1.5),
        Kernel("the same, with derivatives", lambda m: m.move_points(*moving, True, tolerance, 200)[:2], 3.75),
        Kernel("diffusion, adjoint", lambda m: m.diffusion_adjoint(unit, a, weights), 6),
    ]


def table(measured: dict[str, Any]) -> str:
    """The numbers as text."""
    shape = "x".join(map(str, measured["shape"]))
    lines = [
        f"{measured['device']}, {measured['threads']} CPU threads, {shape}, float32; "
        f"a copy moves {measured['copy_gigabytes_per_second']:.0f} GB/s",
        f"{'operation':28} {'ms':>9} {'torch, ms':>10} {'ratio':>7} {'GB/s':>7} {'of copy':>8}",
    ]
    for name, row in measured["kernels"].items():
        lines.append(
            f"{name:28} {row['milliseconds']:9.2f} {row['torch_milliseconds']:10.2f} {row['times_as_fast']:7.1f} "
            f"{row['gigabytes_per_second']:7.1f} {row['share_of_copy']:8.0%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
