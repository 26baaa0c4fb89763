"""One memory-mapped file that holds all volumes of a data set, shared by all workers and processes."""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sitreg_lumir.data.lumir import raise_problems
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.json_file import read_json
from sitreg_lumir.io.lock import locked
from sitreg_lumir.io.read import read_volume
from sitreg_lumir.io.volume_files import volume_files

_VERSION = 1
_REMEDY = "choose a folder with --data.cache"
_SHOW_PROGRESS_FROM = 20
_LARGE = 10 * 10**9  # bytes of a cache that is not filled without a word
_DTYPES = (np.dtype(np.uint8).str, np.dtype(np.float32).str)
_AT_ONCE = 16  # volumes read between two writes of the index: what an interruption loses at most


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/sitreg_lumir``, by default ``~/.cache/sitreg_lumir``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sitreg_lumir"


class VolumeCache:
    """The stored intensities of a list of images, read once from NIfTI and then from a raw file.

    ``<key>-<number>.raw`` holds the volumes one after the other, uint8 where all values are integers 0..255,
    else float32; ``<key>.json`` says where each is and which size and modification time its file had.
    The key stands for the list of paths and the shape. ``build`` in one process, then ``open`` and ``read``
    in any.

    Args:
        paths: the images.
        shape: their common grid, ``(X, Y, Z)``.
        folder: where the two files live; made if need be.
    """

    def __init__(self, paths: Sequence[Path], shape: tuple[int, ...], folder: Path) -> None:
        self.paths = list(dict.fromkeys(paths))
        self.shape = tuple(shape)
        self.folder = folder
        text = "\n".join([str(_VERSION), str(self.shape), *map(str, self.paths)])
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.raw = folder / f"{self.key}-0.raw"
        self.index = folder / f"{self.key}.json"
        self._volumes: dict[str, dict[str, Any]] = {}
        self._map: np.memmap[Any, np.dtype[np.uint8]] | None = None

    def build(self) -> None:
        """Reads what is not in the cache yet or was changed since, with a progress bar if it takes long.

        An interrupted call is continued by the next one, and of two processes the second waits for the first.

        Raises:
            InputError: volumes cannot be used (all are named), the disk is full, or the folder cannot be
                written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / f".{self.key}.lock", wait=True, remedy=_REMEDY):
                self._fill()
        except OSError as error:
            raise InputError(f"{self.folder}: the cache cannot be written ({error}); {_REMEDY}") from None

    def open(self) -> None:
        """Reads the index that ``build`` wrote, in this process or another.

        Raises:
            InputError: a volume is not in the cache.
        """
        self._volumes = self._stored()
        missing = [str(path) for path in self.paths if str(path) not in self._volumes]
        raise_problems(self.index, [f"{path} is not in the cache, start again to build it" for path in missing])

    def read(self, path: Path) -> NDArray[np.uint8] | NDArray[np.float32]:
        """A copy of one volume, ``(X, Y, Z)``, stored intensities."""
        entry = self._volumes[str(path)]
        if self._map is None:
            try:
                self._map = np.memmap(self.raw, dtype=np.uint8, mode="r")
            except FileNotFoundError:
                raise InputError(f"{self.raw}: the cache was made again by another run; start again") from None
        end = entry["offset"] + self._bytes(entry["dtype"])
        stored = self._map[entry["offset"] : end]
        checksum = entry.get("crc32")  # caches of earlier versions have none
        if len(stored) < end - entry["offset"] or checksum not in (None, zlib.crc32(stored.tobytes())):
            reason = f"damaged, {path.name} is read from its own file; the next run caches it"
            warnings.warn(f"{self.raw}: {reason}", stacklevel=2)
            self._drop(path)
            return read_volume(path, shape=self.shape)[0]
        volume: NDArray[Any] = stored.view(entry["dtype"]).reshape(self.shape)
        return np.array(volume)

    def _drop(self, path: Path) -> None:
        """Takes a damaged volume out of the index, so that the next :meth:`build` reads it again."""
        with suppress(OSError, InputError):
            content = read_json(self.index, "the index of a cache", "")
            if content.get("volumes", {}).pop(str(path), None) is not None:
                with writing(self.index, remedy=_REMEDY) as index:
                    index.write_text(json.dumps(content))

    def affine(self, path: Path) -> NDArray[np.float64]:
        """The ``(4, 4)`` voxel-to-world matrix of one image, RAS, mm."""
        return np.array(self._volumes[str(path)]["affine"], dtype=np.float64)

    def __getstate__(self) -> dict[str, Any]:
        """Without the map: each process opens its own."""
        return {**self.__dict__, "_map": None}

    def _bytes(self, dtype: str) -> int:
        return int(np.prod(self.shape)) * np.dtype(dtype).itemsize

    def _stored(self) -> dict[str, dict[str, Any]]:
        """The index on disk, without what the raw file does not reach to; sets the name of the raw file."""
        try:
            content = read_json(self.index, "the index of a cache", "")
            name, volumes = content["raw"], content["volumes"]
            if not re.fullmatch(rf"{self.key}-\d{{1,20}}\.raw", name) or not isinstance(volumes, dict):
                return {}
            self.raw = self.folder / name
            size = self.raw.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # missing or damaged: made again
        return {path: entry for path, entry in volumes.items() if self._is_entry(entry, size)}

    def _is_entry(self, entry: Any, size: int) -> bool:
        """Whether a value is an index entry of a volume that the raw file, of so many bytes, reaches to."""
        if not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES or type(entry.get("offset")) is not int:
            return False
        if not 0 <= entry["offset"] <= size - self._bytes(entry["dtype"]):
            return False
        stamp, checksum = entry.get("made_from"), entry.get("crc32")
        if not isinstance(stamp, list) or not (checksum is None or type(checksum) is int):
            return False
        try:
            affine = np.array(entry.get("affine"), dtype=np.float64)
        except (TypeError, ValueError):
            return False
        return affine.shape == (4, 4) and bool(np.isfinite(affine).all())

    def _fill(self) -> None:
        self._map = None
        stored = self._stored()
        volumes = {
            str(path): stored[str(path)]
            for path in self.paths
            if str(path) in stored and stored[str(path)]["made_from"] == _made_from(path)
        }
        todo = [path for path in self.paths if str(path) not in volumes]
        if not todo:
            return
        if not volumes:  # all is new: another file, so that nobody who reads the old one sees other content
            self.raw.unlink(missing_ok=True)
            self.raw = self.folder / f"{self.key}-{time.time_ns()}.raw"
        problems: list[str] = []
        warned = False
        with (
            open(self.raw, "ab") as raw,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            tqdm(total=len(todo), desc="caching volumes", disable=len(todo) <= _SHOW_PROGRESS_FROM) as progress,
        ):
            raw.seek(0, os.SEEK_END)  # what was replaced stays, since other processes may read it
            for start in range(0, len(todo), _AT_ONCE):
                chunk = todo[start : start + _AT_ONCE]
                results = list(pool.map(self._try, chunk))
                sizes = [result[0].nbytes for result in results if not isinstance(result, str)]
                if sizes:  # that of the volumes to come is not known before they are read
                    warned = self._check_room(math.ceil(sum(sizes) / len(sizes) * (len(todo) - start)), raw, warned)
                for path, result in zip(chunk, results, strict=True):
                    if isinstance(result, str):
                        problems.append(result)
                    else:
                        volumes[str(path)] = self._append(raw, result)
                    progress.update()
                raw.flush()
                os.fsync(raw.fileno())
                with writing(self.index, remedy=_REMEDY) as index:
                    index.write_text(json.dumps({"raw": self.raw.name, "volumes": volumes}))
        raise_problems(os.path.commonpath(self.paths), problems)

    def _try(self, path: Path) -> tuple[NDArray[Any], NDArray[np.float64], list[int]] | str:
        """Volume, affine and stamp of a file, or what is wrong with it."""
        try:
            stamp = _made_from(path)  # before reading: a change meanwhile is noticed next time
            return *read_volume(path, shape=self.shape), stamp
        except InputError as error:
            return str(error)

    def _check_room(self, needed: int, raw: BinaryIO, warned: bool) -> bool:
        """Refuses what the disk has no room for, and says once how much a large cache takes; whether it was said.

        Args:
            needed: bytes of all volumes that are left.
            raw: removed if nothing was written to it yet.
            warned: whether it was said already.

        Raises:
            InputError: the disk has less room.
        """
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            if raw.tell() == 0:
                self.raw.unlink(missing_ok=True)
            raise InputError(
                f"{self.folder}: the cache needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free; make room "
                "or choose another folder with --data.cache (for `container`: the variable TMPDIR)"
            )
        if needed >= _LARGE and not warned:
            tqdm.write(
                f"caching volumes: takes about {needed / 1e9:.0f} GB in {self.folder}, where {free / 1e9:.0f} GB are "
                "free; --data.cache chooses another folder",
                file=sys.stderr,
            )
            return True
        return warned

    def _append(self, raw: BinaryIO, volume: tuple[NDArray[Any], NDArray[np.float64], list[int]]) -> dict[str, Any]:
        """Writes one volume; its index entry."""
        values, affine, stamp = volume
        offset = raw.tell()
        content = values.tobytes()
        raw.write(content)
        entry = {"offset": offset, "dtype": values.dtype.str, "affine": affine.tolist(), "made_from": stamp}
        return entry | {"crc32": zlib.crc32(content)}


def _made_from(path: Path) -> list[int]:
    """Sizes and modification times of a volume's files; changed when one of them is."""
    try:
        stats = [file.stat() for file in volume_files(path)]
    except OSError:
        raise InputError(f"{path}: no such file") from None
    return [value for stat in stats for value in (stat.st_size, stat.st_mtime_ns)]
