"""What a field on disk was made from: a JSON beside it, and what follows from it for names and repeated runs.

``disp_X.nii.gz`` has ``disp_X.json``. The JSON holds the field's own SHA-256 and takes its name just before the
field does: a crash leaves a JSON without its field, which is made again, never a field with a wrong JSON.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from sitreg_lumir import __version__
from sitreg_lumir.data.images import Pair
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing_together
from sitreg_lumir.io.checksum import file_entry, sha256_file
from sitreg_lumir.io.json_file import read_json
from sitreg_lumir.io.write import FIELD_LEVEL, write_disp
from sitreg_lumir.network.precision import tf32_is_on

Provenance = dict[str, Any]

FORMAT = 1


class Difference(NamedTuple):
    """One entry in which two provenances disagree; None where it is absent."""

    entry: str
    stored: Any
    wanted: Any

    def __str__(self) -> str:
        return f"{self.entry} is {short_text(self.stored)} there, {short_text(self.wanted)} now"


class PlannedField(NamedTuple):
    """Where a pair's field belongs, and whether it is there already."""

    pair: Pair
    path: Path
    skip: bool


class FoundField(NamedTuple):
    """A pair's field in a folder; ``provenance`` is None for a field that other software made."""

    path: Path
    provenance: Provenance | None


