"""The door of every file that a user names: what it claims is compared with what it holds before memory is spent on it.

A header of 100 bytes may claim a volume of terabytes, a compressed file may unpack into any size, and a pipe may never
end. So files are opened, measured and unpacked in this module alone.
"""

import gzip
import hashlib
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from sitreg_lumir.errors import InputError

MAX_VOXELS = "SITREG_LUMIR_MAX_VOXELS"
"""Names how many voxels a volume, field or grid may have."""

USUAL_MAX_VOXELS = 30 * 256**3
"""The limit where the variable is not set: thirty heads at 1 mm, 256 x 256 x 256 each."""

DEFLATE_RATIO = 1040
"""Bytes that a byte of gzip or zlib unpacks to at most."""

_VECTOR = 3  # components that do not count as voxels of their own
_PIECE = 1 << 20  # bytes read at once
_SLACK = 1 << 24  # bytes that may follow the voxels of a compressed volume
_checksums: ContextVar[dict[str, str] | None] = ContextVar("checksums", default=None)


def max_voxels() -> int:
    """How many voxels a volume may have, over all of its frames.

    Raises:
        InputError: the variable holds something else than a number from 1 on.
    """
    stated = os.environ.get(MAX_VOXELS, "").strip()
    if not stated:
        return USUAL_MAX_VOXELS
    if not (stated.isascii() and stated.isdigit() and len(stated) < 19 and int(stated) > 0):
        raise InputError(f"{MAX_VOXELS}={stated[:40]!r}: must be a number of voxels, such as {USUAL_MAX_VOXELS}")
    return int(stated)


def check_voxels(path: Path, shape: Sequence[int]) -> int:
    """The number of values of a volume, once it is known to be within the limit.

    Args:
        path: named in errors.
        shape: all axes that a header claims, whatever they mean; three components of a vector count as a voxel.

    Raises:
        InputError: an axis has no voxels, or all together are more than :func:`max_voxels`.
    """
    sizes = [int(size) for size in shape]
    if not sizes or min(sizes) < 1:
        raise InputError(f"{path}: the shape is {tuple(sizes)}, there are no voxels; export it again")
    count = math.prod(sizes)
    vectors = len(sizes) > 3 and sizes[-1] == _VECTOR
    limit = max_voxels()
    if count > limit * (_VECTOR if vectors else 1):
        raise InputError(
            f"{path}: claims {' x '.join(map(str, sizes))} voxels, more than the {limit} that are read; if it really "
            f"has that many, set {MAX_VOXELS} to a larger number"
        )
    return count


def check_regular(path: Path) -> int:
    """The size of a file in bytes; pipes, devices and folders are refused before they are opened.

    Raises:
        OSError: there is no such file, or it cannot be reached.
        InputError: it is something else than a file.
    """
    try:
        state = os.stat(path)
    except ValueError as error:  # a NUL, or letters that no file's name has
        raise InputError(f"{path}: no such file ({error})") from None
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(21, "Is a directory", str(path))
    if not stat.S_ISREG(state.st_mode):
        raise InputError(f"{path}: is no regular file but a pipe or a device; save what it gives to a file first")
    return state.st_size


@contextmanager
def recorded_checksums() -> Iterator[dict[str, str]]:
    """Within the block, files that are read as a whole leave the SHA-256 of the bytes that were read; may be nested.

    Yields:
        SHA-256, 64 hexadecimal digits, by the files' absolute paths.
    """
    record: dict[str, str] = {}
    outer = _checksums.get()
    before = _checksums.set(record)
    try:
        yield record
    finally:
        _checksums.reset(before)
        if outer is not None:
            outer |= record


def checksum_record() -> dict[str, str] | None:
    """What :func:`recorded_checksums` recorded so far; None outside of it."""
    return _checksums.get()


def record_checksum(path: Path, content: bytes) -> None:
    """Notes the SHA-256 of a file of which ``content`` was read, where :func:`recorded_checksums` asks for it."""
    record = _checksums.get()
    if record is not None:
        record[os.path.abspath(path)] = hashlib.sha256(content).hexdigest()


