"""Writes the folder of a registration: all of its chosen files, or none."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sitreg_lumir.geometry.transforms import CompositeTransform, composite_field
from sitreg_lumir.io.atomic import writing_folder
from sitreg_lumir.io.composite import reaching_grid, save_composite
from sitreg_lumir.io.itk import field_grid, save_affine_tfm, save_itk_field
from sitreg_lumir.io.maps import save_map
from sitreg_lumir.io.write import of_type, save_disp, save_volume
from sitreg_lumir.registration.outputs import (
    ALIGNMENTS,
    BRAINS,
    COMPOSITES_TO,
    DEFAULT,
    FILES,
    IMAGES_TO,
    JACOBIANS,
    LOG_JACOBIANS,
    MODEL_FIELDS,
    PICTURE,
    REPORT,
    SUMMARY,
    UNCERTAINTY,
    WARPED,
    check_folder,
)
from sitreg_lumir.registration.pictures import picture_png, picture_volumes
from sitreg_lumir.registration.result import Registration
from sitreg_lumir.report.pictures import Volumes


def save_registration(
    registration: Registration,
    folder: Path,
    *,
    padding_mm: float,
    report: bool,
    overwrite: bool,
    outputs: frozenset[str] | None,
) -> Path:
    """Writes the outputs; see :meth:`Registration.save`."""
    check_folder(folder, overwrite)
    wanted = set(DEFAULT if outputs is None else outputs)
    if outputs is None and registration.uncertainty_voxels is not None:
        wanted.add("uncertainty")
    if outputs is None and (registration.fixed.stripped_by or registration.moving.stripped_by):
        wanted.add("masks")
    if not report:
        wanted.discard("report")
    with writing_folder(folder, own=FILES, last=SUMMARY) as temporary:
        parts: list[Callable[[Path, Registration, set[str]], None]] = [
            partial(_write_warped, to="fixed"),
            partial(_write_warped, to="moving"),
            partial(_write_transforms, padding_mm=padding_mm),
            _write_pictures,
            _write_maps_of_change,
        ]
        with ThreadPoolExecutor(min(2, torch.get_num_threads())) as threads:  # a part each: sampling, compression
            for written in [threads.submit(write, temporary, registration, wanted) for write in parts]:
                written.result()
        text = json.dumps(registration.summary, indent=1, ensure_ascii=False) + "\n"
        (temporary / SUMMARY).write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder


def _write_warped(folder: Path, registration: Registration, wanted: set[str], *, to: str) -> None:
    if "warped" not in wanted:
        return
    fixed, moving = registration.fixed, registration.moving
    if to == "fixed":
        save_volume(folder / WARPED["fixed"], of_type(registration.warped, moving.data.dtype), fixed.affine)
    else:
        save_volume(folder / WARPED["moving"], of_type(registration.warped_fixed, fixed.data.dtype), moving.affine)


def _write_pictures(folder: Path, registration: Registration, wanted: set[str]) -> None:
    if not wanted & {"report", "picture"}:
        return
    volumes = picture_volumes(registration)
    if "report" in wanted:
        _write_report(folder / REPORT, registration, volumes)
    if "picture" in wanted:
        (folder / PICTURE).write_bytes(picture_png(registration, volumes))


def _write_transforms(folder: Path, registration: Registration, wanted: set[str], *, padding_mm: float) -> None:
    fixed, moving, forward = registration.fixed, registration.moving, registration.forward
    if "transforms" in wanted:
        for scan, exact, name in (
            (fixed, forward, COMPOSITES_TO["fixed"]),
            (moving, registration.backward, COMPOSITES_TO["moving"]),
        ):
            border = reaching_grid(
                exact.to_voxels @ scan.affine, scan.shape, scan.spacing, exact.grid_shape, padding_mm
            )
            save_composite(folder / name, exact, border)
    if "fields" in wanted:
        for to, scan in (("fixed", fixed), ("moving", moving)):
            field = registration.field_on(*field_grid(scan.shape, scan.affine, padding_mm), to=to)
            save_itk_field(folder / IMAGES_TO[to], field.disp, field.affine)
    if "map" in wanted:
        save_map(folder, forward, {"fixed": (fixed.shape, fixed.affine), "moving": (moving.shape, moving.affine)})
    if "alignments" in wanted:
        save_affine_tfm(folder / ALIGNMENTS["fixed"], forward.fixed_to_model)
        save_affine_tfm(folder / ALIGNMENTS["moving"], forward.moving_to_model)
    if "model-fields" in wanted:
        affine = forward.model_affine
        save_disp(folder / MODEL_FIELDS[0], registration.disp, affine)
        save_disp(folder / MODEL_FIELDS[1], registration.disp_inv, affine)
        alone = CompositeTransform(np.eye(4), np.eye(4), affine, registration.disp)
        save_itk_field(folder / MODEL_FIELDS[2], composite_field(alone, alone.grid_shape, affine), affine)


def _write_maps_of_change(folder: Path, registration: Registration, wanted: set[str]) -> None:
    fixed, moving = registration.fixed, registration.moving
    for alignment, name, log_name in zip((True, False), JACOBIANS, LOG_JACOBIANS, strict=True):
        if wanted & {"jacobian", "log-jacobian"}:
            determinant = registration.jacobian(with_alignment=alignment)
            if "jacobian" in wanted:
                save_volume(folder / name, determinant, fixed.affine)
            if "log-jacobian" in wanted:
                save_volume(folder / log_name, _logarithm(determinant), fixed.affine)
    uncertainty = registration.uncertainty()
    if "uncertainty" in wanted and uncertainty is not None:
        save_volume(folder / UNCERTAINTY, uncertainty, fixed.affine)
    if "masks" in wanted:
        save_volume(folder / BRAINS["fixed"], fixed.brain, fixed.affine)
        save_volume(folder / BRAINS["moving"], moving.brain, moving.affine)


def _logarithm(determinant: NDArray[np.float32]) -> NDArray[np.float32]:
    """The natural logarithm; NaN where the map folds, as where the determinant is not known."""
    return np.log(determinant, out=np.full_like(determinant, np.nan), where=determinant > 0)


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
