"""How good a template is: sharpness, and how well labels of other subjects agree once carried to it.

    python benchmarks/template.py REALBRAINS/2mm                    # 10 training scans, 3 rounds
    python benchmarks/template.py REALBRAINS/2mm --scans 40 --rounds 4

The template is made of training scans, spread evenly over the list. The validation subjects, which had no part in it,
are registered to it and their labels carried to its grid (nearest voxel). Scored is the mean Dice coefficient over all
pairs of subjects and all labels that both have. Compared are their affine alignments alone, registrations to the affine
mean of the training scans, and registrations to the template. All scans must lie in MNI152's world. What is
done is kept: the same command goes on where it was stopped; --table only prints.
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.average.build import build_template
from sitreg_lumir.average.outputs import AFFINE_MEAN, TEMPLATE
from sitreg_lumir.data.images import Image
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.geometry.resampling import resample_labels
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import Transform
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.read import read_grid, read_volume
from sitreg_lumir.registration.model import Model, load_model
from sitreg_lumir.registration.pair import pair_on_grid
from sitreg_lumir.registration.scan import ScanFiles, place_scan

Labels = NDArray[np.int32]
WAYS = {
    "affine": "affine alignment alone",
    AFFINE_MEAN: "registered to the affine mean",
    TEMPLATE: "registered to the template",
}


def main() -> None:
    """Makes the template, carries the labels that are missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DATA", help="folder of a data set in LUMIR's layout, with labels")
    parser.add_argument("--scans", type=int, default=10, metavar="N", help="of the training scans (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--members", nargs="+", type=Path, metavar="PATH", help="default: the shipped ones")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "template")
    parser.add_argument("--table", action="store_true", help="compute nothing")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    average = options.out / "average"
    if not options.table:
        began = time.process_time()
        model = load_model(options.members, device="cpu")
        training = [image.path for image in read_dataset(options.root, training=True).training]
        chosen = [training[index] for index in np.linspace(0, len(training) - 1, options.scans).round().astype(int)]
        build_template(chosen, average, model=model, rounds=options.rounds, align="none", save="none")
        for image in validation_images(options.root):
            for way in WAYS:
                file = labels_file(options.out, way, image)
                if not file.is_file():
                    logging.info("%s: %s", image.path.name, WAYS[way])
                    with writing(file) as temporary, temporary.open("wb") as stream:
                        np.savez_compressed(stream, labels=moved_labels(model, average, way, image))
        logging.info("%.0f s of a processor in this run", time.process_time() - began)
    print(rounds_table(json.loads((average / "summary.json").read_text())))
    print(dice_table(options.root, options.out))


def validation_images(root: Path) -> list[Image]:
    """The validation subjects, each once."""
    pairs = read_dataset(root, validation=True).validation
    images = {str(image.path): image for pair in pairs for image in (pair.fixed, pair.moving)}
    return [images[path] for path in sorted(images)]


def labels_file(out: Path, way: str, image: Image) -> Path:
    """Where a subject's labels on the template's grid lie."""
    return out / "carried" / way.removesuffix(".nii.gz") / f"{image.path.name.removesuffix('.nii.gz')}.npz"


def moved_labels(model: Model, average: Path, way: str, image: Image) -> Labels:
    """A subject's labels on the template's grid, ``(X, Y, Z)``."""
    assert image.labels is not None
    transforms: Sequence[Transform] = [np.eye(4)]
    if way != "affine":
        fixed = place_scan(ScanFiles(average / way, "fixed"), "none", None, None)
        moving = place_scan(ScanFiles(image.path, "moving"), "none", None, None)
        pair = pair_on_grid(model, fixed, moving, np.eye(4), np.eye(4))
        updates = SplineUpdates.rounded(model.control_points(fixed=pair.fixed, moving=pair.moving), model.shape)
        brains = pair.fixed_brain[0, 0].numpy(), pair.moving_brain[0, 0].numpy()
        transforms = [SplineMap(np.eye(4), np.eye(4), model.affine, updates, *brains).on_grids]
    values, affine = read_volume(image.labels)
    return resample_labels(values.astype(np.int32), affine, transforms, *read_grid(average / TEMPLATE))


def pairwise_dice(maps: Sequence[Labels]) -> list[float]:
    """Mean Dice coefficient over the labels that both have, for each pair of label maps."""
    size = 1 + max(int(labels.max()) for labels in maps)
    counts = [np.bincount(labels.ravel(), minlength=size) for labels in maps]
    scores = []
    for first, second in combinations(range(len(maps)), 2):
        common = np.bincount(maps[first][maps[first] == maps[second]], minlength=size)
        both = (counts[first] > 0) & (counts[second] > 0)
        both[0] = False
        scores.append(float((2 * common / np.maximum(counts[first] + counts[second], 1))[both].mean()))
    return scores


def rounds_table(summary: dict[str, Any]) -> str:
    """How sharp the means are, and how far each round moved them."""
    lines = [
        "| | mean moved by, mm | scans moved by, mm | left, mm | gradient per mm | sharpened | deviation |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, entry in enumerate([summary["affine_mean"], *summary["rounds"]]):
        moved = [entry[key] for key in ("displacement_mm", "left_mm")] if number else [None, None]
        moved = [entry["mean_displacement_mm"]["mean"] if number else None, *moved]
        values = [*moved, *(entry[kind]["gradient_per_mm"] for kind in ("averaged", "sharpened"))]
        values.append(entry["averaged"]["deviation"])
        digits = (2, 2, 2, 4, 4, 3)
        cells = ["" if value is None else f"{value:.{places}f}" for value, places in zip(values, digits, strict=True)]
        lines.append(f"| {f'round {number}' if number else 'affine mean'} | {' | '.join(cells)} |")
    final = summary["final_mean_displacement_mm"]
    return "\n".join(lines) + ("" if final is None else f"\nmaps to the template: mean map {final['mean']:.2f} mm")


def dice_table(root: Path, out: Path) -> str:
    """Agreement of the carried labels."""
    lines = ["| validation subjects | Dice, mean of all pairs | worst pair |", "|---|---|---|"]
    for way, name in WAYS.items():
        files = [labels_file(out, way, image) for image in validation_images(root)]
        scores = pairwise_dice([np.load(file)["labels"] for file in files if file.is_file()])
        lines.append(f"| {name} | {np.mean(scores):.3f} | {min(scores):.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
