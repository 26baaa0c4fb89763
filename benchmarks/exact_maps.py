"""What exact maps give over sampled fields: Dice, inverse error, folding, time; on validation pairs at 2 mm.

    python benchmarks/exact_maps.py MINILUMIR/2mm                 # all pairs, table and JSON
    python benchmarks/exact_maps.py MINILUMIR/2mm --refine 40 --pairs 4
    python benchmarks/exact_maps.py MINILUMIR/2mm --fine 0.5 --pairs 1
    python benchmarks/exact_maps.py REALBRAINS/2mm

*Sampled* are the fields as the network composes them on its grid, *exact* those of the same control points evaluated as
continuous functions and then sampled once. Labels are moved by nearest neighbours. NDV is the challenge's, of samples
on the model's grid and, *fine*, of samples 1 mm apart, where the sampled field is interpolated; *own* is the volume
that the map folds by its own derivative. Inverse errors are distances of random points of the fixed brain to where both
maps in turn bring them. Times are of one 1 mm grid of 160x224x192 with a brain of LUMIR's size, and of a million random
points of it, by as many threads as torch uses.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from sitreg_lumir.data.images import Pair
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.deform.ops import warp_labels
from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.geometry.spline_map import Mask, SplineMap
from sitreg_lumir.geometry.transforms import (
    AlignedMap,
    CompositeTransform,
    Matrix,
    composite_field,
    map_points,
    swap,
)
from sitreg_lumir.io.read import read_volume
from sitreg_lumir.metrics import dsc, ndv
from sitreg_lumir.registration.model import Model, as_tensor, load_model
from sitreg_lumir.registration.optimised_fields import SampledFields
from sitreg_lumir.registration.pair import ModelPair
from sitreg_lumir.registration.quality import folded_percent
from sitreg_lumir.registration.register import optimise_pair

DATASETS = ("LUMIR_dataset.json", "LUMIR_dataset_multimodal.json")
POINTS = 20_000
TOLERANCE = 1e-2  # voxels, of the inversions of the network's own fields


def main() -> None:
    """Measures all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DATA", help="folder of a data set at 2 mm in LUMIR's layout")
    parser.add_argument("--members", nargs="+", type=Path, metavar="PATH", help="default: the shipped ones")
    parser.add_argument(
        "--refine", type=int, default=0, metavar="N", help="steps of instance optimisation (default: 0)"
    )
    parser.add_argument("--pairs", type=int, metavar="N", help="only the first N of each list")
    parser.add_argument("--fine", type=float, default=1.0, metavar="MM", help="of the finer grid (default: 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "exact_maps.json")
    options = parser.parse_args()
    model = load_model(options.members, device="cpu")
    files = [options.root / name for name in DATASETS if (options.root / name).is_file()]
    lists = [read_dataset(file, validation=True) for file in files]
    pairs = [(pair, chosen.evaluation_labels) for chosen in lists for pair in chosen.validation[: options.pairs]]
    rows = []
    for pair, scored in pairs:
        measured = measure(model, pair, scored, options.refine, options.fine)
        rows.append({"pair": pair.long_name, "group": pair.contrasts, **measured})
        print(pair.long_name, json.dumps(measured), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"refine": options.refine, "fine": options.fine, "threads": torch.get_num_threads()}
    options.out.write_text(json.dumps({**settings, "rows": rows}, indent=1))
    for group in sorted({row["group"] for row in rows}):
        for way in ("sampled", "exact"):
            chosen = [row[way] for row in rows if row["group"] == group]
            dice, folded, fine = (mean(row[score] for row in chosen) for score in ("dice", "ndv", "ndv_fine"))
            median, p99, largest = (max(row[score] for row in chosen) for score in ("median", "p99", "largest"))
            apart = f"inverse error mm, worst pair: median {median:.1e}, p99 {p99:.1e}, largest {largest:.1e}"
            print(f"{group} {way:8} Dice {dice:.4f}  NDV {folded:.5f} %, fine {fine:.5f} %  {apart}")
        own = [row["exact"][score] for row in rows if row["group"] == group for score in ("own", "own_inverse")]
        print(f"{group} folded by the map itself: at most {max(own):.5f} %")
    for name in ("grid_seconds", "million_points_seconds"):
        print(f"{name}: mean {mean(row[name] for row in rows):.2f}, most {max(row[name] for row in rows):.2f}")
    print(
        f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == 'darwin' else 1e6):.2f} GB"
    )


