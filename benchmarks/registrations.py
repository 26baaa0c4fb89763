"""What `register` delivers on whole scans: inverse error, folding, verdict and Dice, plain and refined.

    python benchmarks/registrations.py MINILUMIR/1mm                  # first pairs of both lists, plain and --refine 40
    python benchmarks/registrations.py MINILUMIR/1mm --pairs 2 --refine 0 40

Inverse errors are distances of random points of the fixed brain to where both maps in turn bring them. NDV is that of
the map's own samples on the fixed scan's grid, in its brain. *Sampled* Dice is that of the same control points composed
on the model's grid, as the network does, and interpolated. Rows that are there are kept; --table only prints them.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sitreg_lumir.data.images import Pair
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.deform.ops import warp_labels
from sitreg_lumir.deform.state import SymmetricState
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import CompositeTransform, Transform, composite_field, map_points
from sitreg_lumir.io.read import read_volume
from sitreg_lumir.metrics import dsc, ndv
from sitreg_lumir.registration.model import Model, load_model
from sitreg_lumir.registration.register import register

DATASETS = ("LUMIR_dataset.json", "LUMIR_dataset_multimodal.json")
POINTS = 20_000


def main() -> None:
    """Registers the pairs that are missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DATA", help="folder of a data set in LUMIR's layout, any grid")
    parser.add_argument("--members", nargs="+", type=Path, metavar="PATH", help="default: the shipped ones")
    parser.add_argument("--refine", type=int, nargs="+", default=[0, 40], metavar="N", help="default: 0 40")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="of each list, the first N (default: 3)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "registrations.json")
    parser.add_argument("--table", action="store_true", help="register nothing")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.is_file() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not options.table:
        model = load_model(options.members, device="cpu")
        lists = [read_dataset(options.root / name, validation=True) for name in DATASETS]
        for number in range(options.pairs):
            for dataset in lists:
                pair = dataset.validation[number]
                for refine in options.refine:
                    name = f"{pair.contrasts} {pair.long_name} {refine}"
                    if name not in rows:
                        rows[name] = measure(model, pair, dataset.evaluation_labels, refine)
                        options.out.write_text(json.dumps(rows, indent=1) + "\n")
                        print(name, json.dumps(rows[name]), flush=True)
    print(table(rows))


def measure(model: Model, pair: Pair, scored: Sequence[int] | None, refine: int) -> dict[str, Any]:
    """Registers a pair and scores it."""
    start = time.process_time()
    result = register(pair.fixed.path, pair.moving.path, model=model, refine=refine)
    seconds = time.process_time() - start
    assert pair.fixed.labels is not None and pair.moving.labels is not None and isinstance(result.forward, SplineMap)
    labels = [read_volume(path)[0].astype(np.int32) for path in (pair.fixed.labels, pair.moving.labels)]
    scored = scored or np.unique(np.concatenate([volume.ravel() for volume in labels])).tolist()
    affine, brain = result.fixed.affine, result.fixed.brain
    generator = np.random.default_rng(0)
    voxels = generator.permutation(np.argwhere(brain))[:POINTS]
    where = (voxels + generator.uniform(-0.5, 0.5, voxels.shape)) @ affine[:3, :3].T + affine[:3, 3]
    apart = np.linalg.norm(map_points(result.backward, map_points(result.forward, where)) - where, axis=1)
    matrices = result.forward.fixed_to_model, result.forward.moving_to_model, result.forward.model_affine
    sampled = CompositeTransform(*matrices, as_the_network_samples(result.forward))
    fields = {
        "exact": voxel_field(result.forward.on_grids, brain.shape, affine, result.moving.affine),
        "sampled": voxel_field(sampled, brain.shape, affine, result.moving.affine),
    }
    row = {
        "verdict": result.verdict,
        "reasons": result.summary["reasons"],
        "median": float(np.median(apart)),
        "p99": float(np.percentile(apart, 99)),
        "largest": float(apart.max()),
        "ndv_of_the_map": result.summary["ndv_percent"],
        "cpu_seconds": seconds,
    }
    for way, field in fields.items():
        warped = warp_labels(torch.from_numpy(labels[1])[None, None], torch.from_numpy(field)[None])[0, 0].numpy()
        row[f"dice_{way}"] = float(np.nanmean(dsc(labels[0], labels[1], warped, scored)))
        row[f"ndv_{way}"] = ndv(field, brain)
    return row


def as_the_network_samples(exact: SplineMap) -> NDArray[np.float32]:
    """The field that the network composes on its grid from the control points of a map, ``(3, X, Y, Z)``, voxels."""
    state = SymmetricState(exact.grid_shape)
    for factor, (first, second) in zip(exact.updates.factors, exact.updates.updates, strict=True):
        state.update(first[None], second[None], factor)
    field: NDArray[np.float32] = state.fields()[0][0].numpy()
    return field


def voxel_field(
    transform: Transform, shape: Sequence[int], fixed_affine: NDArray[Any], moving_affine: NDArray[Any]
) -> NDArray[np.float32]:
    """A map's samples on the fixed scan's grid as a field in LUMIR's convention, ``(3, X, Y, Z)``, voxels."""
    field = composite_field(transform, shape, fixed_affine)
    voxels = np.indices(shape, dtype=np.float64)
    world = np.einsum("ij,j...->i...", fixed_affine[:3, :3], voxels) + fixed_affine[:3, 3][:, None, None, None]
    to_voxels = np.linalg.inv(moving_affine)
    moved = np.einsum("ij,j...->i...", to_voxels[:3, :3], world + field) + to_voxels[:3, 3][:, None, None, None]
    return (moved - voxels).astype(np.float32)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A row for each contrast and number of steps."""
    lines = [
        "| | pairs | inverse error mm: median / p99 / largest | NDV of samples, most, % | verdict | "
        "Dice exact, sampled | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = sorted({(name.split()[0], int(name.split()[-1])) for name in rows})
    for contrasts, refine in groups:
        of_group = [row for name, row in rows.items() if name.split()[0] == contrasts and name.endswith(f" {refine}")]
        errors = " / ".join(f"{max(row[key] for row in of_group):.1e}" for key in ("median", "p99", "largest"))
        verdicts = ", ".join(
            f"{sum(row['verdict'] == verdict for row in of_group)} {verdict}"
            for verdict in sorted({row["verdict"] for row in of_group})
        )
        dice = ", ".join(f"{mean(row[f'dice_{way}'] for row in of_group):.4f}" for way in ("exact", "sampled"))
        name = f"{contrasts}, " + (f"`--refine {refine}`" if refine else "plain")
        lines.append(
            f"| {name} | {len(of_group)} | {errors} | {max(row['ndv_exact'] for row in of_group):.5f} | {verdicts} | "
            f"{dice} | {mean(row['cpu_seconds'] for row in of_group):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
