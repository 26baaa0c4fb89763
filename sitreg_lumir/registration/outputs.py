"""Writes the folder of a registration: all of its files, or none."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import CompositeTransform, composite_field
from sitreg_lumir.io.atomic import reason_of, temporary_folder_beside
from sitreg_lumir.io.itk import field_grid, save_affine_tfm, save_itk_field
from sitreg_lumir.io.maps import DESCRIPTION, MAP, save_map
from sitreg_lumir.io.write import of_type, save_disp, save_volume
from sitreg_lumir.registration.apply import IMAGES_TO
from sitreg_lumir.registration.pictures import picture_png, picture_volumes
from sitreg_lumir.registration.result import Registration
from sitreg_lumir.report.pictures import Volumes

SUMMARY = "summary.json"
REPORT = "report.html"
PICTURE = "picture.png"
WARPED = {"fixed": "warped_moving.nii.gz", "moving": "warped_fixed.nii.gz"}
FILES = {
    WARPED["fixed"]: "the moving image on the fixed grid",
    WARPED["moving"]: "the fixed image on the moving grid",
    IMAGES_TO["fixed"]: "transform, ITK field on the fixed grid",
    IMAGES_TO["moving"]: "transform, ITK field on the moving grid",
    "jac_det.nii.gz": "local volume change of the whole map, fixed grid",
    "jac_det_deformation.nii.gz": "local volume change of the deformation alone, fixed grid",
    "uncertainty.nii.gz": "how far the members' own fields differ, mm, fixed grid (where asked for)",
    MAP: "the exact map itself, both ways, for `apply` and `load_map`",
    DESCRIPTION: "what the map's file holds, and both scans' grids",
    "fixed_to-MNI152.tfm": "alignment of the fixed scan, ITK affine",
    "moving_to-MNI152.tfm": "alignment of the moving scan",
    "disp_fixed_moving.nii.gz": "deformation on the model's grid, voxels, as in LUMIR",
    "disp_moving_fixed.nii.gz": "its inverse",
    "deformation_xfm.nii.gz": "the deformation alone as an ITK field in MNI152 space",
    SUMMARY: "numbers and verdict",
    REPORT: "pictures and numbers to look at",
    PICTURE: "fixed, moving and warped image, deformed grid",
}


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that a registration cannot go to, before any work is done.

    Raises:
        InputError: it is a file, cannot be written, or holds files that are no registration's or would be lost.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder for the results with `out`")
    existing = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in existing if name not in FILES]
    if foreign:
        raise InputError(f"{folder}: holds other files ({foreign[0]}); name a new or empty folder with `out`")
    if existing and not overwrite:
        raise InputError(f"{folder}: holds a registration already; name another folder, or add `overwrite=True`")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written (permission denied); choose a folder with access")


def save_registration(
    registration: Registration, folder: Path, *, padding_mm: float, report: bool, overwrite: bool
) -> Path:
    """Writes all results; see :meth:`Registration.save`."""
    check_folder(folder, overwrite)
    with _whole(folder) as temporary:
        fixed, moving = registration.fixed, registration.moving
        save_volume(temporary / WARPED["fixed"], of_type(registration.warped, moving.data.dtype), fixed.affine)
        save_volume(temporary / WARPED["moving"], of_type(registration.warped_fixed, fixed.data.dtype), moving.affine)
        for to, scan in (("fixed", fixed), ("moving", moving)):
            field = registration.field_on(*field_grid(scan.shape, scan.affine, padding_mm), to=to)
            save_itk_field(temporary / IMAGES_TO[to], field.disp, field.affine)  # type: ignore[index]
        save_volume(temporary / "jac_det.nii.gz", registration.jacobian(), fixed.affine)
        deformation = registration.jacobian(with_alignment=False)
        save_volume(temporary / "jac_det_deformation.nii.gz", deformation, fixed.affine)
        uncertainty = registration.uncertainty()
        if uncertainty is not None:
            save_volume(temporary / "uncertainty.nii.gz", uncertainty, fixed.affine)
        grids = {"fixed": (fixed.shape, fixed.affine), "moving": (moving.shape, moving.affine)}
        save_map(temporary, registration.forward, grids)
        save_affine_tfm(temporary / "fixed_to-MNI152.tfm", registration.forward.fixed_to_model)
        save_affine_tfm(temporary / "moving_to-MNI152.tfm", registration.forward.moving_to_model)
        affine = registration.forward.model_affine
        save_disp(temporary / "disp_fixed_moving.nii.gz", registration.disp, affine)
        save_disp(temporary / "disp_moving_fixed.nii.gz", registration.disp_inv, affine)
        deformation_alone = CompositeTransform(np.eye(4), np.eye(4), affine, registration.disp)
        samples = composite_field(deformation_alone, registration.disp.shape[1:], affine)
        save_itk_field(temporary / "deformation_xfm.nii.gz", samples, affine)
        (temporary / SUMMARY).write_text(json.dumps(registration.summary, indent=1, ensure_ascii=False) + "\n")
        if report:
            volumes = picture_volumes(registration)
            _write_report(temporary / REPORT, registration, volumes)
            (temporary / PICTURE).write_bytes(picture_png(registration, volumes))
    return folder


def _write_report(path: Path, registration: Registration, volumes: Volumes) -> None:
    from sitreg_lumir.report.report import write_pair_report

    summary = registration.summary
    write_pair_report(
        path,
        **vars(volumes),
        numbers=report_numbers(summary),
        verdict=summary["verdict"],
        reasons=summary["reasons"],
        title=f"{registration.moving.name} onto {registration.fixed.name}",
        names=(registration.fixed.name, registration.moving.name),
    )


def report_numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """Arranges a summary for the report: the main numbers as plain values, the rest as tables."""
    similarity = summary["similarity"]
    main = {
        "MIND difference, aligned": similarity["aligned"]["mind"],
        "MIND difference, registered": similarity["registered"]["mind"],
        "local correlation, aligned": similarity["aligned"]["lncc"],
        "local correlation, registered": similarity["registered"]["lncc"],
        "folded volume, % of the brain": summary["ndv_percent"],
        "inverse error, median, mm": summary["inverse_error_mm"]["median"],
        "displacement, 95th percentile, mm": summary["displacement_mm"]["p95"],
    }
    tables = {}
    for key, value in summary.items():
        if isinstance(value, dict) and key != "similarity":
            tables[key.replace("_", " ")] = {
                name.replace("_", " "): item for name, item in value.items() if not isinstance(item, dict | list)
            }
    for stage, values in similarity.items():
        if values:
            tables[f"similarity, {stage.replace('_', ' ')}"] = {
                name.replace("_", " "): item for name, item in values.items()
            }
    return {**main, **tables}


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, whose files move there at the end; on any error nothing is left of it."""
    try:
        with temporary_folder_beside(folder) as temporary:
            yield temporary
            folder.mkdir(exist_ok=True)
            (folder / SUMMARY).unlink(missing_ok=True)  # its presence says that the other files are complete
            for name in FILES:
                if (temporary / name).exists():
                    os.replace(temporary / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({reason_of(error)}); choose a folder with space and access"
        ) from None
