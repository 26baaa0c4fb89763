"""A folder of fields -> the zip that the challenge takes, or every reason why it would not.

What the public evaluation of LUMIR25 (JHU-MedImage-Reg/LUMIR25_L2R25, LUMIR25_Evalution_GC/evaluation.py) does:

* A pair's field is ``disp_<fixed>_<moving>.nii.gz`` (subjects) where both images have one modality and where the fixed
  one is 0000 and the moving one 0001: so for T1-T1 and for LUMIR's T1-T2 pairs, and no other name is looked for. Only
  for the remaining combinations it is ``disp_<fixed>_<modality>_<moving>_<modality>.nii.gz``. That of LUMIR24
  (JHU-MedImage-Reg/LUMIR_L2R) names alike, and also took ``.npz``.
* One missing field, or one whose shape is not the config's ``expected_shape`` ``(X, Y, Z, 3)``, ends the evaluation of
  all. Values may have any type; the task's guidelines ask for full precision.
* Fields are read from the top of the input folder. The guidelines show them inside one folder of the zip; the platform
  takes parent folders away that all files share. At the top of the zip they are right with and without that.
"""

import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sitreg_lumir.challenge.predictions import EXACT, map_path, of_map, options_of
from sitreg_lumir.challenge.provenance import (
    FoundField,
    Provenance,
    compare,
    find_field,
    provenance_path,
    shared_names,
    short_text,
)
from sitreg_lumir.data.images import Pair
from sitreg_lumir.data.lumir import LumirDataset
from sitreg_lumir.errors import InputError, printable
from sitreg_lumir.io.atomic import check_folder_is_writable, temporary_folder_beside, writing
from sitreg_lumir.io.maps import read_map
from sitreg_lumir.io.read import load_disp, read_volume
from sitreg_lumir.io.write import save_disp
from sitreg_lumir.metrics import ndv

_SHARED = ("members", "options", "version")  # what the provenances of one submission have in common
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can hold: equal fields give equal bytes


@dataclass
class _Checked:
    """What is known of a folder: a field and its NDV (percent) per pair, reasons against it, and remarks."""

    fields: dict[Pair, Path] = field(default_factory=dict)
    ndv: dict[Pair, float] = field(default_factory=dict)
    provenances: dict[str, Provenance | None] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def submission_name(pair: Pair) -> str:
    """The file name under which the official evaluation looks for a pair's field."""
    short = pair.fixed.modality == pair.moving.modality or (pair.fixed.modality, pair.moving.modality) == (
        "0000",
        "0001",
    )
    return f"disp_{pair.name if short else pair.long_name}.nii.gz"


def submit(folder: Path, dataset: LumirDataset, out: Path, *, exact: bool = False) -> dict[Pair, float]:
    """Checks the field of each validation pair and writes the zip; prints NDV and size.

    Args:
        folder: with ``disp_<pair>.nii.gz`` files, under LUMIR's names or under those that ``predict`` gave them.
        dataset: the pairs. Its images need not be there: then the fields are taken to be made from them by their
            names, and NDV counts all voxels instead of the fixed image's foreground.
        out: ends in ``.zip``; replaced if it exists, and only by a whole zip.
        exact: take samples of the exact maps: fields of `predict --exact`, or of maps of `predict --save-maps`.

    Returns:
        NDV of each pair, percent.

    Raises:
        InputError: the folder is refused, every reason having been printed; or the zip cannot be written.
    """
    if out.suffix != ".zip":
        raise InputError(f"{out}: the name of a submission must end in .zip")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the one that `predict -o` wrote to")
    check_folder_is_writable(out.absolute().parent)
    with ExitStack() as files:
        sampled = files.enter_context(temporary_folder_beside(out)) if exact else None
        checked = _check(folder, dataset, sampled)
        if checked.reasons:
            for reason in checked.reasons:
                print(f"refused: {printable(reason)}", file=sys.stderr)
            number = f"{len(checked.reasons)} reasons" if len(checked.reasons) > 1 else "the reason"
            raise InputError(f"{folder}: not fit for submission, {number} above; fix or predict what is named there")
        _write_zip(out, {submission_name(pair): path for pair, path in checked.fields.items()})
    worst = max(checked.ndv, key=lambda pair: checked.ndv[pair])
    print(f"{out}: {len(checked.fields)} fields, {_size(out.stat().st_size)}")
    print(f"NDV: mean {np.mean(list(checked.ndv.values())):.4f} %, largest {checked.ndv[worst]:.4f} % ({worst.name})")
    for note in checked.notes:
        print(f"note: {note}")
    return checked.ndv


