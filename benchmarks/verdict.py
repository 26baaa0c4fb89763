"""What the verdict of `register` rests on: its numbers for good and for degraded registrations of training images.

    python benchmarks/verdict.py MINILUMIR/2mm        # a table; the limits stand in registration/verdict.py

Good ones are pairs of training subjects as they are, and with another contrast made from the T1 (inverted, gamma).
Degraded ones were given a wrong place (turned by 25 degrees, shifted by 30 mm), the mirror image's upside-down brain,
half a brain, or noise instead of one. No validation image is read.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.errors import InputError
from sitreg_lumir.registration.model import load_model
from sitreg_lumir.registration.register import register

Array = NDArray[Any]


def main() -> None:
    """Prints one line per registration and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="MINILUMIR", help="folder of miniLUMIR at 2 mm")
    parser.add_argument("--members", nargs="+", help="default: the shipped ones")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "verdict.json")
    options = parser.parse_args()
    model = load_model(options.members)
    images = [image.path for image in read_dataset(options.root, training=True).training]
    rng = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(options.pairs):
            fixed, moving = (images[index] for index in rng.choice(len(images), 2, replace=False))
            for kind in ("as it is", "inverted", "gamma", *DEGRADED):
                file = moving if kind == "as it is" else make(kind, moving, Path(temporary), rng)
                rows.append({"pair": number, "kind": kind, "good": kind not in DEGRADED, **measure(model, fixed, file)})
                values = {key: f"{value:.4g}" for key, value in rows[-1].items() if isinstance(value, float)}
                print(number, f"{kind:18}", rows[-1]["verdict"], values, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    for good in (True, False):
        for key in ("match", "gain", "brain_overlap", "displacement_p95", "ndv"):
            values = [row[key] for row in rows if row["good"] == good and row.get(key) is not None]
            if values:
                low, middle, high = np.percentile(values, (0, 50, 100))
                print(f"{'good' if good else 'degraded':8} {key:18} {low:.4f} .. {middle:.4f} .. {high:.4f}")


DEGRADED = ("turned", "shifted", "upside down", "half", "noise")


def measure(model: Any, fixed: Path, moving: Path) -> dict[str, Any]:
    """The numbers of one registration."""
    try:
        summary = register(fixed, moving, model=model, align="none").summary
    except InputError as error:
        return {"verdict": f"refused: {error}"}
    registered, aligned = summary["similarity"]["registered"], summary["similarity"]["aligned"]
    return {
        "verdict": summary["verdict"],
        "mind": registered["mind"],
        "match": None if registered["mind"] is None else registered["mind"] / registered["mind_by_chance"],
        "gain": None if registered["mind"] is None else aligned["mind"] - registered["mind"],
        "brain_overlap": registered["brain_overlap"],
        "displacement_p95": summary["displacement_mm"]["p95"],
        "ndv": summary["ndv_percent"],
    }


def make(kind: str, path: Path, folder: Path, rng: np.random.Generator) -> Path:
    """The changed image as a file; its header says nothing of the change."""
    image: Any = nib.load(path)
    values, affine = np.asarray(image.dataobj, dtype=np.float32), image.affine.copy()
    mask = values > 0
    if kind == "inverted":
        values = np.where(mask, 256 - values, 0)
    elif kind == "gamma":
        values = np.where(mask, 255 * (values / 255) ** 0.4, 0)
    elif kind == "turned":
        affine[:3, :3] = Rotation.from_euler("xyz", (25, 10, -15), degrees=True).as_matrix() @ affine[:3, :3]
    elif kind == "shifted":
        affine[:3, 3] += (20, -20, 10)
    elif kind == "upside down":
        values = values[:, :, ::-1]
    elif kind == "half":
        values[: values.shape[0] // 2] = 0
    else:
        values = np.where(mask, 128 + 40 * ndimage.gaussian_filter(rng.normal(size=mask.shape), 2) * 10, 0).clip(0, 255)
    out = folder / f"{kind.replace(' ', '_')}_{path.name}"
    nib.Nifti1Image(np.ascontiguousarray(values.astype(np.float32)), affine).to_filename(out)
    return out


if __name__ == "__main__":
    main()
