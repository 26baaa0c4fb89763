"""The T1 scans of a folder, a BIDS tree or a table, and whose they are."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.other_formats import IMAGE_SUFFIXES, refuse_dicom, without_suffix
from sitreg_lumir.io.table import read_table
from sitreg_lumir.io.volume_files import has_suffix

COLUMNS = ("image", "subject", "mask", "labels")
"""Columns of a table of scans; all but the first may be missing or empty."""
_SUBJECT, _SESSION = re.compile(r"(?:^|[_/])sub-([A-Za-z0-9]+)"), re.compile(r"(?:^|[_/])ses-([A-Za-z0-9]+)")
_BIDS_SUFFIX = re.compile(r"_([A-Za-z0-9]+)$")
_OTHER_CONTRASTS = (
    "T2w",
    "FLAIR",
    "PDw",
    "PDT2",
    "T2star",
    "T2starw",
    "bold",
    "dwi",
    "epi",
    "asl",
    "UNIT1",
    "inplaneT2",
)
_LUMIR = re.compile(r"(?P<prefix>[^_]+)_(?P<subject>[^_]+)_(?P<modality>\d{4})")
_WORDS = r"(?:ses|session|visit|timepoint|time|tp|wave|scan|run|mr|mpr|mprage|t1w|t1|followup|baseline)[-_ ]?\d*"
_VISIT = re.compile(rf"[-_. ]+{_WORDS}$", re.IGNORECASE)  # at the end of a file's name
_NO_SUBJECT = re.compile(rf"{_WORDS}|images?\w*|anat|mri|nii|nifti|raw|\d{{4}}-?\d\d-?\d\d", re.IGNORECASE)  # folders
_MOST_OF_ONE = 12  # scans of one subject
_NO_IMAGE = re.compile(
    r"(?:^|[-_.])(?:mask|brainmask|seg|dseg|probseg|labels?|aseg|aparc|roi|lesions?)$", re.IGNORECASE
)
_LABEL_ENDS = ("_dseg", "_labels", "_label", "_seg", "_aseg", "-labels", "-seg")
_MASK_ENDS = ("_mask", "_brainmask", "_brain_mask", "-mask")
_SKIPPED_FOLDERS = ("derivatives", "sourcedata", "code")  # of a BIDS tree


@dataclass(frozen=True)
class RawScan:
    """A scan that is to be prepared.

    Attributes:
        image: its file.
        subject: who is shown; scans of one subject have one name here.
        name: of the volume to be made, unique: letters, digits and hyphens.
        mask: of its brain, or None.
        labels: its label map, or None.
        ambiguous: names of several label maps of which none was taken.
    """

    image: Path
    subject: str
    name: str
    mask: Path | None = None
    labels: Path | None = None
    ambiguous: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundScans:
    """The scans of a folder, ordered by their names.

    Attributes:
        scans: all of them.
        left_out: files that are volumes but no T1 scans, by reason.
    """

    scans: tuple[RawScan, ...]
    left_out: Counter[str] = field(default_factory=Counter)


def find_scans(source: Path, *, labels: Path | None = None, without: Path | None = None) -> FoundScans:
    """Looks for T1 scans.

    In a BIDS tree these are ``sub-*/[ses-*/]anat/*_T1w.*`` on their own grid, and label maps ``*_dseg.*`` of the same
    entities from ``derivatives/``. In another folder they are all volumes, subfolders included, but those that are
    named as masks, label maps or other contrasts. A subject is named by ``sub-``, by LUMIR's names, by a folder of a
    few scans, or by the file's name without what names a visit. A table (CSV) names images, and if wanted subjects,
    masks and label maps.

    Args:
        source: the folder, or the table.
        labels: folder of label maps, named as the images, if wanted with ``_dseg``, ``_labels`` or ``_seg``.
        without: folder that is not looked at: that of the results.

    Raises:
        InputError: there is no scan, or the table is none.
    """
    if labels is not None and not labels.is_dir():
        raise InputError(f"{labels}: no such folder of label maps; name one with `labels`")
    if source.is_file():
        return _uniquely_named(_of_table(source), Counter())
    if not source.is_dir():
        raise InputError(f"{source}: no such folder or table; name a folder of T1 scans, a BIDS tree, or a CSV")
    bids = any(source.glob("sub-*/anat")) or any(source.glob("sub-*/ses-*/anat"))
    files = sorted(_volumes(source, without, _SKIPPED_FOLDERS if bids else ()))
    left_out: Counter[str] = Counter()
    images = []
    for file in files:
        reason = _no_t1(file, source, bids)
        if reason:
            left_out[reason] += 1
        else:
            images.append(file)
    if not images:
        refuse_dicom(source)
        others = (
            f" (left out: {', '.join(f'{count} {reason}' for reason, count in left_out.items())})" if left_out else ""
        )
        raise InputError(f"{source}: holds no T1 scan{others}; name a folder of {', '.join(IMAGE_SUFFIXES[:2])} files")
    maps = _LabelMaps(source, labels, files, bids)
    masks = _by_stem(files, _MASK_ENDS)
    scans = []
    for image, subject in zip(images, _subjects(images, source), strict=True):
        chosen, ambiguous = maps.of(image)
        mask = masks.get((str(image.parent), without_suffix(image.name)))
        scans.append(RawScan(image, subject, _name(image, source), mask, chosen, ambiguous))
    return _uniquely_named(scans, left_out)


