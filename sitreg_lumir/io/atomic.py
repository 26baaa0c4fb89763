"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sitreg_lumir.errors import InputError


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; what is written there takes the name ``path`` at the end of the block.

    Whatever goes wrong, ``path`` keeps what it held and the temporary file is removed.

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
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be written ({reason}); choose a folder with space and access") from None
    finally:
        with suppress(OSError):  # an unusable folder is what the error above says
            temporary.unlink(missing_ok=True)


def check_folder_is_writable(folder: Path) -> None:
    """Makes a folder if need be and tries to write there, so that it is refused before the work and not after it.

    A folder made here stays only if it can be written to.

    Raises:
        InputError: it cannot be made or written to.
    """
    made = next((each for each in reversed([folder, *folder.parents]) if not each.exists()), None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if made is not None:
            with suppress(OSError):
                folder.rmdir()
        reason = error.strerror or str(error)
        raise InputError(f"{folder}: cannot be written to ({reason}); choose a folder with space and access") from None