def _check(folder: Path, dataset: LumirDataset, sampled: Path | None) -> _Checked:
    """Looks at every pair, whatever is found on the way."""
    pairs = dataset.validation
    checked = _Checked()
    images = {image.path for pair in pairs for image in (pair.fixed, pair.moving)}
    absent = {path for path in images if not path.is_file()}
    masked = not any(pair.fixed.path in absent for pair in pairs)
    if absent:
        checked.notes.append(
            f"{len(absent)} of {len(images)} images are not in {dataset.root}: that the fields belong to them rests on "
            "file names alone"
        )
    checked.notes.append(f"NDV is in percent of {'the fixed foreground' if masked else 'all voxels, not of the brain'}")
    names = Counter(map(submission_name, pairs))
    checked.reasons += [
        f"{name}: {count} pairs of {dataset.path.name} want this one name; submit them apart"
        for name, count in names.items()
        if count > 1
    ]
    shared = shared_names(pairs)
    for pair in tqdm(pairs, desc="checking", unit="field", disable=None):
        try:
            path, provenance = _field_of(folder, pair, absent, shared=pair.name in shared)
            if sampled is not None:
                path, provenance = _exact_field(path, provenance, sampled)
            disp, _ = load_disp(path, shape=dataset.shape, plain=True)
            mask = read_volume(pair.fixed.path, shape=dataset.shape)[0] > 0 if masked else None
        except InputError as error:
            checked.reasons.append(str(error))
            continue
        checked.fields[pair] = path
        checked.provenances[path.name] = provenance
        checked.ndv[pair] = ndv(disp, mask)
    _compare_provenances(checked)
    extra = sorted(path.name for path in folder.glob("disp_*.nii.gz") if path.name not in checked.provenances)
    if extra and not checked.reasons:
        some = ", ".join(extra[:5]) + (", ..." if len(extra) > 5 else "")
        checked.notes.append(f"{len(extra)} fields in {folder} belong to no pair and are left out: {some}")
    return checked


def _field_of(folder: Path, pair: Pair, absent: set[Path], *, shared: bool) -> FoundField:
    """A pair's field and what it was made from; one that is missing or another pair's raises InputError."""
    field = find_field(folder, pair, shared=shared, absent=absent)
    if field is None:
        swapped = folder / f"disp_{pair.moving.subject}_{pair.fixed.subject}.nii.gz"
        hint = f" ({swapped.name} is there: the fixed image comes first)" if swapped.is_file() else ""
        raise InputError(f"{folder / submission_name(pair)}: missing{hint}; predict this pair")
    return field


def _exact_field(path: Path, provenance: Provenance | None, sampled: Path) -> FoundField:
    """A field that is sampled from an exact map: that at ``path``, or of the map beside it, put into ``sampled``."""
    if options_of(provenance).get(EXACT):
        return FoundField(path, provenance)
    file = map_path(path)
    if provenance is None or not file.is_file():
        raise InputError(f"{path}: has no {file.name} beside it; predict it again with --save-maps, or with --exact")
    saved = read_map(file)
    if saved.made_from is None or compare(saved.made_from, of_map(provenance)):
        raise InputError(f"{file}: was not made from what {path.name} was made from; predict it again with --save-maps")
    save_disp(sampled / path.name, saved.forward.disp, saved.forward.model_affine)
    options = {**options_of(provenance), EXACT: True}
    return FoundField(sampled / path.name, {**provenance, "options": options})


def _compare_provenances(checked: _Checked) -> None:
    """Reasons against fields that were made otherwise than most."""
    made = {name: {key: stored.get(key) for key in _SHARED} for name, stored in checked.provenances.items() if stored}
    unknown = [name for name, stored in checked.provenances.items() if stored is None]
    if not made:
        if unknown:
            checked.notes.append("the fields have no provenance: what they were made from is taken on trust")
        return
    checked.reasons += [
        f"{name}: has no {provenance_path(Path(name)).name} beside it as the others have; predict it again"
        for name in unknown
    ]
    usual = _most_frequent(made.values())
    for name, stored in made.items():
        differences = compare(stored, usual)
        if differences:
            what = ", ".join(
                f"{entry} is {short_text(own)}, {short_text(elsewhere)} in most"
                for entry, own, elsewhere in differences[:3]
            )
            checked.reasons.append(f"{name}: was made otherwise than the other fields: {what}; predict it again")
    members = usual["members"]
    count = len(members) if isinstance(members, list) else 0
    made_how = ", sampled from exact maps" if options_of(dict(usual)).get(EXACT) else ""
    checked.notes.append(
        f"made by {count} member{'s' if count != 1 else ''}, sitreg-lumir {usual['version']}{made_how}"
    )


def _most_frequent(values: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """One of the largest group of equal provenances, the first such group."""
    groups: list[list[Mapping[str, Any]]] = []
    for value in values:
        group = next((group for group in groups if not compare(group[0], value)), None)
        if group is None:
            groups.append([value])
        else:
            group.append(value)
    return max(groups, key=len)[0]


def _write_zip(out: Path, files: Mapping[str, Path]) -> None:
    """Stores files under the given names; equal files give equal bytes."""
    with writing(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name in tqdm(sorted(files), desc="writing", unit="field", disable=None):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            entry.file_size = files[name].stat().st_size
            with files[name].open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
