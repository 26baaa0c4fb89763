"""A folder of T1 scans -> a data set in LUMIR's layout, which `fit` trains on."""

import json
import logging
import shlex
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sitreg_lumir import __version__
from sitreg_lumir.challenge.provenance import compare, in_words
from sitreg_lumir.errors import InputError, RunStoppedError
from sitreg_lumir.geometry.resampling import resample_labels
from sitreg_lumir.io.atomic import check_folder_is_writable, writing
from sitreg_lumir.io.bounded import recorded_checksums
from sitreg_lumir.io.checksum import file_entry
from sitreg_lumir.io.json_file import read_json
from sitreg_lumir.io.lock import locked
from sitreg_lumir.io.read import read_image
from sitreg_lumir.io.table import write_table
from sitreg_lumir.io.write import save_volume
from sitreg_lumir.preprocessing.dataset_split import ListedVolume, draw_validation, write_listing
from sitreg_lumir.preprocessing.find_scans import RawScan, find_scans
from sitreg_lumir.preprocessing.intensity import inverse
from sitreg_lumir.preprocessing.preprocess import MASK, RAW_MASK, TRANSFORM, Prepared, VolumeFiles, prepare_volume
from sitreg_lumir.preprocessing.strip import HeadStrip, check_strip
from sitreg_lumir.preprocessing.template import SPACINGS, lumir_grid
from sitreg_lumir.workers import WorkerDied, share_out

LISTING = "LUMIR_dataset.json"
TABLE = "scans.csv"
IMAGES, LABELS, MADE = "images", "labels", "made"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetOptions:
    """How scans are prepared; see :func:`make_dataset`."""

    strip: HeadStrip | None = None
    bias_correction: bool = True
    spacing: float = 1.0
    header: str | None = None
    assume_orientation: str | None = None

    def __post_init__(self) -> None:
        if self.spacing not in SPACINGS:
            raise InputError(f"`spacing` must be 1, 2 or 4 mm, got {self.spacing:g}")
        check_strip(self.strip)


@dataclass(frozen=True)
class MadeDataset:
    """What :func:`make_dataset` made.

    Attributes:
        rows: a row of ``scans.csv`` for each scan.
        training: volumes that are trained on.
        validation: pairs that are validated on.
    """

    rows: list[dict[str, str]]
    training: int
    validation: int

    @property
    def failed(self) -> list[dict[str, str]]:
        """The rows of scans that could not be prepared."""
        return [row for row in self.rows if row["error"]]


def make_dataset(
    source: str | Path,
    out: str | Path,
    *,
    options: DatasetOptions | None = None,
    labels: str | Path | None = None,
    validation: int | None = None,
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
) -> MadeDataset:
    """Prepares all scans as :func:`~sitreg_lumir.preprocessing.preprocess.preprocess` does, and lists them.

    Scans that show the brain alone are recognised; heads need ``options.strip`` or a mask. A scan that was prepared
    from the same file with the same options is left as it is. One that cannot be prepared is reported, and the others
    go on.

    Args:
        source: folder, BIDS tree or table; see :func:`~sitreg_lumir.preprocessing.find_scans.find_scans`.
        out: folder of the data set.
        options: how scans are prepared.
        labels: folder of label maps, which are brought onto the volumes' grid.
        validation: subjects that are validated on and not trained on: each is registered onto the next of them, a
            pair for each; by default a tenth of them, 2 to 12. All scans of a subject are on one side.
        seed: draws the subjects that are validated on. Who is drawn hardly changes when scans are added.
        workers: processes that share the scans.
        overwrite: prepare scans again that were prepared otherwise.

    Raises:
        InputError: there is no scan, none could be prepared, an option is out of range, scans were prepared otherwise,
            or the folder cannot be written.
    """
    source, out = Path(source), Path(out)
    options = options or DatasetOptions()
    if workers < 1 or seed < 0 or (validation is not None and validation < 0):
        raise InputError(
            f"`workers` must be 1 or more, `seed` and `validation` 0 or more, got {workers}, {seed}, {validation}"
        )
    listing = find_scans(source, labels=None if labels is None else Path(labels), without=out)
    for reason, count in listing.left_out.items():
        _log.info("left out: %d volumes %s", count, reason)
    subjects = sorted({scan.subject for scan in listing.scans})
    validated = draw_validation(subjects, validation, seed, str(source))
    if not overwrite:
        _refuse_others(listing.scans, out, options)
    check_folder_is_writable(out / MADE)
    with locked(out / ".dataset.lock", busy=f"{out}: another process is making this data set; wait until it has ended"):
        rows = _prepare_all(listing.scans, _Settings(out, options), workers)
        for scan, row in zip(listing.scans, rows, strict=True):
            row["split"] = "" if row["error"] else "validation" if scan.subject in validated else "training"
        write_table(out / TABLE, rows)
        listed = [
            ListedVolume(f"./{_files(out, scan).volume.relative_to(out).as_posix()}", scan.subject, row["split"])
            for scan, row in zip(listing.scans, rows, strict=True)
            if row["split"]
        ]
        if not listed:
            raise InputError(f"{rows[0]['error']} ({len(rows)} of {len(rows)} scans failed)")
        pairs = write_listing(out / LISTING, listed, lumir_grid(options.spacing)[0], seed)
    return MadeDataset(rows, sum(volume.split == "training" for volume in listed), pairs)