def make_provenance(pair: Pair, members: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> Provenance:
    """The provenance of a pair's field.

    Args:
        pair: fixed and moving image.
        members: :func:`file_entry` of each member's weights.
        options: plain values that change the field.
    """
    return {
        "format": FORMAT,
        "pair": pair.long_name,
        "fixed": file_entry(pair.fixed.path),
        "moving": file_entry(pair.moving.path),
        "members": [dict(member) for member in members],
        "options": dict(options),
        "version": __version__,
    }


def provenance_path(field: Path) -> Path:
    """``disp_X.json`` for ``disp_X.nii.gz``."""
    return field.with_name(field.name.removesuffix(".gz").removesuffix(".nii") + ".json")


def read_provenance(field: Path) -> Provenance | None:
    """The provenance beside a field, None if there is none.

    Raises:
        InputError: the JSON is unreadable or lacks the images.
    """
    path = provenance_path(field)
    try:
        if not path.exists():
            return None
        content = read_json(path, "a provenance", "")
        images = [content[role][key] for role in ("fixed", "moving") for key in ("name", "sha256")]
    except (OSError, ValueError, KeyError, TypeError):
        images, content = [None], {}
    if not all(isinstance(value, str) for value in images):
        raise InputError(f"{path}: not a readable provenance; remove it together with {field.name}")
    return dict(content)


def save_field(
    path: Path,
    disp: NDArray[Any],
    affine: NDArray[Any],
    provenance: Mapping[str, Any],
    *,
    compresslevel: int = FIELD_LEVEL,
) -> None:
    """Writes a field (see :func:`~sitreg_lumir.io.write.save_disp`) and its provenance, in step.

    Args:
        path: ``disp_<pair>.nii.gz``.
        disp: ``(3, X, Y, Z)``, voxels, fixed grid.
        affine: ``(4, 4)`` of the fixed image, RAS, mm.
        provenance: of :func:`make_provenance`; the field's SHA-256 and whether TF32 was on are added.
        compresslevel: of gzip.

    Raises:
        InputError: a file cannot be written.
    """
    with writing_together(provenance_path(path), path) as (sidecar, field):
        write_disp(field, disp, affine, compresslevel=compresslevel)
        described = {"name": path.name, "sha256": sha256_file(field)}
        content = {**provenance, "tf32": tf32_is_on(), "field": described}
        sidecar.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def compare(existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Difference]:
    """In what two provenances differ; names of files do not count, their SHA-256 do.

    Nor do the field itself and ``tf32`` count: what was made before that entry existed is not made again for it.
    """
    stored, now = _flat(existing), _flat(wanted)
    entries = [
        entry
        for entry in {**now, **stored}
        if not entry.endswith(".name") and not entry.startswith("field.") and entry != "tf32"
    ]
    return [
        Difference(entry, stored.get(entry), now.get(entry)) for entry in entries if stored.get(entry) != now.get(entry)
    ]


def in_words(differences: Sequence[Difference]) -> str:
    """The first five differences; empty where there are none."""
    return ", ".join(map(str, differences[:5]))


def plan_fields(
    folder: Path,
    pairs: Sequence[Pair],
    provenance_of: Callable[[Pair], Provenance],
    *,
    overwrite: bool = False,
) -> list[PlannedField]:
    """Decides each pair's file name and whether its field is there already.

    The name is ``disp_<fixed>_<moving>.nii.gz`` (subjects), unless two pairs of the list share it or the field of
    that name in the folder belongs to other images: then ``disp_<fixed>_<modality>_<moving>_<modality>.nii.gz``.

    Args:
        folder: need not exist.
        pairs: to be registered.
        provenance_of: what a pair's field would be made from.
        overwrite: make fields again whose provenance differs, or that have none.

    Raises:
        InputError: without ``overwrite``, a field is there that was made otherwise; it says what differs.
    """
    shared = shared_names(pairs)
    planned, refused = [], []
    for pair in pairs:
        wanted = provenance_of(pair)
        path = _choose_path(folder, pair, wanted, pair.name in shared)
        try:
            reason = _why_not(path, wanted)
        except InputError as error:
            reason = str(error)
        if reason and not overwrite:
            refused.append(reason)
        planned.append(PlannedField(pair, path, skip=path.is_file() and not reason))
    if refused:
        more = f" (and {len(refused) - 1} more fields)" if len(refused) > 1 else ""
        raise InputError(f"{refused[0]}{more}; use --overwrite or another folder")
    return planned


def find_field(folder: Path, pair: Pair, *, shared: bool = False, absent: Collection[Path] = ()) -> FoundField | None:
    """The field of a pair, under its long or its short name; None if there is none.

    Args:
        folder: with ``disp_*.nii.gz`` files.
        pair: the content of its image files is compared with the provenance.
        shared: whether another pair of the list has the same short name, which then alone proves nothing.
        absent: image files that are not there, of which only the names are compared.

    Raises:
        InputError: the only field of that name was made from other images, or its JSON describes another file.
    """
    images = {"fixed": pair.fixed.path, "moving": pair.moving.path}
    refused = None
    for path in (_path(folder, pair.long_name), _path(folder, pair.name)):
        if not path.is_file():
            continue
        stored = read_provenance(path)
        if stored is None:
            if shared and path != _path(folder, pair.long_name):
                refused = f"{path}: does not say which of several pairs of that name it belongs to; give it a long name"
                continue
            return FoundField(path, None)
        foreign = [stored[role]["name"] for role, image in images.items() if not _is_image(stored[role], image, absent)]
        if foreign:
            same_names = all(stored[role]["name"] == image.name for role, image in images.items())
            kind = "another version of its images" if same_names else "another image"
            refused = f"{path}: was made from {kind} ({', '.join(foreign)}); predict the pairs of this data set"
        elif is_described(path, stored):
            return FoundField(path, stored)
        else:
            raise InputError(f"{path}: is not the field that {provenance_path(path).name} describes; predict it again")
    if refused:
        raise InputError(refused)
    return None


def _is_image(entry: Mapping[str, Any], image: Path, absent: Collection[Path]) -> bool:
    """Whether a provenance's entry is an image: by its content, or by its name where the file is not there."""
    return bool(entry["name"] == image.name if image in absent else entry["sha256"] == sha256_file(image))


def shared_names(pairs: Sequence[Pair]) -> set[str]:
    """Short names that several pairs of a list have in common."""
    return {name for name, count in Counter(pair.name for pair in pairs).items() if count > 1}


def _path(folder: Path, name: str) -> Path:
    return folder / f"disp_{name}.nii.gz"


def _choose_path(folder: Path, pair: Pair, wanted: Provenance, shared: bool) -> Path:
    short, long = _path(folder, pair.name), _path(folder, pair.long_name)
    try:
        stored = read_provenance(short)
    except InputError:
        stored = None
    if stored is not None:
        return short if _same_pair(stored, wanted) else long
    taken = long.is_file() or provenance_path(long).is_file()
    return long if shared or (taken and not short.is_file()) else short


def _same_pair(stored: Provenance, wanted: Provenance) -> bool:
    """By name, not by content: a changed image of the same name is still this pair's."""
    return all(stored[role]["name"] == wanted[role]["name"] for role in ("fixed", "moving"))


def _why_not(path: Path, wanted: Provenance) -> str | None:
    """Why an existing field cannot stand for the wanted one; None if it can, or if there is none."""
    if not path.is_file():
        return None
    stored = read_provenance(path)
    if stored is None:
        return f"{path}: is there without {provenance_path(path).name}, so what it was made from is unknown"
    differences = compare(stored, wanted)
    if differences:
        return f"{path}: was made otherwise: {in_words(differences)}"
    if not is_described(path, stored):
        return f"{path}: is not the field that {provenance_path(path).name} describes"
    return None


def is_described(path: Path, stored: Provenance) -> bool:
    """Whether a provenance was written for the very file that lies at ``path``."""
    field = stored.get("field")
    return isinstance(field, dict) and field.get("sha256") == sha256_file(path)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping ``a.b.0 -> plain value``."""
    if isinstance(value, Mapping):
        items = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), entry) for index, entry in enumerate(value)]
    else:
        return {prefix.removesuffix("."): value}
    return {key: entry for name, child in items for key, entry in _flat(child, f"{prefix}{name}.").items()}


def short_text(value: Any) -> str:
    """A value in at most 24 letters; ``absent`` for None."""
    text = "absent" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}.."
