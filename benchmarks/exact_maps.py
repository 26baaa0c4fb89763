"""What exact maps give over sampled fields: Dice, inverse error, folding, time; on validation pairs at 2 mm.

    python benchmarks/exact_maps.py MINILUMIR/2mm                 # all pairs, table and JSON
    python benchmarks/exact_maps.py MINILUMIR/2mm --refine 40 --pairs 4
    python benchmarks/exact_maps.py REALBRAINS/2mm

*Sampled* are the fields as the network composes them on its grid, *exact* those of the same control points evaluated as
continuous functions and then sampled once. Labels are moved by nearest neighbours. Inverse errors are distances of
random points of the fixed brain to where both maps in turn bring them. Times are of one 1 mm grid of 160x224x192 with a
brain of LUMIR's size, and of a million random points of it, by as many threads as torch uses.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from sitreg_lumir.data.lumir import Pair, read_dataset
from sitreg_lumir.deform.ops import warp_labels
from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import CompositeTransform, composite_field, map_points, swap
from sitreg_lumir.io.read import read_volume
from sitreg_lumir.metrics import dsc, ndv
from sitreg_lumir.registration.model import Model, as_tensor, load_model
from sitreg_lumir.registration.optimise import control_points_of
from sitreg_lumir.registration.pair import ModelPair
from sitreg_lumir.registration.register import optimise_pair

DATASETS = ("LUMIR_dataset.json", "LUMIR_dataset_multimodal.json")
POINTS = 20_000


def main() -> None:
    """Measures all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DATA", help="folder of a data set at 2 mm in LUMIR's layout")
    parser.add_argument("--members", nargs="+", type=Path, metavar="PATH", help="default: the shipped ones")
    parser.add_argument(
        "--refine", type=int, default=0, metavar="N", help="steps of instance optimisation (default: 0)"
    )
    parser.add_argument("--pairs", type=int, metavar="N", help="only the first N of each list")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "exact_maps.json")
    options = parser.parse_args()
    model = load_model(options.members, device="cpu")
    files = [options.root / name for name in DATASETS if (options.root / name).is_file()]
    lists = [read_dataset(file, validation=True) for file in files]
    pairs = [(pair, chosen.evaluation_labels) for chosen in lists for pair in chosen.validation[: options.pairs]]
    rows = []
    for pair, scored in pairs:
        rows.append({"pair": pair.long_name, "group": pair.contrasts, **measure(model, pair, scored, options.refine)})
        print(rows[-1]["pair"], json.dumps({way: rows[-1][way] for way in ("sampled", "exact")}), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"refine": options.refine, "threads": torch.get_num_threads(), "rows": rows}, indent=1)
    )
    for group in sorted({row["group"] for row in rows}):
        for way in ("sampled", "exact"):
            chosen = [row[way] for row in rows if row["group"] == group]
            dice, folded = (mean(row[score] for row in chosen) for score in ("dice", "ndv"))
            median, p99, largest = (max(row[score] for row in chosen) for score in ("median", "p99", "largest"))
            apart = f"inverse error mm, worst pair: median {median:.1e}, p99 {p99:.1e}, largest {largest:.1e}"
            print(f"{group} {way:8} Dice {dice:.4f}  NDV {folded:.5f} %  {apart}")
    for name in ("grid_seconds", "million_points_seconds"):
        print(f"{name}: mean {mean(row[name] for row in rows):.2f}, most {max(row[name] for row in rows):.2f}")
    print(
        f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == 'darwin' else 1e6):.2f} GB"
    )


def measure(model: Model, pair: Pair, scored: Sequence[int] | None, refine: int) -> dict[str, Any]:
    """Scores of one pair both ways, and the exact map's times."""
    fixed, moving = (read_volume(scan.path)[0] for scan in (pair.fixed, pair.moving))
    labels = [read_volume(scan.labels)[0].astype(np.int32) for scan in (pair.fixed, pair.moving) if scan.labels]
    scored = scored or np.unique(np.concatenate([volume.ravel() for volume in labels])).tolist()
    images = [as_tensor(volume) for volume in (fixed, moving)]
    brains = [image > 0 for image in images]
    both = ModelPair(images[0], brains[0], images[1], brains[1])
    stages = model.run(fixed=images[0], moving=images[1], levels=range(model.networks[0].levels))
    points, disp, disp_inv = control_points_of(stages, model.networks[0].levels), stages[-1].disp, stages[-1].disp_inv
    if refine:
        optimised = optimise_pair(model, both, stages, refine, "lncc")
        points, disp, disp_inv = list(optimised.control_points), optimised.disp, optimised.disp_inv
    matrices = np.eye(4), np.eye(4), model.affine
    sampled = CompositeTransform(*matrices, disp[0].float().numpy())
    updates = SplineUpdates.rounded(points, model.shape)
    exact = SplineMap(*matrices, updates, brains[0][0, 0].numpy(), brains[1][0, 0].numpy())
    maps = {"sampled": (sampled, swap(sampled, disp_inv[0].float().numpy())), "exact": (exact, exact.inverse)}
    where = np.argwhere(exact.brain) + np.random.default_rng(0).uniform(-0.5, 0.5, (int(exact.brain.sum()), 3))
    where = np.random.default_rng(1).permutation(where)[:POINTS] @ model.affine[:3, :3].T + model.affine[:3, 3]
    row: dict[str, Any] = {}
    for way, (forward, backward) in maps.items():
        field = forward.disp
        warped = warp_labels(torch.from_numpy(labels[1])[None, None], torch.from_numpy(field)[None])[0, 0].numpy()
        apart = np.linalg.norm(map_points(backward, map_points(forward, where)) - where, axis=1)
        row[way] = {
            "dice": float(np.nanmean(dsc(labels[0], labels[1], warped, scored))),
            "ndv": ndv(field, exact.brain),
            "median": float(np.median(apart)),
            "p99": float(np.percentile(apart, 99)),
            "largest": float(apart.max()),
        }
    fine = model.affine.copy()
    fine[:3, :3] /= 2
    fine[:3, 3] -= fine[:3, :3].sum(axis=1) / 2
    start = time.perf_counter()
    field = composite_field(exact.on_grids, [2 * size for size in model.shape], fine)
    row["grid_seconds"] = time.perf_counter() - start
    many = np.random.default_rng(2).choice(where, 1_000_000)
    start = time.perf_counter()
    map_points(exact, many)
    row["million_points_seconds"] = time.perf_counter() - start
    return row


if __name__ == "__main__":
    main()