def _volumes(folder: Path, without: Path | None, skipped: Sequence[str] = ()) -> Iterator[Path]:
    """All volumes below a folder, links to files included; of two files of one volume the header."""
    excluded = None if without is None else Path(os.path.realpath(without))
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if not has_suffix(file.name, *IMAGE_SUFFIXES) or any(part.startswith(".") for part in parts):
            continue
        if (
            parts[0] in skipped
            or file.is_dir()
            or (excluded is not None and Path(os.path.realpath(file)).is_relative_to(excluded))
        ):
            continue
        if has_suffix(file.name, ".img", ".img.gz"):
            continue  # its header is the volume
        yield file


def _no_t1(file: Path, source: Path, bids: bool) -> str:
    """Why a volume is no T1 scan, as far as its name says so; empty if it may be one."""
    stem = without_suffix(file.name)
    suffix = _BIDS_SUFFIX.search(stem)
    if _NO_IMAGE.search(stem):
        return "masks or label maps"
    if bids and not (suffix and suffix[1] == "T1w"):
        return "not named *_T1w"
    if suffix and suffix[1] in _OTHER_CONTRASTS:
        return "of other contrasts"
    lumir = _LUMIR.fullmatch(stem)
    if lumir and lumir["modality"] != "0000":
        return "of other contrasts"
    if bids and "_space-" in stem:
        return "on another grid (space-)"
    return ""


def _subjects(images: Sequence[Path], source: Path) -> list[str]:
    """Who each scan shows, as far as names say it."""
    folders = [_folder_of_subject(image, source) for image in images]
    counts = Counter(folders)
    subjects = []
    for image, folder in zip(images, folders, strict=True):
        named = _SUBJECT.search(image.relative_to(source).as_posix())
        stem = without_suffix(image.name)
        lumir = _LUMIR.fullmatch(stem)
        if named or lumir:
            subjects.append(named[1] if named else str(lumir and lumir["subject"]))
        elif folder and len(counts) > 1 and counts[folder] <= _MOST_OF_ONE:
            subjects.append(folder)
        else:
            while (shorter := _VISIT.sub("", stem)) and shorter != stem:
                stem = shorter
            subjects.append(stem)
    return subjects


def _folder_of_subject(image: Path, source: Path) -> str:
    """The folder of a scan without subfolders that are named as visits or kinds of images; empty for the source."""
    parts = list(image.relative_to(source).parts[:-1])
    while parts and _NO_SUBJECT.fullmatch(parts[-1]):
        parts.pop()
    return "/".join(parts)


def _name(image: Path, source: Path) -> str:
    """The scan's own name: of a BIDS file its entities, else the file's with its subfolders."""
    relative = image.relative_to(source)
    stem = without_suffix(image.name)
    named = _SUBJECT.search(relative.as_posix())
    if named:
        session = _SESSION.search(relative.as_posix())
        others = re.findall(r"_(acq|rec|run|echo|desc)-([A-Za-z0-9]+)", stem)
        parts = [named[1], *([f"ses{session[1]}"] if session else []), *(f"{key}{value}" for key, value in others)]
        return "-".join(parts)
    lumir = _LUMIR.fullmatch(stem)
    if lumir:
        return lumir["subject"]
    folders = [part for part in relative.parts[:-1] if not part.lower().startswith("images")]
    return _clean("-".join([*folders, stem]))


