"""Temporary folders for what is being written, beside where it goes; none outlives its process for long.

A temporary folder has a random name, is made by this process alone and open to its user alone, so that no name in it
can be guessed, taken or turned into a link by anybody else. It holds a lock for as long as its process lives. What a
killed process left is recognised by its free lock and cleaned up by the next process that writes beside it: removed,
or, if it had been complete and its renames had begun, finished.

In a temporary folder lie ``lock``, ``content`` (what is being written), while several renames belong together
``commit.json``, and perhaps ``old`` (a folder that is being replaced).
"""

import ctypes
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.lock import acquire, let_go, lock_if_free, locked, release
from sitreg_lumir.stop import before_leaving, shielded

_PREFIX = ".sitreg-lumir-"
_NAME = re.compile(r"\.sitreg-lumir-[a-z0-9_]{8}")
_LOCK_SUFFIX = ".sitreg-lumir-lock"
_LOCK, _CONTENT, _COMMIT, _OLD = "lock", "content", "commit.json", "old"
_AT_FDCWD, _EXCHANGE = -100, 2  # of renameat2

_ours: dict[Path, int] = {}  # temporary folders of this process, and the descriptors that hold their locks
_used: set[Path] = set()  # folders in which this process writes
_committing = threading.RLock()  # held while renames are under way; a process that is being stopped takes it for good


@contextmanager
def temporary_folder_in(parent: Path) -> Iterator[Path]:
    """Gives a new, empty folder; what is still in it at the end of the block is removed.

    Args:
        parent: an existing folder; what killed processes left in it is cleaned up first, once in a process.

    Raises:
        OSError: it cannot be written to.
    """
    parent = parent.absolute()
    if parent not in _used:
        clean_leftovers(parent)
    with shielded():
        temporary = _make(parent)
    try:
        yield temporary / _CONTENT
    finally:
        with shielded():
            try:
                if (temporary / _COMMIT).exists():
                    settle(temporary)
            finally:
                _remove(temporary)


def clean_leftovers(folder: Path) -> None:
    """Cleans up what killed processes left in a folder; what belongs to processes that live stays.

    Args:
        folder: need not exist.
    """
    folder = folder.absolute()
    _used.add(folder)
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            path = folder / entry.name
            with suppress(OSError, InputError, ValueError):
                if entry.stat(follow_symlinks=False).st_uid != os.geteuid() or path in _ours:
                    continue
                if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    _clean(path)
                elif entry.name.startswith(".") and entry.name.endswith(_LOCK_SUFFIX):
                    with lock_if_free(path):  # whose end removes the file
                        pass


def lock_for(path: Path) -> Path:
    """The file of the lock on a file or folder that may not exist yet; it lies beside it where that is possible.

    Args:
        path: its parent exists, or it does.
    """
    path = path.absolute()
    beside = path.parent
    if path.is_dir() and (os.path.ismount(path) or not os.access(beside, os.W_OK | os.X_OK)):
        return path / _LOCK_SUFFIX
    return beside / f".{path.name[:150]}{_LOCK_SUFFIX}"


def put_files(content: Path, *, files: list[str], remove: list[str]) -> None:
    """Moves files from a temporary folder's content to the folder it lies in, all of them even if it is killed.

    Args:
        content: of :func:`temporary_folder_in`; its files are complete and on the disk.
        files: names, in the order in which they move.
        remove: names that go first.
    """
    _commit(content.parent, {"files": files, "remove": remove})


def put_folder(content: Path, target: Path) -> None:
    """Gives a temporary folder's content the name of an existing folder beside it, which goes."""
    _commit(content.parent, {"folder": target.name, "inode": content.stat().st_ino})


