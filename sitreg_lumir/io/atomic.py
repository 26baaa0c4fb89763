"""Files and folders that appear whole or not at all.

What is written lies in a temporary folder (see :mod:`~sitreg_lumir.io.temporary`) on the same disk until it is complete
and on the disk, and then takes its name by one rename. Where several renames belong together they are written down
first, so that the next process finishes them if this one is killed between two of them.
"""

import errno
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.lock import locked
from sitreg_lumir.io.temporary import (
    clean_leftovers,
    lock_for,
    put_files,
    put_folder,
    sync_file,
    sync_folder,
    temporary_folder_in,
)
from sitreg_lumir.stop import shielded

_REMEDY = "choose a folder with space and access"
_OF_THE_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG,
    errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EBUSY,
}  # fmt: skip


@contextmanager
def writing(path: Path, *, remedy: str = _REMEDY) -> Iterator[Path]:
    """Gives a temporary path of the same name; what is written there takes the name ``path`` at the end of the block.

    Whatever goes wrong, ``path`` keeps what it held and the temporary file is removed.

    Args:
        path: of the file; its folder is made if need be.
        remedy: what the error tells users to do.

    Raises:
        InputError: the folder cannot be made or written to, or the disk is full.
    """
    with writing_together(path, remedy=remedy) as (temporary,):
        yield temporary


@contextmanager
def writing_together(*paths: Path, remedy: str = _REMEDY) -> Iterator[tuple[Path, ...]]:
    """As :func:`writing`, for files of one folder that belong together: all of them take their names, or none.

    Args:
        paths: of the files, all in one folder.
        remedy: what the error tells users to do.

    Raises:
        InputError: the folder cannot be made or written to, or the disk is full.
    """
    parent = paths[0].parent
    with _refusing(paths[0], remedy), _made(parent), temporary_folder_in(parent) as content:
        files = tuple(content / path.name for path in paths)
        yield files
        for file in files:
            sync_file(file)
        if len(paths) == 1:
            with shielded():
                os.replace(files[0], paths[0])
                sync_folder(parent)
        else:
            put_files(content, files=[path.name for path in paths], remove=[])


@contextmanager
def writing_folder(folder: Path, own: Collection[str] = (), last: str | None = None) -> Iterator[Path]:
    """Gives an empty temporary folder, which takes the name ``folder`` at the end of the block.

    If the folder exists, the new one replaces it at once. Only where that cannot be (files of others are in it, it is a
    mounted disk, or its parent cannot be written to) its files are replaced in turn: ``last`` goes first and
    comes last, and a process that is killed meanwhile leaves it to the next one to finish.

    Args:
        folder: the result; its parents are made if need be.
        own: names of files that may be in it from before and are replaced or removed; all others stay.
        last: the file whose presence says that the others are complete.

    Raises:
        InputError: the folder cannot be made or written to, or the disk is full.
    """
    with _refusing(folder, _REMEDY):
        folder = Path(os.path.realpath(folder)) if folder.is_symlink() else folder
        inside = folder.is_dir() and not _can_be_replaced(folder, own)
        parent = folder if inside else folder.parent
        with _made(parent), temporary_folder_in(parent) as content:
            yield content
            for path in sorted(content.rglob("*"), reverse=True):
                (sync_folder if path.is_dir() else sync_file)(path)
            sync_folder(content)
            if inside:
                files = sorted(os.listdir(content), key=lambda name: (name == last, name))
                put_files(content, files=files, remove=[*([last] if last else []), *sorted({*own} - {*files})])
            elif folder.exists() and os.listdir(folder):
                content.chmod(folder.stat().st_mode & 0o7777)
                put_folder(content, folder)
            else:
                with shielded():
                    os.rename(content, folder)
                    sync_folder(parent)


def _can_be_replaced(folder: Path, own: Collection[str]) -> bool:
    """Whether a folder can be exchanged for another one without a loss."""
    if os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK):
        return False
    return set(os.listdir(folder)) <= set(own)


@contextmanager
def temporary_folder_beside(folder: Path) -> Iterator[Path]:
    """Gives a new folder on the disk of ``folder``; what is still in it at the end of the block is removed."""
    parent = folder.absolute().parent
    with _made(parent), temporary_folder_in(parent) as temporary:
        yield temporary


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Gives a new folder where the system keeps temporary files (``TMPDIR``); it is removed at the end of the block.

    Raises:
        InputError: there is no place for temporary files.
    """
    try:
        place = Path(tempfile.gettempdir())
    except OSError:
        raise InputError("no folder for temporary files can be written to; name one by the variable TMPDIR") from None
    with _refusing(place, "name another folder for temporary files by the variable TMPDIR"):  # noqa: SIM117
        with temporary_folder_in(place) as temporary:
            yield temporary


@contextmanager
def alone(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Within the block, no other process that asks for it writes the same result; what killed ones left is cleaned up.

    Args:
        path: a file or folder, which need not exist; its parents are made, and go again if the block fails.
        wait: for another process, instead of refusing.

    Raises:
        InputError: another process is writing there, or the lock cannot be made.
    """
    busy = f"{path}: another process is writing there; wait until it has ended, or choose another place"
    with ExitStack() as stack:
        with _refusing(path, _REMEDY):
            stack.enter_context(_made(path.absolute().parent))
        stack.enter_context(locked(lock_for(path), wait=wait, busy=busy))
        for folder in (path.absolute().parent, path):
            if folder.is_dir():
                clean_leftovers(folder)
        yield


@contextmanager
def own_temporary_files() -> Iterator[None]:
    """Within the block, temporary files of libraries lie in a folder of this process, which goes at its end."""
    before = tempfile.tempdir
    with temporary_folder() as folder:
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def check_folder_is_writable(folder: Path) -> None:
    """Makes a folder if need be and tries to write there, so that it is refused before the work and not after it.

    What killed processes left in it is cleaned up. A folder made by this call stays only if it can be written to.

    Raises:
        InputError: it cannot be made or written to.
    """
    with _refusing(folder, _REMEDY, "cannot be written to"), _made(folder):
        clean_leftovers(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass


def reason_of(error: OSError) -> str:
    """Why a file could not be used, in the system's words."""
    return error.strerror or str(error)


def refusal_of(error: OSError) -> str | None:
    """One line for a disk that is full, read-only, broken or closed to the user; None for any other error."""
    if error.errno not in _OF_THE_DISK:
        return None
    name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{name}cannot be used ({reason_of(error)}); make room, or choose a place with space and access"


@contextmanager
def _refusing(path: Path, remedy: str, problem: str = "cannot be written") -> Iterator[None]:
    """Turns a failure of the system into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {problem} ({reason_of(error)}); {remedy}") from None


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents; those that did not exist go again if the block fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise
