"""The folder of a template: what it may hold, and how it is written, all files or none."""

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.average.intensities import MeanImage
from sitreg_lumir.average.rounds import Registered, Rounds
from sitreg_lumir.average.sampling import Grid
from sitreg_lumir.challenge.provenance import compare, in_words
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.io.atomic import check_folder_is_writable, writing_folder
from sitreg_lumir.io.json_file import read_json
from sitreg_lumir.io.maps import save_map
from sitreg_lumir.io.write import of_type, save_volume
from sitreg_lumir.registration.outputs import own_files

TEMPLATE = "template.nii.gz"
BRAIN = "template_brain.nii.gz"
DEVIATION = "template_deviation.nii.gz"
AFFINE_MEAN = "affine_mean.nii.gz"
PICTURE = "picture.png"
SUMMARY = "summary.json"
MAPS, WARPED, WORK = "maps", "warped", "work"
FILES = (TEMPLATE, BRAIN, DEVIATION, AFFINE_MEAN, PICTURE, MAPS, WARPED)
"""What the folder may hold beside its summary and the work folder."""


@dataclass(frozen=True, eq=False)
class Results:
    """What is written.

    Attributes:
        mean: the template.
        affine: the mean by affines alone, on the same grid.
        grid: of both.
        run: that has the scans.
        closing: all scans registered to the template; None if nothing of single scans is wanted.
    """

    mean: MeanImage
    affine: MeanImage
    grid: Grid
    run: Rounds
    closing: Registered | None


def check_output(folder: Path, *, write: bool = False) -> None:
    """Refuses a folder that a template cannot go to, before any work is done.

    Args:
        folder: of the template.
        write: also try to write there.

    Raises:
        InputError: it is a file, holds other files alone, or cannot be written to.
    """
    own_files(folder, {SUMMARY, WORK, *FILES})
    if (folder / SUMMARY).exists() and _stored(folder) is None:
        raise InputError(f"{folder / SUMMARY}: is no template's; name a new or empty folder with `out`")
    if write:
        check_folder_is_writable(folder)
        with suppress(OSError):  # it comes with the first result
            folder.rmdir()


def finished(folder: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The summary of a whole template that was made in the same way; None if there is none.

    Raises:
        InputError: without ``overwrite``, it was made otherwise; it says what differs.
    """
    stored = _stored(folder)
    if stored is None:
        return None
    differences = compare(stored["made_from"], made_from)
    wanted = [TEMPLATE, BRAIN, DEVIATION, AFFINE_MEAN, PICTURE, *made_from["options"]["save"]]
    if not differences:
        return stored if all((folder / name).exists() for name in wanted) else None
    if not overwrite:
        raise InputError(
            f"{folder}: holds a template that was made otherwise: {in_words(differences)}; name another folder, or add "
            "`overwrite=True`"
        )
    return None


def _stored(folder: Path) -> dict[str, Any] | None:
    try:
        summary = read_json(folder / SUMMARY, "a summary", "")
    except InputError:
        return None
    return summary if isinstance(summary.get("made_from"), dict) and "rounds" in summary else None


def save_template(folder: Path, results: Results, summary: dict[str, Any], saved: frozenset[str]) -> None:
    """Writes all files at once, without the work folder.

    Raises:
        InputError: a file cannot be written.
    """
    mean, grid = results.mean, results.grid
    foreign = folder.is_dir() and not {path.name for path in folder.iterdir()} <= {*FILES, SUMMARY, WORK}
    own = {name for name in FILES if name not in (MAPS, WARPED)} if foreign else {*FILES, WORK}
    with writing_folder(folder, {*own, SUMMARY}, last=SUMMARY) as temporary:
        save_volume(temporary / TEMPLATE, mean.image, grid.affine)
        save_volume(temporary / BRAIN, mean.brain, grid.affine)
        save_volume(temporary / DEVIATION, mean.deviation, grid.affine)
        save_volume(temporary / AFFINE_MEAN, results.affine.unsharpened, grid.affine)
        (temporary / PICTURE).write_bytes(picture(results))
        for name in saved:
            (temporary / name).mkdir()
        if results.closing is not None:
            for number in range(len(results.run.scans)):
                _save_scan(temporary, results, results.closing, number, saved)
        (temporary / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        if foreign:  # files of others stay, so that the folder is not exchanged as a whole
            (folder / SUMMARY).unlink(missing_ok=True)  # its presence says that the other files are complete
            for name in (MAPS, WARPED):
                shutil.rmtree(folder / name, ignore_errors=True)
    shutil.rmtree(folder / WORK, ignore_errors=True)


def _save_scan(folder: Path, results: Results, closing: Registered, number: int, saved: frozenset[str]) -> None:
    """A scan's map to the template, and the scan on the template's grid."""
    scan, exact = results.run.scans[number], results.run.map_of(closing, number)
    original, _ = results.run.subjects.original(scan)
    forward = SplineMap(
        results.grid.to_model, exact.moving_to_model, exact.model_affine, exact.updates, exact.brain, exact.other_brain
    )
    grids = {
        "fixed": (results.grid.shape, results.grid.affine),
        "moving": (original.shape, original.affine),
    }
    if MAPS in saved:
        save_map(folder / MAPS / f"{scan.name}.safetensors", forward, grids, {"scan": scan.entries})
    if WARPED in saved:
        warped = resample(original.data, original.affine, forward.on_grids, *grids["fixed"])
        save_volume(folder / WARPED / f"{scan.name}.nii.gz", of_type(warped, original.data.dtype), results.grid.affine)


def picture(results: Results) -> bytes:
    """Affine mean, template and deviation in the middle of three planes, as a PNG."""
    from sitreg_lumir.report.sheet import means_png

    images: list[tuple[str, NDArray[np.float32]]] = [
        ("affine mean", results.affine.unsharpened),
        ("template", results.mean.image),
        ("deviation between scans", results.mean.deviation),
    ]
    x, y, z = (float(size) for size in results.grid.spacing)
    title = f"mean of {len(results.run.scans)} scans"
    return means_png(images, results.mean.brain, (x, y, z), title)
