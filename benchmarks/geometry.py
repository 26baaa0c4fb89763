"""How much the headers, grids and intensities of two scans change their registration: nothing, or little.

    python benchmarks/geometry.py MINILUMIR/1mm                  # T1-T1, T1-T2 and MNI152, table and JSON
    python benchmarks/geometry.py MINILUMIR/1mm --only T1-T2 --members runs/mind/checkpoints/last.ckpt

A pair is registered as it is (each scan aligned independently), then with the moving file changed. *Lossless* changes
keep all voxels; their maps should agree to 0.05 mm. *Lossy* ones resample or cut; the median in the brain should stay
below 0.5 mm and the Dice loss within one point, both of that part of the brain which the changed file still shows.
Distances are between the maps of the fixed brain's points, mm.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.geometry.transforms import inside, map_points, transform_by
from sitreg_lumir.metrics import dsc
from sitreg_lumir.registration.model import load_model
from sitreg_lumir.registration.quality import brain_points
from sitreg_lumir.registration.register import register
from sitreg_lumir.registration.result import Registration
from sitreg_lumir.registration.scan import MNI152

Array = NDArray[Any]
Change = Callable[[Array, Array], tuple[Array, Array, Array]]  # values, affine -> the same, and the world's motion
STILL = np.eye(4)


def flipped(values: Array, affine: Array) -> tuple[Array, Array, Array]:
    """Axes turned round and exchanged in the file."""
    turn = np.eye(4)
    turn[:3, :3] = np.eye(3)[:, [2, 0, 1]]
    values = np.flip(values.transpose(2, 0, 1), 0)
    turn[:3, 3] += turn[:3, 0] * (values.shape[0] - 1)
    turn[:3, 0] *= -1
    return values, affine @ turn, STILL


def turned(values: Array, affine: Array) -> tuple[Array, Array, Array]:
    """A header turned by 15 degrees: the head lies elsewhere in the world."""
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", (12, -6, 7), degrees=True).as_matrix()
    return values, motion @ affine, motion


def rescaled(values: Array, affine: Array) -> tuple[Array, Array, Array]:
    """Intensities 3 I + 100 as floats, background noise of 1e-5."""
    noise = np.random.default_rng(0).normal(0, 1e-5, values.shape)
    return (3.0 * values + 100 + noise).astype(np.float32), affine, STILL


def standardised(values: Array, affine: Array) -> tuple[Array, Array, Array]:
    """Mean 0 and standard deviation 1."""
    return ((values - values.mean()) / values.std()).astype(np.float32), affine, STILL


def anisotropic(values: Array, affine: Array) -> tuple[Array, Array, Array]:
    """Resampled to 1.3 x 0.9 x 2.0 mm."""
    step = np.array([1.3, 0.9, 2.0]) / np.linalg.norm(affine[:3, :3], axis=0)
    coarse = affine @ np.diag([*step, 1])
    shape = np.floor((np.array(values.shape) - 1) / step).astype(int) + 1
    smooth = ndimage.gaussian_filter(values.astype(np.float32), np.sqrt(np.maximum(step**2 - 1, 0) / 12))
    sampled = resample(smooth, affine, STILL, shape, coarse)
    mask = resample((values > 0).astype(np.float32), affine, STILL, shape, coarse) >= 0.5
    return np.where(mask, np.maximum(sampled, 1), 0).round().astype(np.uint8), coarse, STILL


def cropped(values: Array, affine: Array) -> tuple[Array, Array, Array]:
    """The lowest 25 mm of the brain outside the field of view."""
    where = np.argwhere(values > 0)
    low = int(where[:, 2].min() + 25 / np.linalg.norm(affine[:3, 2]))
    moved = affine.copy()
    moved[:3, 3] += low * affine[:3, 2]
    return values[:, :, low:], moved, STILL


CHANGES: dict[str, tuple[Change, bool]] = {
    "axes flipped and permuted": (flipped, True),
    "header turned by 15 degrees": (turned, True),
    "3 I + 100, float noise 1e-5": (rescaled, True),
    "z-scored": (standardised, True),
    "1.3 x 0.9 x 2.0 mm": (anisotropic, False),
    "field of view cropped by 25 mm": (cropped, False),
}


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="MINILUMIR", help="folder of miniLUMIR at 1 mm")
    parser.add_argument("--members", nargs="+", help="default: the shipped ones")
    parser.add_argument("--only", nargs="+", default=["T1-T1", "T1-T2", MNI152], help="of T1-T1, T1-T2, MNI152")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "geometry.json")
    options = parser.parse_args()
    model = load_model(options.members)
    pairs = {
        "T1-T1": (options.root / "imagesVal/LUMIRMRI_0100_0000.nii.gz", "0101_0000"),
        "T1-T2": (options.root / "imagesVal/LUMIRMRI_0100_0000.nii.gz", "0101_0001"),
        MNI152: (MNI152, "0101_0000"),
    }
    rows = []
    print(
        f"{'pair':8} {'moving file':32} {'median':>8} {'p99':>8} {'Dice':>7} {'inv. med':>9} {'inv. p99':>9} {'s':>6}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.only:
            fixed, subject = pairs[name]
            moving = options.root / f"imagesVal/LUMIRMRI_{subject}.nii.gz"
            labels = (
                None
                if name == MNI152
                else [np.asarray(nib.load(options.root / f"labelsVal/{file.name}").dataobj) for file in (fixed, moving)]
            )
            first = None
            for change in ["as it is", *CHANGES]:
                start = time.perf_counter()
                path, motion = (moving, STILL) if change == "as it is" else changed(moving, change, Path(temporary))
                registration = register(fixed, path, model=model, align="each")
                seconds = time.perf_counter() - start
                first = first or registration
                rows.append(row(name, change, first, registration, motion, moving, labels, seconds))
                last = rows[-1]
                dice = ("-", "-") if last["dice"] is None else (f"{last['dice']:.4f}", f"{last['dice_loss']:.4f}")
                print(
                    f"{name:8} {change:32} {last['median_mm']:8.4f} {last['p99_mm']:8.4f} {dice[0]:>7} {dice[1]:>7} "
                    f"{last['inverse_median_mm']:8.4f} {last['inverse_p99_mm']:8.4f} {seconds:5.1f}",
                    flush=True,
                )
            rows += [exchanged(name, first, fixed, moving, model)]
            print(f"{name:8} {'scans exchanged':32} {rows[-1]['median_mm']:8.4f} {rows[-1]['p99_mm']:8.4f}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"model": str(model), "peak_gb": peak, "rows": rows}, indent=1) + "\n")
    print(f"peak memory {peak:.2f} GB; written: {options.out}")


def changed(path: Path, change: str, folder: Path) -> tuple[Path, Array]:
    """The changed file, and how its world moved."""
    image: Any = nib.load(path)
    values, affine, motion = CHANGES[change][0](np.asarray(image.dataobj), image.affine)
    out = folder / f"{path.name.split('.')[0]}_changed.nii.gz"
    stored = nib.Nifti1Image(np.ascontiguousarray(values), affine)
    stored.header.set_xyzt_units("mm")
    stored.to_filename(out)
    return out, motion


def row(
    name: str,
    change: str,
    first: Registration,
    registration: Registration,
    motion: Array,
    moving: Path,
    labels: list[Array] | None,
    seconds: float,
) -> dict[str, Any]:
    """How far a registration's map differs from the first one's; both in the unchanged moving world."""
    points = brain_points(first.fixed.brain, first.fixed.affine)
    before = map_points(first.forward, points)
    mapped = transform_by(np.linalg.inv(motion), map_points(registration.forward, points).T).T
    in_file = transform_by(np.linalg.inv(registration.moving.affine) @ motion, before.T)
    apart = np.linalg.norm(mapped - before, axis=1)[inside(in_file, registration.moving.shape)]
    dice = loss = None
    if labels is not None:
        affine = np.asarray(nib.load(moving).affine)
        grid = labels[0].shape, first.fixed.affine
        ones = np.ones(registration.moving.shape, np.uint8)
        shown = resample(ones, registration.moving.affine, [first.forward, motion], *grid, interpolation="nearest")
        fixed = labels[0] * shown
        ids = [k for k in np.unique(fixed) if k]
        scores = [
            float(
                np.nanmean(
                    dsc(fixed, labels[1], shown * resample(labels[1], world, maps, *grid, interpolation="nearest"), ids)
                )
            )
            for world, maps in ((affine, first.forward), (motion @ affine, registration.forward))
        ]
        dice, loss = scores[1], scores[0] - scores[1]
    error = registration.summary["inverse_error_mm"]
    return {
        "pair": name, "change": change, "lossless": change == "as it is" or CHANGES[change][1],
        "median_mm": float(np.median(apart)), "p99_mm": float(np.percentile(apart, 99)),
        "largest_mm": float(apart.max()), "dice": dice, "dice_loss": loss, "inverse_median_mm": error["median"],
        "inverse_p99_mm": error["p99"], "seconds": seconds, "verdict": registration.verdict,
    }  # fmt: skip


def exchanged(name: str, first: Registration, fixed: Any, moving: Path, model: Any) -> dict[str, Any]:
    """How far the maps of the exchanged scans differ."""
    exchanged_pair = register(moving, fixed, model=model, align="each")
    points = brain_points(first.fixed.brain, first.fixed.affine)
    apart = np.linalg.norm(map_points(exchanged_pair.backward, points) - map_points(first.forward, points), axis=1)
    return {
        "pair": name,
        "change": "scans exchanged",
        "median_mm": float(np.median(apart)),
        "p99_mm": float(np.percentile(apart, 99)),
        "largest_mm": float(apart.max()),
    }


if __name__ == "__main__":
    main()