def record_checksums(read: Mapping[str, str]) -> None:
    """Notes what :func:`recorded_checksums` recorded when files were read whose content is used again."""
    record = _checksums.get()
    if record is not None:
        record.update(read)


def record_checksum_of(path: Path) -> None:
    """As :func:`record_checksum`, for a file that another library is about to read."""
    if _checksums.get() is not None:
        with path.open("rb") as raw:
            HashingStream(raw).record(path)


def read_bytes(path: Path, most: int, kind: str) -> bytes:
    """The whole content of a file that is no larger than its kind can be.

    Args:
        path: of the file.
        most: bytes.
        kind: what the file should be, with its article, for errors.

    Raises:
        OSError: the file is missing or unreadable.
        InputError: it is larger, or no regular file.
    """
    size = check_regular(path)
    if size <= most:
        with path.open("rb") as stream:
            content = stream.read(size + 1)
        if len(content) <= size:
            record_checksum(path, content)
            return content
        raise InputError(f"{path}: grows while it is read; wait until it is whole")
    raise InputError(f"{path}: has {size} bytes, {kind} has at most {most}; give another file")


@contextmanager
def unpacking(path: Path) -> Iterator["Unpacked"]:
    """Opens a file, which need not be compressed; pipes, devices and folders are refused before they are opened.

    Raises:
        OSError: there is no such file, or it cannot be reached.
        InputError: it is something else than a file.
    """
    size = check_regular(path)
    with path.open("rb") as raw:
        yield Unpacked(raw, path, size)


class HashingStream:
    """A file that is read from its start to its end, and the SHA-256 of what was read.

    Args:
        stream: open for reading bytes, at its start.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256() if _checksums.get() is not None else None

    def read(self, count: int = -1) -> bytes:
        """As of any stream."""
        content = self._stream.read(count)
        if self._digest is not None:
            self._digest.update(content)
        return content

    def record(self, path: Path) -> None:
        """Reads what is left, and notes the checksum under a path."""
        record = _checksums.get()
        if record is not None and self._digest is not None:
            while self.read(_PIECE):
                pass
            record[os.path.abspath(path)] = self._digest.hexdigest()


class Unpacked:
    """The content of a file, unpacked piece by piece if it is compressed by gzip.

    Args:
        raw: the file, open for reading bytes, at its start.
        path: of the file, named in errors.
        size: of the file, bytes.
    """

    def __init__(self, raw: IO[bytes], path: Path, size: int) -> None:
        self.path = path
        self.compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        self._source = HashingStream(raw)
        self._stream: Any = gzip.GzipFile(fileobj=self._source) if self.compressed else self._source  # type: ignore[call-overload]
        self._most = size * DEFLATE_RATIO + 1024 if self.compressed else size
        self._start = b""

    def start(self, count: int) -> bytes:
        """The first bytes of the content, at most so many; to be called once, before :meth:`up_to`."""
        self._start = self._stream.read(count)
        return self._start

    def up_to(self, end: int, more: int = 0, *, begin: int = 0) -> bytearray:
        """The content from its start to ``end``, bytes, and ``more`` bytes if they are there.

        What follows is read but not kept, which verifies the checksum of a compressed file. Errors count the voxels'
        bytes from ``begin`` on.

        Raises:
            ValueError: the file is too small to hold them, or ends before; or much more follows.
            OSError, EOFError, zlib.error: the file is damaged.
        """
        if end > self._most:  # before room for them is made
            present = f"at most {self._most - begin}" if self.compressed else str(max(self._most - begin, 0))
            raise ValueError(f"{end - begin} bytes of voxels expected, {present} found")
        content = bytearray(max(end, len(self._start)) + more)
        content[: len(self._start)] = self._start
        place = len(self._start)
        while place < len(content) and (piece := self._stream.read(min(_PIECE, len(content) - place))):
            content[place : place + len(piece)] = piece
            place += len(piece)
        if place < end:
            raise ValueError(f"{end - begin} bytes of voxels expected, {max(place - begin, 0)} found")
        del content[place:]
        rest = 0
        while self.compressed and (piece := self._stream.read(_PIECE)):
            rest += len(piece)
            if rest > end + _SLACK:
                raise ValueError("unpacks to much more than its header says")
        self._source.record(self.path)
        return content
