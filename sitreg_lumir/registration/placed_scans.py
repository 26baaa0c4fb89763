"""Scans that several pairs share, read and aligned once: kept by their content, in memory and on disk."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from zipfile import BadZipFile

import numpy as np

from sitreg_lumir import __version__
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.bounded import record_checksums, recorded_checksums
from sitreg_lumir.io.checksum import sha256_file
from sitreg_lumir.io.json_file import read_json
from sitreg_lumir.io.lock import locked
from sitreg_lumir.preprocessing.align import Alignment
from sitreg_lumir.preprocessing.intensity import Mask
from sitreg_lumir.preprocessing.template import TEMPLATE_FILE
from sitreg_lumir.registration.scan import BUILT_IN, Align, PlacedScan, ScanFiles, place_scan


@dataclass(frozen=True)
class _Last:
    """A scan that was placed, the key of its content, and the SHA-256 of its files, as they were read."""

    key: str
    placed: PlacedScan
    read: dict[str, str]


class PlacedScans:
    """Places the scans of many pairs.

    In memory the last fixed and the last moving scan are kept. In the folder are the brains that were stripped and the
    alignments of scans that several pairs share, for the other processes and the next start; processes that need the
    same scan wait for the first of them. What is kept was computed from the same bytes with the same options, so that
    results do not depend on it.

    Args:
        folder: for what is kept on disk; None keeps nothing there.
        shared: files of images that several pairs share; None for all.
    """

    def __init__(self, folder: Path | None = None, shared: Collection[str] | None = None) -> None:
        self.folder = folder
        self.shared = shared
        self._last: dict[str, _Last] = {}
        self._lock = Lock()

    def place(self, files: ScanFiles, align: Align, header: str | None, assume_orientation: str | None) -> PlacedScan:
        """Does what :func:`~sitreg_lumir.registration.scan.place_scan` does, with the same arguments.

        Raises:
            InputError: as ``place_scan``.
        """
        checksums = _checksums(files)
        key = _key(files, checksums, align, header, assume_orientation)
        with self._lock:
            last = self._last.get(files.role)
        if last is not None and last.key == key:
            record_checksums(last.read)
            return last.placed
        keeps = self.folder is not None and (self.shared is None or str(files.image) in self.shared)
        kept = KeptOnDisk(self.folder, key) if keeps and self.folder is not None else None
        with recorded_checksums() as read:
            placed = place_scan(files, align, header, assume_orientation, kept)
        if any(read.get(path, checksum) != checksum for path, checksum in checksums.items()):  # replaced meanwhile
            if kept is not None:
                kept.forget()
            return place_scan(files, align, header, assume_orientation)
        with self._lock:
            self._last[files.role] = _Last(key, placed, read)
        return placed


class KeptOnDisk:
    """What takes long of placing one scan, computed by one process and read by the others.

    Args:
        folder: made if need be.
        key: of the scan's content and options.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key

    def brain(self, compute: Callable[[], tuple[Mask, str | None]]) -> tuple[Mask, str | None]:
        """A stripped head's brain, and what stripped it."""
        with self._one_at_a_time("brain"):
            path = self._brain
            with suppress(
                OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error
            ):  # missing, or damaged: computed again
                with np.load(path, allow_pickle=False) as stored:
                    shape, by = tuple(map(int, stored["shape"])), str(stored["by"])
                    brain = np.unpackbits(stored["bits"], count=int(np.prod(shape))).reshape(shape)
                return brain.astype(np.bool_), by or None
            computed, by_whom = compute()
            with writing(path) as temporary, temporary.open("wb") as stream:
                np.savez(stream, bits=np.packbits(computed), shape=np.array(computed.shape), by=np.array(by_whom or ""))
            return computed, by_whom

    def alignment(self, compute: Callable[[], Alignment]) -> Alignment:
        """A scan's alignment to the template."""
        with self._one_at_a_time("alignment"):
            path = self._alignment
            with suppress(InputError, ValueError, KeyError, TypeError):  # missing, or damaged: computed again
                stored = read_json(path, "an alignment", "")
                prealign = np.array(stored.pop("prealign"), dtype=np.float64)
                if prealign.shape == (4, 4) and np.isfinite(prealign).all():
                    return Alignment(prealign=prealign, **stored)
            computed = compute()
            values: dict[str, Any] = {**asdict(computed), "prealign": computed.prealign.tolist()}
            values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
            with writing(path) as temporary:
                temporary.write_text(json.dumps(values), encoding="utf-8")  # digits enough for the same float64
            return computed

    def forget(self) -> None:
        """Removes what was computed of a file that changed while it was."""
        for path in (self._brain, self._alignment):
            path.unlink(missing_ok=True)

    @property
    def _brain(self) -> Path:
        return self.folder / f"{self.key}_brain.npz"

    @property
    def _alignment(self) -> Path:
        return self.folder / f"{self.key}_alignment.json"

    @contextmanager
    def _one_at_a_time(self, what: str) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be made ({error.strerror}); choose another folder") from None
        with locked(self.folder / f".{self.key}_{what}.lock", wait=True):
            yield


def _checksums(files: ScanFiles) -> dict[str, str]:
    """SHA-256 of all files of a scan, by absolute paths."""
    paths = [Path(files.image)] if str(files.image) not in BUILT_IN else []
    paths += [path for path in (files.mask, files.lesion, files.to_template) if path is not None]
    return {os.path.abspath(path): sha256_file(path) for path in paths}


def _key(
    files: ScanFiles, checksums: dict[str, str], align: Align, header: str | None, assume_orientation: str | None
) -> str:
    """Says all that a placed scan depends on, as 32 hexadecimal digits."""
    named = {"image": files.image, "mask": files.mask, "lesion": files.lesion, "to_template": files.to_template}
    parts = {
        "name": Path(files.image).name,
        **{name: checksums.get(os.path.abspath(path)) for name, path in named.items() if path is not None},
        "options": [files.strip, align, header, assume_orientation],
        "template": sha256_file(TEMPLATE_FILE),
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
