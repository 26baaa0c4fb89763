"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sitreg_lumir.errors import InputError

_REMEDY = "choose a folder with space and access"


@contextmanager
def writing(path: Path, *, remedy: str = _REMEDY) -> Iterator[Path]:
    """Gives a temporary path in the same folder; what is written there takes the name ``path`` at the end of the block.

    Whatever goes wrong, ``path`` keeps what it held and the temporary file is removed.

    Args:
        path: of the file; its folder is made if need be.
        remedy: what the error tells users to do.

    Raises:
        InputError: the folder cannot be made or written to, or the disk is full.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason_of(error)}); {remedy}") from None
    finally:
        with suppress(OSError):  # an unusable folder is what the error above says
            temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder_beside(folder: Path) -> Iterator[Path]:
    """Gives a new folder on the disk of ``folder``; what is still in it at the end of the block is removed.

    Files or the whole folder are renamed from there, once all is written.
    """
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.absolute().name}.", dir=parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder_is_writable(folder: Path) -> None:
    """Makes a folder if need be and tries to write there, so that it is refused before the work and not after it.

    A folder made by this call stays only if it can be written to.

    Raises:
        InputError: it cannot be made or written to.
    """
    made = next((path for path in reversed([folder, *folder.parents]) if not path.exists()), None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if made is not None:
            with suppress(OSError):
                folder.rmdir()
        raise InputError(f"{folder}: cannot be written to ({reason_of(error)}); {_REMEDY}") from None


def reason_of(error: OSError) -> str:
    """Why a file could not be used, in the system's words."""
    return error.strerror or str(error)
