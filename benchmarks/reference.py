"""Time, memory and fields of one forward pass, against the same network on the reference implementation's libraries.

    pip install composable-mapping==0.1.4 deformation-inversion-layer==1.1.2
    python benchmarks/reference.py                # 160x224x192: some five minutes
    python benchmarks/reference.py --size 2mm

The reference (github.com/honkamj/SITReg) computes maps with these two libraries, and convolutions and group
normalisation with PyTorch on contiguous features. The same is done here with this package's weights: the full network,
random, on MIND features of two random images, without gradients. Its MIND is left out of its time, ours counts.
Each library runs in processes of its own, one after the other; medians of the runs after one that warms up.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from benchmark import SHAPES, brain, random_module

from sitreg_lumir.network.sitreg import run_stages
from sitreg_lumir.train import settings

TOLERANCE, MOST_ITERATIONS, MEMORY = 1e-2, 50, 4  # voxels; of the reference's inversions and their acceleration


def main() -> None:
    """Measures both libraries, and compares their fields."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1mm", help="1mm: 160x224x192; 2mm: 80x112x96 (default: 1mm)")
    parser.add_argument("--repeat", type=int, default=2, help="measured runs of each library (default: 2)")
    parser.add_argument("--library", choices=("ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--fields", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library:
        print(json.dumps(measure(options.library, SHAPES[options.size], options.repeat, options.fields)))
        return
    missing = [name for name in ("composable_mapping", "deformation_inversion_layer") if find_spec(name) is None]
    if missing:
        sys.exit(f"{missing[0]} is missing: pip install composable-mapping==0.1.4 deformation-inversion-layer==1.1.2")
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    results, fields = {}, {}
    for way in ("ours", "reference"):
        file = folder / f"fields_{way}.pt"
        command = [sys.executable, __file__, "--size", options.size, "--repeat", str(options.repeat), "--library", way]
        done = subprocess.run([*command, "--fields", str(file)], stdout=subprocess.PIPE, check=True)
        results[way], fields[way] = json.loads(done.stdout), torch.load(file, weights_only=True)
        file.unlink()
        print(f"{way:10} {results[way]['seconds']:7.2f} s  {results[way]['peak_gb']:5.2f} GB", flush=True)
    print(f"ratio      {results['reference']['seconds'] / results['ours']['seconds']:7.1f}")
    for name, ours, reference in zip(("disp", "disp_inv"), fields["ours"], fields["reference"], strict=True):
        length = ours.norm(dim=1).mean()
        difference = (ours - reference).norm(dim=1)
        print(
            f"{name:10} length {length:.2f}, difference mean {difference.mean():.1e}, most {difference.max():.1e} voxel"
        )


def measure(way: str, shape: tuple[int, ...], repeat: int, file: Path) -> dict[str, float]:
    """Median seconds and peak memory of one library in this process; writes its fields."""
    settings.prepare_process()
    torch.manual_seed(0)
    module = random_module()
    fixed, moving = (brain(shape, seed) for seed in range(2))
    seconds = []
    with torch.inference_mode():
        compute = _ours(module, fixed, moving) if way == "ours" else _reference(module, fixed, moving)
        for _ in range(repeat + 1):
            start = time.perf_counter()
            fields = compute()
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    torch.save([field.contiguous() for field in fields], file)
    return {"seconds": median(seconds[1:]), "peak_gb": peak}


def _ours(module: Any, fixed: Tensor, moving: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    settings.keep_freed_memory_of_small_grids(math.prod(fixed.shape[2:]))

    def compute() -> tuple[Tensor, Tensor]:
        stage = run_stages([module.network], fixed=module.inputs(fixed), moving=module.inputs(moving))[-1]
        return stage.disp, stage.disp_inv

    return compute


def _reference(module: Any, fixed: Tensor, moving: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    maps: Any = import_module("composable_mapping")
    solvers: Any = import_module("deformation_inversion_layer.fixed_point_iteration")
    inputs = [module.inputs(image).contiguous() for image in (moving, fixed)]
    network, shape = module.network, tuple(fixed.shape[2:])
    image = maps.CoordinateSystem.centered_normalized(spatial_shape=shape, voxel_size=(1, 1, 1))
    start, levels = maps.Start(), range(network.levels)
    sizes = [[math.ceil(size / 2**level) for size in shape] for level in levels]
    grids = [
        image.reformat(downsampling_factor=[2.0**level] * 3, spatial_shape=size, reference=start)
        for level, size in zip(levels, sizes, strict=True)
    ]
    full = image.reformat(downsampling_factor=[1.0] * 3, spatial_shape=maps.OriginalFOV(fitting_method="ceil"))
    stop = solvers.MaxElementWiseAbsStopCriterion(min_iterations=2, max_iterations=MOST_ITERATIONS, threshold=TOLERANCE)
    solver = solvers.AndersonSolver(stop, solvers.AndersonSolverArguments(memory_length=MEMORY))
    linear = maps.LinearInterpolator(extrapolation_mode="border", mask_extrapolated_regions=False)
    spline = maps.CubicSplineSampler(prefilter=False, extrapolation_mode="border", mask_extrapolated_regions=False)
    voxels = maps.DataFormat.voxel_displacements()

    def update(level: int, first: Tensor, second: Tensor) -> Any:
        head = network.heads[level]
        points = _convolve(_block(head.block, torch.cat([first - second, first + second], dim=1)), head.final)
        points = head.bound * torch.tanh(points)
        sampled = maps.samplable_volume(points, coordinate_system=grids[level], data_format=voxels, sampler=spline)
        return sampled.resample_to(full)

    def inverse(update: Any) -> Any:
        solvers_of_both = {"forward_solver": solver, "backward_solver": solver}
        return update.invert(fixed_point_inversion_arguments=solvers_of_both).resample()

    def warp(features: Tensor, level: int, through: Any) -> Tensor:
        warped = maps.samplable_volume(data=features, coordinate_system=grids[level]) @ through
        values: Tensor = warped.sample().generate_values()
        return values

    def compute() -> tuple[Tensor, Tensor]:
        with maps.default_sampler(linear):
            pyramid = _encode(network.encoder, torch.cat(inputs))
            left, right, left_inv, right_inv = (maps.Identity().assign_coordinates(full) for _ in range(4))
            for level in reversed(levels):
                first, second = pyramid.pop().chunk(2)
                first, second = warp(first, level, left), warp(second, level, right)
                a, b = update(level, first, second), update(level, second, first)
                forward, back = a @ inverse(b), b @ inverse(a)
                left, right = (left @ forward).resample(), (right @ back).resample()
                left_inv, right_inv = (back @ left_inv).resample(), (forward @ right_inv).resample()
            both = (left @ right_inv).resample(), (right @ left_inv).resample()
            disp, disp_inv = (field.sample(data_format=voxels).generate_values() for field in both)
            return disp, disp_inv

    return compute


def _encode(encoder: Any, images: Tensor) -> list[Tensor]:
    """Features of all levels, contiguous, in plain PyTorch."""
    skip = _convolve(images, encoder.projection)
    pyramid = [_block(encoder.blocks[0], skip)]
    for downsampling, block in zip(encoder.downsamplings, encoder.blocks[1:], strict=True):
        pads = [pad for size in reversed(skip.shape[2:]) for pad in (0, size % 2)]
        main = _convolve(F.pad(pyramid[-1], pads), downsampling.convolution, stride=2)
        skip = main + _convolve(F.avg_pool3d(F.pad(skip, pads), 2), downsampling.projection)
        pyramid.append(_block(block, skip))
    return pyramid


def _block(block: Any, features: Tensor) -> Tensor:
    for convolution, norm in zip(block.convolutions, block.normalizers, strict=True):
        features = _convolve(features, convolution, padding=1)
        features = F.relu(F.group_norm(features, norm.num_groups, norm.weight, norm.bias, norm.eps))
    return features


def _convolve(features: Tensor, convolution: Any, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv3d(features, convolution.weight, convolution.bias, stride, padding)


if __name__ == "__main__":
    main()
