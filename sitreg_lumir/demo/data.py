"""LUMIR-like data made from the MNI152 template, so that everything can be tried without any patient data.

Each subject is the MNI152 tissue maps that nilearn bundles (nothing is downloaded), warped by a random smooth
diffeomorphism that is stored beside the images, and rendered as T1 and T2 with their own contrast, texture,
bias field and noise. It shows that the machinery works; its numbers say nothing about real brains.
"""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.demo.brain import (
    CONTRAST,
    STRUCTURES,
    Affine,
    Array,
    exponential,
    landmark_balls,
    load_tissue_template,
    render,
    sample,
    sample_field,
    velocity,
)
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import alone, writing_folder
from sitreg_lumir.io.json_file import read_json
from sitreg_lumir.preprocessing.template import LUMIR_CENTRE

RECORD = "demo.json"  # holds the parameters: a folder made with equal ones is used again
VERSION = 1  # of the recipe below; raise it whenever equal parameters would give other images


def make_demo_data(
    folder: str | os.PathLike[str],
    *,
    shape: tuple[int, int, int] = (40, 56, 48),
    voxel_size: float = 4.0,
    training: int = 12,
    validation: int = 2,
    seed: int = 0,
) -> Path:
    """Makes the demo's data set, unless the folder holds it already, made with equal parameters.

    ``folder`` gets LUMIR's layout: ``imagesTr`` (T1), ``imagesVal`` (T1 ``_0000`` and T2 ``_0001``),
    ``labelsVal``, ``landmarksVal``, ``LUMIR_dataset.json`` (T1-T1 pairs) and
    ``LUMIR_dataset_multimodal.json`` (fixed T1, moving T2), all ordered pairs of different validation
    subjects. ``fieldsVal`` holds the true fields (see ``true_disp``). The folder appears only when complete.

    Args:
        folder: where to; must not exist, be empty, or hold a data set made with equal parameters.
        shape: of the volumes; with ``voxel_size`` the default covers LUMIR's 160 x 224 x 192 mm.
        voxel_size: mm, isotropic.
        training: number of training subjects, at least 2.
        validation: number of validation subjects, at least 2.
        seed: decides every random choice.

    Returns:
        The path of ``LUMIR_dataset.json``.

    Raises:
        InputError: the folder holds something else.
        ValueError: a parameter is out of range.

    Examples:
        >>> dataset = sitreg_lumir.make_demo_data("demo_data", shape=(20, 28, 24), voxel_size=8.0, training=2)
        >>> dataset.name
        'LUMIR_dataset.json'
    """
    folder = Path(folder)
    if training < 2 or validation < 2 or training > 100:
        raise ValueError(f"training must be 2..100, validation at least 2; got {training} and {validation}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if len(shape) != 3 or min(shape) < 16 or not voxel_size > 0:
        raise ValueError(f"shape needs three sizes >= 16 and voxel_size > 0, got {shape} and {voxel_size}")
    made_with = {
        "version": VERSION,
        "shape": list(shape),
        "voxel_size": float(voxel_size),
        "training": training,
        "validation": validation,
        "seed": seed,
    }
    if _is_made(folder, made_with):
        return folder / "LUMIR_dataset.json"

    with alone(folder, wait=True):
        if not _is_made(folder, made_with):  # another process may have been faster
            with writing_folder(folder) as temporary:
                _write(temporary, made_with)
    return folder / "LUMIR_dataset.json"


def true_disp(folder: str | os.PathLike[str], fixed: str, moving: str) -> Array:
    """The field that the demo's images of two validation subjects were made with.

    With the stored ``u`` from a subject's grid to the template and its inverse ``v``, it is
    ``disp(x) = u_fixed(x) + v_moving(x + u_fixed(x))``.

    Args:
        folder: that ``make_demo_data`` made.
        fixed: subject, such as ``"0100"``.
        moving: subject.

    Returns:
        ``(3, X, Y, Z)`` float32, voxels, fixed grid: ``moving(x + disp(x))`` shows the fixed image's anatomy.
    """
    fields = Path(folder) / "fieldsVal"
    to_template = _load_field(fields / f"disp_{fixed}_template.nii.gz")
    from_template = _load_field(fields / f"disp_template_{moving}.nii.gz")
    return to_template + sample_field(from_template, to_template)


def _is_made(folder: Path, made_with: Mapping[str, Any]) -> bool:
    """Whether ``folder`` already holds this data set; anything else in the folder is an ``InputError``."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        record = dict(read_json(folder / RECORD, "a record", "")["made_with"])
    except (ValueError, KeyError, TypeError):
        message = f"{folder}: exists already and is not the demo's data; choose another folder"
        raise InputError(message) from None
    if record != made_with:
        changed = [
            f"{key} {record.get(key)} there, {made_with[key]} asked"
            for key in made_with
            if record.get(key) != made_with[key]
        ]
        raise InputError(
            f"{folder}: demo data made otherwise ({'; '.join(changed)}); remove it or choose another folder"
        )
    return True


def _write(folder: Path, made_with: Mapping[str, Any]) -> None:
    shape, voxel_size, seed = tuple(made_with["shape"]), made_with["voxel_size"], made_with["seed"]
    affine = np.diag([voxel_size] * 3 + [1.0])
    affine[:3, 3] = LUMIR_CENTRE - voxel_size * (np.array(shape) - 1) / 2
    template = load_tissue_template(voxel_size)
    for name in ("imagesTr", "imagesVal", "labelsVal", "landmarksVal", "fieldsVal"):
        (folder / name).mkdir()

    trained = [f"{number:04d}" for number in range(made_with["training"])]
    validated = [f"{100 + number:04d}" for number in range(made_with["validation"])]
    for subject in trained + validated:
        flow = velocity(shape, voxel_size, seed, subject)
        disp = exponential(flow)
        warped = [sample(tissue, disp, affine, template.affine, order=1) for tissue in template.tissues]
        tissues = np.stack(warped)
        validates = subject in validated
        images = folder / ("imagesVal" if validates else "imagesTr")
        for modality in CONTRAST if validates else ("0000",):
            image = render(tissues, CONTRAST[modality], voxel_size, seed, f"{subject}_{modality}")
            _save(images / f"LUMIRMRI_{subject}_{modality}.nii.gz", image, affine)
        if validates:
            disp_inv = exponential(-flow)
            brain = tissues.sum(0) > 0.5
            labels = brain * sample(template.labels, disp, affine, template.affine, order=0)
            landmarks = brain * landmark_balls(template.landmarks, disp_inv, affine, voxel_size)
            for modality in CONTRAST:
                file = f"LUMIRMRI_{subject}_{modality}.nii.gz"
                _save(folder / "labelsVal" / file, labels, affine)
                _save(folder / "landmarksVal" / file, landmarks, affine)
            for name, field in ((f"disp_{subject}_template", disp), (f"disp_template_{subject}", disp_inv)):
                _save(folder / "fieldsVal" / f"{name}.nii.gz", np.moveaxis(field, 0, -1), affine)
    _write_lists(folder, shape, trained, validated)
    record = {
        "made_with": dict(made_with),
        "fieldsVal": "(X, Y, Z, 3) float32, voxels; disp_<subject>_template lies on the subject's grid and "
        "leads to the template; disp_template_<subject> is its inverse, on that grid laid over the template",
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _write_lists(folder: Path, shape: Sequence[int], trained: list[str], validated: list[str]) -> None:
    """The two dataset files, with LUMIR's keys."""
    for name, modality in (("LUMIR_dataset.json", "0000"), ("LUMIR_dataset_multimodal.json", "0001")):
        pairs = [
            {
                "fixed": f"./imagesVal/LUMIRMRI_{fixed}_0000.nii.gz",
                "moving": f"./imagesVal/LUMIRMRI_{moving}_{modality}.nii.gz",
            }
            for fixed, moving in permutations(validated, 2)
        ]
        dataset = {
            "name": "demo",
            "release": str(VERSION),
            "description": "LUMIR-like brain images rendered from the MNI152 template",
            "tensorImageSize": "3D",
            "tensorImageShape": {"0": list(shape)},
            "modality": {"0": "T1w"} if modality == "0000" else {"0": "T1w", "1": "T2w"},
            "evaluation_labels": {str(key): label for key, label in STRUCTURES.items()},
            "numTraining": len(trained),
            "training": [{"image": f"./imagesTr/LUMIRMRI_{subject}_0000.nii.gz"} for subject in trained],
            "numValidation": len(pairs),
            "validation": pairs,
        }
        (folder / name).write_text(json.dumps(dataset, indent=1) + "\n")


def _save(path: Path, array: NDArray[Any], affine: Affine) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _load_field(path: Path) -> Array:
    if not path.is_file():
        raise InputError(f"{path}: no such file; only the demo's validation subjects have true fields")
    image: Any = nib.load(path)
    return np.moveaxis(np.asarray(image.dataobj, np.float32), -1, 0)
