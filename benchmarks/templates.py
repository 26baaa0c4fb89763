"""Registers brains that the members were not trained on: MNI152 and Colin27, with each other and with miniLUMIR's.

    python benchmarks/templates.py MINILUMIR/1mm COLIN              # COLIN: the templates of Debian's mricron-data
    python benchmarks/templates.py MINILUMIR/1mm COLIN --refine 40

COLIN is a folder with ``ch2bet.nii.gz`` (Colin27, skull-stripped) and ``aal.nii.gz`` (its labels). Every registration
goes to a folder of its own, with picture and report. Table and JSON hold what `register` measures, and Dice where
labels of the same structures exist: AAL's deep grey matter against miniLUMIR's labels, and the probable grey and white
matter of MNI152 against theirs. The protocols differ, so 1 is out of reach; "aligned" is before the deformation.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.geometry.resampling import resample_labels
from sitreg_lumir.metrics import dsc
from sitreg_lumir.registration.model import load_model
from sitreg_lumir.registration.register import register
from sitreg_lumir.registration.result import Registration
from sitreg_lumir.registration.scan import MNI152

Array = NDArray[Any]

DEEP_GREY = {  # left, right: of FreeSurfer's numbers, AAL's
    "thalamus": ((10, 49), (77, 78)),
    "caudate": ((11, 50), (71, 72)),
    "putamen": ((12, 51), (73, 74)),
    "pallidum": ((13, 52), (75, 76)),
    "hippocampus": ((17, 53), (37, 38)),
    "amygdala": ((18, 54), (41, 42)),
}
WHITE = (2, 41, 7, 46)
GREY = (3, 42, 8, 47, 10, 49, 11, 50, 12, 51, 13, 52, 17, 53, 18, 54, 26, 58)
COLUMNS = ("Dice aligned", "Dice", "MIND aligned", "MIND", "LNCC aligned", "LNCC", "NDV %", "verdict")


class Labels(NamedTuple):
    """A label map and its voxel-to-world matrix."""

    values: Array
    affine: Array


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="MINILUMIR", help="folder of miniLUMIR at 1 mm")
    parser.add_argument("colin", type=Path, metavar="COLIN", help="folder with ch2bet.nii.gz and aal.nii.gz")
    parser.add_argument("--members", nargs="+", help="default: the shipped ones")
    parser.add_argument("--refine", type=int, default=0, metavar="N", help="steps of optimisation (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "templates")
    options = parser.parse_args()
    model = load_model(options.members)
    colin = options.colin / "ch2bet.nii.gz"
    subjects = sorted((options.root / "imagesVal").glob("*.nii.gz"))
    pairs: list[tuple[str | Path, str | Path]] = [(MNI152, colin)]
    pairs += [(subject, template) for template in (MNI152, colin) for subject in subjects]
    rows = {}
    for fixed, moving in pairs:
        name = f"{short(moving)} onto {short(fixed)}"
        folder = options.out / name.replace(" ", "_")
        registration = register(fixed, moving, folder, model=model, refine=options.refine, align="each", overwrite=True)
        rows[name] = {"dice": overlap(registration, options.root, options.colin), **registration.summary}
        print(name, registration.verdict, flush=True)
    options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def short(file: str | Path) -> str:
    """What a table calls a scan."""
    name = Path(file).name.removesuffix(".nii.gz")
    return {"ch2bet": "Colin27"}.get(
        name, name.removeprefix("LUMIRMRI_").replace("_0000", " T1").replace("_0001", " T2")
    )


def overlap(registration: Registration, root: Path, colin: Path) -> dict[str, dict[str, float]] | None:
    """Dice of each structure, aligned and registered; None without labels of the same structures."""
    if registration.fixed.name.startswith("LUMIRMRI"):
        of_fixed = read(root / "labelsVal" / registration.fixed.name)
        if registration.moving.name.startswith("ch2"):
            names = tuple(DEEP_GREY)
            fixed = merged(of_fixed, [pair[0] for pair in DEEP_GREY.values()])
            moving = merged(read(colin / "aal.nii.gz"), [pair[1] for pair in DEEP_GREY.values()])
        else:
            names = ("grey matter", "white matter")
            fixed, moving = merged(of_fixed, [GREY, WHITE]), template_tissues()
        transform = registration.forward
        alignment = np.linalg.inv(transform.moving_to_model) @ transform.fixed_to_model
        scores = {}
        for stage, map_ in (("aligned", alignment), ("registered", transform)):
            warped = resample_labels(moving.values, moving.affine, map_, fixed.values.shape, fixed.affine)
            values = dsc(fixed.values, moving.values, warped, range(1, len(names) + 1))
            scores[stage] = {**dict(zip(names, map(float, values), strict=True)), "mean": float(np.mean(values))}
        return scores
    return None


def read(path: Path) -> Labels:
    """An image file and its voxel-to-world matrix."""
    image = nib.load(path)
    return Labels(np.asarray(image.dataobj), image.affine)  # type: ignore[attr-defined]


def merged(labels: Labels, groups: list[tuple[int, ...]]) -> Labels:
    """Labels 1, 2, ... for groups of labels, 0 for the others."""
    values = np.zeros(labels.values.shape, np.uint8)
    for number, group in enumerate(groups, 1):
        values[np.isin(labels.values, group)] = number
    return Labels(values, labels.affine)


def template_tissues() -> Labels:
    """1 where MNI152 is probably grey matter, 2 where it is probably white; ICBM's maps, bundled with nilearn."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template

    grey, white = (load(resolution=1) for load in (load_mni152_gm_template, load_mni152_wm_template))
    first, second = (np.asarray(image.dataobj) for image in (grey, white))
    values = np.where((first > 0.5) & (first > second), 1, np.where(second > 0.5, 2, 0)).astype(np.uint8)
    return Labels(values, grey.affine)


def table(rows: dict[str, Any]) -> str:
    """Markdown, one line for each registration."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    for name, row in rows.items():
        dice = ["-", "-"] if row["dice"] is None else [f"{row['dice'][stage]['mean']:.3f}" for stage in row["dice"]]
        before, after = row["similarity"]["aligned"], row["similarity"]["registered"]
        alike = [f"{stage[key]:.3f}" for key in ("mind", "lncc") for stage in (before, after)]
        lines.append("| " + " | ".join([name, *dice, *alike, f"{row['ndv_percent']:.4f}", row["verdict"]]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