@dataclass(frozen=True)
class _Settings:
    out: Path
    options: DatasetOptions


def _prepare_all(scans: Sequence[RawScan], settings: _Settings, workers: int) -> list[dict[str, str]]:
    """A row for each scan, in order."""
    rows: dict[int, dict[str, str]] = {}
    for place, result in share_out(_start, settings, scans, workers):
        scan = scans[place]
        row = _row(scan, "", result.reason) if isinstance(result, WorkerDied) else result
        rows[place] = row
        how = row["error"] or ("as before" if row["made"] == "before" else row["remarks"])
        _log.log(
            logging.ERROR if row["error"] else logging.INFO, "%d of %d: %s: %s", len(rows), len(scans), scan.name, how
        )
    return [rows[place] for place in range(len(scans))]


def _start(settings: _Settings) -> Callable[[RawScan], dict[str, str]]:
    return lambda scan: _prepare(scan, settings)


def _prepare(scan: RawScan, settings: _Settings) -> dict[str, str]:
    """Prepares a scan unless that is done; its row of the table."""
    files = _files(settings.out, scan)
    try:
        if _stored(settings.out, scan) is not None and not _differs(scan, settings.out, settings.options):
            return _row(scan, "before", "", has_labels=_labels_path(settings.out, scan).is_file())
        prepared, remarks = _make(scan, files, settings)
    except InputError as problem:
        return _row(scan, "", " ".join(str(problem).split()))
    except RunStoppedError:
        raise
    except Exception as problem:  # no scan may take the others with it
        _log.debug("%s", traceback.format_exc())
        return _row(scan, "", f"{scan.image}: unexpected {type(problem).__name__}: {' '.join(str(problem).split())}")
    remarks = f"brain of {prepared.litres:.2f} litres ({prepared.source}); {prepared.bias}{remarks}"
    return _row(scan, "now", "", remarks, _labels_path(settings.out, scan).is_file())


def _make(scan: RawScan, files: VolumeFiles, settings: _Settings) -> tuple[Prepared, str]:
    """Makes the volume of a scan and all that belongs to it; the entry that says that it is complete comes last."""
    options = settings.options
    entry, labels = _entry_path(settings.out, scan), _labels_path(settings.out, scan)
    with recorded_checksums() as read:
        prepared = prepare_volume(
            scan.image,
            mask=scan.mask,
            strip=options.strip or "none",
            bias_correction=options.bias_correction,
            header=options.header,
            assume_orientation=options.assume_orientation,
            spacing=options.spacing,
            keep_brains=True,
        )
        remarks = ""
        moved = None
        if scan.labels is not None:
            stored = read_image(scan.labels, options.header, options.assume_orientation, allow_constant=True)
            if stored.data.dtype.kind == "f" and not np.array_equal(stored.data, np.rint(stored.data)):
                raise InputError(f"{scan.labels}: holds no whole numbers, so it is no label map; name another one")
            to_scan = inverse(prepared.alignment.prealign)
            shape = prepared.volume.shape
            moved = resample_labels(stored.data, stored.affine, to_scan, shape, prepared.affine)
        elif scan.ambiguous:
            remarks = f"; labels left out, several maps may be meant: {', '.join(scan.ambiguous[:4])}"
    entry.unlink(missing_ok=True)
    prepared.write(files)
    if moved is None:
        labels.unlink(missing_ok=True)
    else:
        save_volume(labels, moved.astype(_label_type(moved)), prepared.affine)
    content: dict[str, Any] = {
        "made_from": _made_from(scan, options, read, prepared.stripped_by),
        "subject": scan.subject,
        "remarks": remarks,
    }
    content |= {"moved_mm": prepared.alignment.moved_mm, "mutual_information": prepared.alignment.mi_after}
    content |= {"stripped_by": prepared.stripped_by, "litres": prepared.litres}
    with writing(entry) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return prepared, remarks


