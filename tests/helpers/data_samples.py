"""A tiny LUMIR-like dataset for the tests of ``data``."""

import json
from pathlib import Path

import nibabel
import numpy as np

SHAPE = (8, 10, 6)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def save(path: Path, values: np.ndarray) -> Path:
    """Writes one volume, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), path)
    return path


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The voxels of a volume, and its voxel-to-world matrix."""
    image = nibabel.load(path)
    return np.asarray(image.dataobj), np.asarray(image.affine)


def head(seed: int) -> np.ndarray:
    """A box of random intensities 1..255 in an empty background, uint8."""
    values = np.zeros(SHAPE, np.uint8)
    values[2:6, 2:8, 1:5] = np.random.default_rng(seed).integers(1, 256, (4, 6, 4))
    return values


def make_dataset(root: Path, training: int = 5, validation: int = 3) -> Path:
    """T1 training images, and T1-T1 validation pairs in a ring plus one T1-T2 pair in a second JSON."""
    for subject in range(training):
        save(root / f"imagesTr/LUMIRMRI_{subject:04}_0000.nii.gz", head(subject))
    for subject in range(100, 100 + validation):
        for modality in ("0000", "0001"):
            save(root / f"imagesVal/LUMIRMRI_{subject:04}_{modality}.nii.gz", head(subject))
            save(root / f"labelsVal/LUMIRMRI_{subject:04}_{modality}.nii.gz", head(subject) // 100)
    names = [f"./imagesVal/LUMIRMRI_{subject:04}_0000.nii.gz" for subject in range(100, 100 + validation)]
    content = {
        "name": "tiny",
        "tensorImageShape": {"0": list(SHAPE)},
        "modality": {"0": "T1w Brain MRI"},
        "evaluation_labels": {"0": "background", "1": "grey", "2": "white"},
        "training": [{"image": f"./imagesTr/LUMIRMRI_{n:04}_0000.nii.gz"} for n in range(training)],
        "validation": [
            {"fixed": fixed, "moving": moving} for fixed, moving in zip(names, names[1:] + names[:1], strict=True)
        ],
    }
    write(root, content)
    mixed = [{"fixed": names[0], "moving": names[1].replace("_0000.", "_0001.")}]
    write(root, {**content, "validation": mixed}, "LUMIR_dataset_multimodal.json")
    return root


def write(root: Path, content: object, name: str = "LUMIR_dataset.json") -> Path:
    """Writes a dataset JSON."""
    (root / name).write_text(json.dumps(content))
    return root / name


def content(root: Path) -> dict:  # type: ignore[type-arg]
    """The dataset's JSON, to be changed and written again."""
    return dict(json.loads((root / "LUMIR_dataset.json").read_text()))
