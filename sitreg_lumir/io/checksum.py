"""SHA-256 of files: how cards and provenances name what a result was made from."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.bounded import check_regular, checksum_record, max_voxels
from sitreg_lumir.io.volume_files import PAIR_SUFFIXES, has_suffix, volume_files

_LARGEST_VOXEL = 3 * 8  # bytes, of a vector of float64
_LARGEST_OTHER = 1 << 33  # bytes of members and maps


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits; a file that did not change is read once per process.

    Of a volume whose voxels lie in another file it is that of both, see :func:`combined`.

    Raises:
        InputError: the file cannot be read, or is larger than any that is used.
    """
    return combined([_of_one(file) for file in volume_files(path)])


def combined(digests: Sequence[str]) -> str:
    """One SHA-256 of those of several files: that of their digits; a single one stays as it is."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def record_volume(path: Path) -> None:
    """Notes the SHA-256 of a volume that was read from several files, where ``recorded_checksums`` asks for it.

    Of a ``.hdr`` with its ``.img`` both get it, as either names the volume.
    """
    record, files = checksum_record(), [os.path.abspath(file) for file in volume_files(path)]
    if record is not None and len(files) > 1 and all(file in record for file in files):
        whole = combined([record[file] for file in files])
        record.update(dict.fromkeys(files if has_suffix(path.name, *PAIR_SUFFIXES) else files[:1], whole))


def _of_one(path: Path) -> str:
    try:
        size, most = check_regular(path), max(max_voxels() * _LARGEST_VOXEL, _LARGEST_OTHER)
        if size > most:
            raise InputError(f"{path}: has {size} bytes, no file that is used has more than {most}; give another file")
        state = path.stat()
        return _sha256(str(path.absolute()), state.st_size, state.st_mtime_ns)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, mtime: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_entry(path: Path, read: Mapping[str, str] | None = None) -> dict[str, str]:
    """How a provenance names a file: its name without the folder, and its SHA-256.

    Args:
        path: of the file.
        read: SHA-256 of the bytes that were read, by absolute paths, see
            :func:`~sitreg_lumir.io.bounded.recorded_checksums`; of other files it is that of the file as it is now.

    Raises:
        InputError: the file cannot be read.
    """
    return {"name": path.name, "sha256": (read or {}).get(os.path.abspath(path)) or sha256_file(path)}