def settle(temporary: Path) -> None:
    """Does what is left to do of the renames that a temporary folder's ``commit.json`` lists; twice is as once."""
    try:
        plan = json.loads((temporary / _COMMIT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    parent = temporary.parent
    with _committing, locked(parent / _LOCK_SUFFIX, wait=True):
        if "folder" in plan:
            _settle_folder(temporary, parent / _plain(plan["folder"]), int(plan["inode"]))
        else:
            for name in map(_plain, plan["remove"]):
                if name not in plan["files"] or (temporary / _CONTENT / name).exists():  # else it is new
                    (parent / name).unlink(missing_ok=True)
            for name in map(_plain, plan["files"]):
                with suppress(FileNotFoundError):  # moved already
                    os.replace(temporary / _CONTENT / name, parent / name)
        sync_folder(parent)


def sync_file(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Waits until a folder's list of names is on the disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(parent: Path) -> Path:
    """A new temporary folder of this process; another process that cleans up may take it for one that was left."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            descriptor = acquire(temporary / _LOCK)
        except InputError as error:
            if not temporary.exists():
                continue
            with suppress(OSError):
                temporary.rmdir()
            raise error.__context__ or error from None
        if descriptor is not None:
            _ours[temporary] = descriptor
            try:
                (temporary / _CONTENT).mkdir()
            except BaseException:
                _remove(temporary)
                raise
            return temporary


def _remove(temporary: Path) -> None:
    """Removes a temporary folder of this process, its lock last: without a lock, nothing is in it."""
    descriptor = _ours.pop(temporary, None)
    if descriptor is None:  # a forked process's, or removed as this process leaves
        return
    if (temporary / _COMMIT).exists():  # its renames failed: the next process may finish them
        let_go(descriptor)
        return
    if not _empty(temporary):
        let_go(descriptor)
        return
    release(temporary / _LOCK, descriptor)
    with suppress(OSError):
        temporary.rmdir()


def _empty(temporary: Path) -> bool:
    """Removes all but the lock, the list of renames, which are done or have not begun, first; whether that worked."""
    with suppress(OSError):
        for name in sorted(os.listdir(temporary), key=lambda name: name != _COMMIT):
            path = temporary / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif name != _LOCK:
                path.unlink()
        return os.listdir(temporary) == [_LOCK]
    return False


def _clean(temporary: Path) -> None:
    """Cleans up a temporary folder, if its process has ended."""
    lock = temporary / _LOCK
    if not os.path.lexists(lock):
        temporary.rmdir()  # only if empty
        return
    descriptor = acquire(lock, proof=True)
    if descriptor is None:
        return
    try:
        settle(temporary)
        empty = _empty(temporary)
    except BaseException:
        let_go(descriptor)
        raise
    if not empty:
        let_go(descriptor)
        return
    release(lock, descriptor)
    temporary.rmdir()


def _commit(temporary: Path, plan: dict[str, Any]) -> None:
    """Writes down renames that belong together, then does them."""
    with _committing, shielded():
        draft = temporary / f"{_COMMIT}.draft"
        draft.write_text(json.dumps(plan), encoding="utf-8")
        sync_file(draft)
        os.replace(draft, temporary / _COMMIT)
        sync_folder(temporary)
        try:
            settle(temporary)
        except OSError:
            if _nothing_moved(temporary, plan):
                (temporary / _COMMIT).unlink()
            raise
        (temporary / _COMMIT).unlink()


def _nothing_moved(temporary: Path, plan: dict[str, Any]) -> bool:
    """Whether the first rename has failed, so that all can stay as it was."""
    content = temporary / _CONTENT
    if "folder" in plan:
        return content.is_dir() and content.stat().st_ino == plan["inode"] and not (temporary / _OLD).exists()
    return not plan["remove"] and all((content / name).exists() for name in plan["files"])


def _settle_folder(temporary: Path, target: Path, inode: int) -> None:
    content, old = temporary / _CONTENT, temporary / _OLD
    if not content.is_dir() or content.stat().st_ino != inode:  # it has its name already
        return
    if target.exists():
        if _exchange(content, target):
            return
        os.rename(target, old)
    try:
        os.rename(content, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two folders at once; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE) == 0)


def _plain(name: str) -> str:
    """A name that is no path to elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is no plain name")
    return name


def _remove_all() -> None:
    """Before a signal ends this process: removes its temporary folders, and those of the processes that it started."""
    if not _committing.acquire(timeout=1):  # for good: from now on nothing takes its name
        return
    for temporary in tuple(_ours):
        with suppress(Exception):
            settle(temporary)
            (temporary / _COMMIT).unlink(missing_ok=True)
            _remove(temporary)
    for folder in tuple(_used):
        clean_leftovers(folder)


before_leaving(_remove_all)
os.register_at_fork(after_in_child=_ours.clear)