def _clean(text: str) -> str:
    """Letters, digits and single hyphens; what else there is becomes a hyphen."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:80] or "scan"


def _uniquely_named(scans: Iterable[RawScan], left_out: Counter[str]) -> FoundScans:
    """The scans with a number after names that are taken."""
    taken: set[str] = set()
    unique = []
    for scan in scans:
        name, number = scan.name, 1
        while name.casefold() in taken:
            number += 1
            name = f"{scan.name}-{number}"
        taken.add(name.casefold())
        unique.append(RawScan(scan.image, scan.subject, name, scan.mask, scan.labels, scan.ambiguous))
    return FoundScans(tuple(unique), left_out)


def _of_table(table: Path) -> list[RawScan]:
    content = read_table(table, "name a folder of T1 scans, or a CSV with a column image")
    columns = [name.lower() for name in content.names]
    unknown = [column for column in columns if column not in COLUMNS]
    if unknown or "image" not in columns or len(set(columns)) < len(columns):
        problem = f"unknown column {unknown[0][:40]!r}" if unknown else "no column image, or one twice"
        raise InputError(f"{table}: {problem}; the header is image and if wanted {','.join(COLUMNS[1:])}")
    rows = []
    for number, cells in content.rows:
        row = dict(zip(columns, (cell.strip() for cell in cells), strict=False))
        if not row.get("image"):
            raise InputError(f"{table}, line {number}: image is empty; name a file")
        rows.append({key: value for key, value in row.items() if value})
    if not rows:
        raise InputError(f"{table}: names no scan; add a line for each")
    images = [table.parent / row["image"] for row in rows]
    absolute = [Path(os.path.abspath(image)) for image in images]
    source = Path(os.path.commonpath([image.parent for image in absolute]))
    scans = []
    for row, image, path, subject in zip(rows, images, absolute, _subjects(absolute, source), strict=True):
        mask, labels = (table.parent / row[key] if key in row else None for key in ("mask", "labels"))
        scans.append(RawScan(image, row.get("subject", subject), _name(path, source), mask, labels))
    return scans


def _by_stem(files: Iterable[Path], ends: Sequence[str]) -> dict[tuple[str, str], Path]:
    """Files that are named as an image with an ending, by the image's folder and name without it."""
    by_name: dict[tuple[str, str], Path] = {}
    for file in files:
        stem = without_suffix(file.name)
        for end in ends:
            if stem.lower().endswith(end):
                bare = stem[: -len(end)]
                for name in (bare, f"{bare}_T1w"):
                    by_name.setdefault((str(file.parent), name), file)
    return by_name


class _LabelMaps:
    """Finds the label map of an image: in a folder of them, in a BIDS tree's derivatives, or beside the image."""

    def __init__(self, source: Path, labels: Path | None, files: Sequence[Path], bids: bool) -> None:
        self.beside = _by_stem(files, _LABEL_ENDS)
        self.maps: dict[str, list[Path]] = {}
        folders = [labels] if labels is not None else sorted(source.glob("derivatives")) if bids else []
        for folder in folders:
            for file in sorted(_volumes(folder, None)):
                stem = without_suffix(file.name)
                is_map = labels is not None or stem.endswith("_dseg")
                if is_map and not any(stem.lower().endswith(end) for end in _MASK_ENDS) and not _elsewhere(stem):
                    self.maps.setdefault(_entities(stem), []).append(file)

    def of(self, image: Path) -> tuple[Path | None, tuple[str, ...]]:
        """The label map, or None; and the names of several that may be meant."""
        stem = without_suffix(image.name)
        candidates = self.maps.get(_entities(stem), [])
        if len(candidates) > 1:
            plain = [file for file in candidates if "_desc-" not in file.name]
            candidates = plain if len(plain) == 1 else candidates
        if len(candidates) > 1:
            return None, tuple(file.name for file in candidates)
        return candidates[0] if candidates else self.beside.get((str(image.parent), stem)), ()


def _elsewhere(stem: str) -> bool:
    """Whether a derivative lies in another world than its scan."""
    space = re.search(r"_space-([A-Za-z0-9]+)", stem)
    return space is not None and space[1] not in ("T1w", "orig", "individual", "native")


def _entities(stem: str) -> str:
    """What a label map and its image have in common in their names."""
    if _SUBJECT.match(stem):
        kept = [
            part for part in stem.split("_") if "-" in part and part.split("-")[0] not in ("desc", "space", "label")
        ]
        return "_".join(kept)
    for end in _LABEL_ENDS:
        if stem.lower().endswith(end):
            return stem[: -len(end)]
    return stem
