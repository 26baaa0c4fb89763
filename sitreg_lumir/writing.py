"""Files that appear whole or not at all."""

import os
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
