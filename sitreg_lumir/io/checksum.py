"""SHA-256 of files: how cards and provenances name what a result was made from."""

import hashlib
from functools import lru_cache
from pathlib import Path

from sitreg_lumir.errors import InputError


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits; a file that did not change is read once per process.

    Raises:
        InputError: the file cannot be read.
    """
    try:
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


def file_entry(path: Path) -> dict[str, str]:
    """How a provenance names a file: its name without the folder, and its SHA-256."""
    return {"name": path.name, "sha256": sha256_file(path)}
