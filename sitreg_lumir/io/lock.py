"""Locks between processes, which end with the process that holds them, however it ends.

A lock is a file that is locked by ``flock``. The system releases it when its process ends, by SIGKILL too, so that no
lock outlives its holder; the file itself goes when the lock is released, or stays empty and unlocked and is taken by
whoever comes next. Processes that share a volume exclude each other wherever its file system hands ``flock`` on (local
disks, containers of one machine, NFS 4, Lustre with ``-o flock``); on file systems without locks, all go on.

Two processes that must not write the same thing, the second refused in one line::

    with locked(folder / ".writing.lock"):
        ...

Processes that take turns::

    with locked(folder / ".table.lock", wait=True):
        ...

Processes that share a list of tasks, each doing what no other is doing at the time::

    for task in tasks:
        with lock_if_free(folder / f".{task}.lock") as free:
            if free and not is_done(task):
                do(task)

The lock's file lies in a folder that exists before and after: beside a folder that is made, replaced or renamed within
the block, not inside it. A name that starts with a point keeps it out of lists. Threads of one process exclude each
other, too; a thread must not take a lock twice. Processes forked within the block do not hold the lock.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sitreg_lumir.errors import InputError
from sitreg_lumir.stop import before_leaving

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # how a file system says that it has none
_REMEDY = "choose a folder with space and access"
_TRIES, _PAUSE = 3, 0.02  # seconds between two tries for a lock that is not waited for
_held: dict[int, Path] = {}  # this process's locks: descriptors and files


@contextmanager
def locked(path: Path, *, wait: bool = False, busy: str = "", remedy: str = _REMEDY) -> Iterator[None]:
    """Holds a lock within the block.

    Args:
        path: of the lock's file, which is made; its folder exists. It is removed at the end.
        wait: whether to wait for another process that holds it, or to refuse.
        busy: what the refusal says; by default that another process is writing in the folder.
        remedy: what to do where the file cannot be made.

    Raises:
        InputError: another process holds the lock, or its file cannot be made.
    """
    descriptor = acquire(path, wait=wait, remedy=remedy)
    if descriptor is None:
        raise InputError(
            busy or f"{path.parent}: another process is writing there; wait until it has ended, or name another folder"
        )
    try:
        yield
    finally:
        release(path, descriptor)


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Holds a lock within the block if no other process holds it; True if so, else False.

    Args:
        path: of the lock's file, as in :func:`locked`.

    Raises:
        InputError: the lock's file cannot be made.
    """
    descriptor = acquire(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            release(path, descriptor)


def acquire(path: Path, *, wait: bool = False, proof: bool = False, remedy: str = _REMEDY) -> int | None:
    """Takes a lock for :func:`release` to end, where a block of :func:`locked` does not fit.

    Args:
        path: of the lock's file, which is made.
        wait: for another process that holds it.
        proof: take it only if the file system shows that no other process holds it, which those without locks cannot.
        remedy: what to do where the file cannot be made.

    Returns:
        the descriptor that holds the lock; None if another process holds it and is not waited for.

    Raises:
        InputError: the lock's file cannot be made.
    """
    tries = _TRIES
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{path.parent}: cannot be written ({reason}); {remedy}") from None
        _held[descriptor] = path.absolute()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            _close(descriptor)
            tries -= 1
            if not tries:
                return None
            time.sleep(_PAUSE)  # another process may just be looking whether a lock is free
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                _close(descriptor)
                raise InputError(f"{path}: cannot be locked ({error.strerror}); choose another folder") from None
            if proof:
                _close(descriptor)
                return None
        except BaseException:
            _close(descriptor)
            raise
        if _is_at(path, descriptor):
            return descriptor
        _close(descriptor)  # its holder removed the file meanwhile, so that the next process locks another


def release(path: Path, descriptor: int) -> None:
    """Ends a lock; its file is removed while it is still locked, so that nobody locks a file that goes."""
    if descriptor not in _held:  # of the process that this one was forked from
        return
    if _is_at(path, descriptor):
        with suppress(OSError):
            path.unlink()
    _close(descriptor)


def let_go(descriptor: int) -> None:
    """Ends a lock whose file stays, as if this process had been killed."""
    if descriptor in _held:
        _close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the file that a descriptor has open is still the one with that name."""
    try:
        named, opened = path.lstat(), os.fstat(descriptor)
    except OSError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _close(descriptor: int) -> None:
    _held.pop(descriptor, None)
    with suppress(OSError):
        os.close(descriptor)


def _leave_to_parent() -> None:
    """In a forked process: closes the copies, which would hold the locks on after the parent's end."""
    for descriptor in tuple(_held):
        _close(descriptor)


def _release_all() -> None:
    """Before a signal ends this process."""
    for descriptor, path in tuple(_held.items()):
        release(path, descriptor)


before_leaving(_release_all)
os.register_at_fork(after_in_child=_leave_to_parent)