def _label_type(labels: Any) -> type:
    return np.uint16 if labels.min() >= 0 and labels.max() < 2**16 else np.int32


def _made_from(
    scan: RawScan, options: DatasetOptions, read: dict[str, str] | None = None, stripped_by: str | None = None
) -> dict[str, Any]:
    """What a volume is made from; equal entries mean equal volumes."""
    files = {"image": scan.image, "mask": scan.mask, "labels": scan.labels}
    return {
        "files": {name: file_entry(file, read) for name, file in files.items() if file is not None},
        "options": asdict(options) | {"strip": stripped_by},
        "version": __version__,
    }


def _stored(out: Path, scan: RawScan) -> dict[str, Any] | None:
    """What a prepared volume was made from; None if there is none, or if it is not whole."""
    with suppress(InputError, KeyError):
        stored = read_json(_entry_path(out, scan), "what a volume was made from", "")["made_from"]
        if isinstance(stored, dict) and isinstance(stored.get("options"), dict) and _files(out, scan).volume.is_file():
            return stored
    return None


def _differs(scan: RawScan, out: Path, options: DatasetOptions) -> str:
    """In what a prepared volume differs from what is wanted; empty if in nothing, or if there is none."""
    stored = _stored(out, scan)
    if stored is None:
        return ""
    try:
        wanted = _made_from(scan, options, stripped_by=options.strip)
    except InputError:
        return ""  # the scan is gone: the volume is of when it was there
    differences = compare(stored, wanted)
    if stored["options"].get("strip") is None:  # a brain alone, or a mask: stripping changes nothing
        differences = [difference for difference in differences if difference.entry != "options.strip"]
    return in_words(differences)


def _refuse_others(scans: Sequence[RawScan], out: Path, options: DatasetOptions) -> None:
    refused = [(scan, differs) for scan in scans if (differs := _differs(scan, out, options))]
    if refused:
        scan, differs = refused[0]
        more = f" (and {len(refused) - 1} more scans)" if len(refused) > 1 else ""
        raise InputError(
            f"{_files(out, scan).volume}: was prepared otherwise: {differs}{more}; add `overwrite=True` to prepare "
            "what differs again, or name another folder"
        )


def _row(scan: RawScan, made: str, error: str, remarks: str = "", has_labels: bool = False) -> dict[str, str]:
    labels = "yes" if has_labels else "several" if scan.ambiguous else ""
    return {
        "name": scan.name,
        "subject": scan.subject,
        "scan": scan.image.name,
        "split": "",
        "made": made,
        "labels": labels,
        "remarks": remarks,
        "error": error,
    }


def next_command(out: Path, spacing: float) -> str:
    """The command that trains on a data set, by a config that suits its voxels and this machine."""
    import torch

    config = "mind" if spacing == 1 else "minilumir/mind_full"
    if not torch.cuda.is_available() and spacing > 1:
        config = "minilumir/mind_small"
    return f"sitreg-lumir fit --config {config} --data {shlex.quote(str(out))}"


def _stem(scan: RawScan) -> str:
    return f"T1_{scan.name}_0000"


def _files(out: Path, scan: RawScan) -> VolumeFiles:
    made = out / MADE
    stem = _stem(scan)
    return VolumeFiles(
        out / IMAGES / f"{stem}.nii.gz", *(made / (stem + ending) for ending in (MASK, RAW_MASK, TRANSFORM))
    )


def _labels_path(out: Path, scan: RawScan) -> Path:
    return out / LABELS / f"{_stem(scan)}.nii.gz"


def _entry_path(out: Path, scan: RawScan) -> Path:
    return out / MADE / f"{_stem(scan)}.json"
