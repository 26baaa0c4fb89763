"""What the folder of a registration may hold: names of outputs, which `save` chooses, and the files of each."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.maps import DESCRIPTION, MAP
from sitreg_lumir.io.temporary import clean_leftovers

IMAGES_TO = {"fixed": "from-moving_to-fixed_xfm.nii.gz", "moving": "from-fixed_to-moving_xfm.nii.gz"}
"""The field on the grid that images go to."""
COMPOSITES_TO = {"fixed": "from-moving_to-fixed_xfm.h5", "moving": "from-fixed_to-moving_xfm.h5"}
"""Likewise, alignments and deformation in one file."""
SUMMARY = "summary.json"
REPORT = "report.html"
PICTURE = "picture.png"
WARPED = {"fixed": "warped_moving.nii.gz", "moving": "warped_fixed.nii.gz"}
BRAINS = {"fixed": "fixed_brain.nii.gz", "moving": "moving_brain.nii.gz"}
ALIGNMENTS = {"fixed": "fixed_to-MNI152.tfm", "moving": "moving_to-MNI152.tfm"}
JACOBIANS = ("jac_det.nii.gz", "jac_det_deformation.nii.gz")
LOG_JACOBIANS = ("log_jac_det.nii.gz", "log_jac_det_deformation.nii.gz")
MODEL_FIELDS = ("disp_fixed_moving.nii.gz", "disp_moving_fixed.nii.gz", "deformation_xfm.nii.gz")
UNCERTAINTY = "uncertainty.nii.gz"

OUTPUTS: dict[str, tuple[str, ...]] = {
    "warped": (WARPED["fixed"], WARPED["moving"]),
    "transforms": (COMPOSITES_TO["fixed"], COMPOSITES_TO["moving"]),
    "map": (MAP, DESCRIPTION),
    "alignments": (ALIGNMENTS["fixed"], ALIGNMENTS["moving"]),
    "fields": (IMAGES_TO["fixed"], IMAGES_TO["moving"]),
    "jacobian": JACOBIANS,
    "log-jacobian": LOG_JACOBIANS,
    "model-fields": MODEL_FIELDS,
    "masks": (BRAINS["fixed"], BRAINS["moving"]),
    "uncertainty": (UNCERTAINTY,),
    "report": (REPORT,),
    "picture": (PICTURE,),
}
"""Names of outputs and their files; the summary is always written."""
DEFAULT = ("warped", "transforms", "map", "alignments", "report", "picture")
"""What is written unless something else is chosen; options that make an uncertainty or masks add these."""
FILES = frozenset({SUMMARY, *(name for names in OUTPUTS.values() for name in names)})
"""All files that the folder of a registration may hold."""


def chosen_outputs(save: str | Sequence[str] | None) -> frozenset[str] | None:
    """The names that a user gave, checked; ``default`` and ``all`` are resolved.

    Args:
        save: names separated by commas, or several such texts; None for what is written by default.

    Returns:
        names of :data:`OUTPUTS`; None if nothing was chosen.

    Raises:
        InputError: a name is unknown, or there is none.
    """
    if save is None:
        return None
    texts = [save] if isinstance(save, str) else list(save)
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    known = ", ".join((*OUTPUTS, "default", "all"))
    unknown = next((name for name in names if name not in (*OUTPUTS, "default", "all")), None)
    if unknown is not None:
        raise InputError(f"`save` {unknown}: no such output; choose from {known}")
    if not names:
        raise InputError(f"`save` names no output; choose from {known}")
    groups = {"default": DEFAULT, "all": tuple(OUTPUTS)}
    return frozenset(output for name in names for output in groups.get(name, (name,)))


_OF_SYSTEMS = ("Thumbs.db", "desktop.ini")  # files that Windows leaves; those of others start with a point


def own_files(folder: Path, own: Collection[str]) -> list[str]:
    """The names in a folder, which need not exist, that are among those which results have.

    Raises:
        InputError: it is a file, or holds files and none of these, beside those that systems leave (``.DS_Store``).
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder for the results with `out`")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    existing = [name for name in names if name in own]
    foreign = [name for name in names if name not in own and not name.startswith(".") and name not in _OF_SYSTEMS]
    if foreign and not existing:
        raise InputError(f"{folder}: holds other files ({foreign[0]}); name a new or empty folder with `out`")
    return existing


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that a registration cannot go to, before any work is done.

    Raises:
        InputError: it is a file, cannot be written, holds a registration that would be lost, or files and none. Files
            beside a registration, and those that systems leave (``.DS_Store``), stay as they are.
    """
    for place in (folder.absolute().parent, folder):
        clean_leftovers(place)
    if own_files(folder, FILES) and not overwrite:
        raise InputError(f"{folder}: holds a registration already; name another folder, or add `overwrite=True`")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written (permission denied); choose a folder with access")