def measure(model: Model, pair: Pair, scored: Sequence[int] | None, refine: int, spacing: float) -> dict[str, Any]:
    """Scores of one pair both ways, and the exact map's times."""
    fixed, moving = (read_volume(scan.path)[0] for scan in (pair.fixed, pair.moving))
    labels = [read_volume(scan.labels)[0].astype(np.int32) for scan in (pair.fixed, pair.moving) if scan.labels]
    scored = scored or np.unique(np.concatenate([volume.ravel() for volume in labels])).tolist()
    images = [as_tensor(volume) for volume in (fixed, moving)]
    brains = [image > 0 for image in images]
    both = ModelPair(images[0], brains[0], images[1], brains[1])
    (stage,) = model.run(fixed=images[0], moving=images[1])
    points, disp, disp_inv = list(stage.updates), stage.disp, stage.disp_inv
    if refine:
        optimised = optimise_pair(model, both, points, refine, "lncc")
        points = list(optimised.control_points)
        with torch.no_grad():
            disp, disp_inv = SampledFields(points, 0, model.shape, TOLERANCE)(points)
    matrices = np.eye(4), np.eye(4), model.affine
    sampled = CompositeTransform(*matrices, disp[0].float().numpy())
    updates = SplineUpdates.rounded(points, model.shape)
    exact = SplineMap(*matrices, updates, brains[0][0, 0].numpy(), brains[1][0, 0].numpy())
    maps = {"sampled": (sampled, swap(sampled, disp_inv[0].float().numpy())), "exact": (exact, exact.inverse)}
    where = np.argwhere(exact.brain) + np.random.default_rng(0).uniform(-0.5, 0.5, (int(exact.brain.sum()), 3))
    where = np.random.default_rng(1).permutation(where)[:POINTS] @ model.affine[:3, :3].T + model.affine[:3, 3]
    times = round(model.spacing / spacing)
    fine = model.affine @ np.diag([1 / times, 1 / times, 1 / times, 1.0])
    fine[:3, 3] = model.affine[:3, 3] - (model.affine[:3, :3] - fine[:3, :3]).sum(axis=1) / 2
    row: dict[str, Any] = {}
    for way, (forward, backward) in maps.items():
        field = forward.disp
        warped = warp_labels(torch.from_numpy(labels[1])[None, None], torch.from_numpy(field)[None])[0, 0].numpy()
        apart = np.linalg.norm(map_points(backward, map_points(forward, where)) - where, axis=1)
        row[way] = {
            "dice": float(np.nanmean(dsc(labels[0], labels[1], warped, scored))),
            "ndv": ndv(field, exact.brain),
            "ndv_fine": folded_on(forward, fine, exact.brain, times),
            "median": float(np.median(apart)),
            "p99": float(np.percentile(apart, 99)),
            "largest": float(apart.max()),
        }
    row["exact"]["own"], row["exact"]["own_inverse"] = (
        folded_percent(way, way.brain) for way in (exact, exact.inverse)
    )
    unused = replace(exact)  # nothing of it is computed yet
    start = time.perf_counter()
    composite_field(unused.on_grids, [times * size for size in model.shape], fine)
    row["grid_seconds"] = time.perf_counter() - start
    many = np.random.default_rng(2).choice(where, 1_000_000)
    start = time.perf_counter()
    map_points(exact, many)
    row["million_points_seconds"] = time.perf_counter() - start
    return row


def folded_on(transform: AlignedMap, affine: Matrix, brain: Mask, times: int) -> float:
    """NDV, percent, of a map's samples on a grid ``times`` finer than the model's; ``brain`` is on the model's."""
    grid_map = transform.on_grids if isinstance(transform, SplineMap) else transform
    field = composite_field(grid_map, [times * size for size in transform.grid_shape], affine)
    field = np.einsum("ij,j...->i...", np.linalg.inv(affine[:3, :3]), field).astype(np.float32)  # voxels
    return ndv(field, np.kron(brain, np.ones((times,) * 3, np.bool_)))


if __name__ == "__main__":
    main()
