"""An orderly end by a signal: the running verb unwinds, and where it cannot in time, a watchdog ends the process.

Python's own handlers run between two instructions of the main thread, so that they wait for a long call of compiled
code, and an exception that they raise may be caught on its way. Here the system's notice of the signal goes to a
thread, which waits some seconds, then removes what is half-written, ends processes that were started, and leaves.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from sitreg_lumir.errors import StoppedBySignalError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What ends a verb: the requests of users, of terminals that close, and of cluster schedulers."""

_GRACE = 3.0  # seconds that the main thread has to unwind
_LAST = 1.5  # seconds that cleaning up may take after that
_CHILDREN = 0.5  # seconds that processes which were started have to end in order
_LEFT_ALONE = ("resource_tracker", "torch_shm_manager", "wandb-core")  # they clean up after their parent, and then end

_cleanups: list[Callable[[], None]] = []


class _Signals:
    """What is known of signals in this process."""

    def __init__(self) -> None:
        self.received: int | None = None  # the first one
        self.postponed = False  # received within a block that must not be interrupted
        self.raised = False
        self.shields = 0  # of the main thread
        self.before: dict[signal.Signals, Any] = {}  # handlers
        self.handled_elsewhere: frozenset[int] = frozenset()


_now = _Signals()


def before_leaving(cleanup: Callable[[], None]) -> None:
    """Registers what removes half-written results when a signal ends the process; called from any thread."""
    _cleanups.append(cleanup)


@contextmanager
def shielded() -> Iterator[None]:
    """Within the block, which is short, a signal waits: for renames that belong together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _now.shields += 1
    try:
        yield
    finally:
        _now.shields -= 1
        if _now.postponed and not _now.shields and _now.received is not None:
            _now.postponed = False
            _raise(_now.received)


@contextmanager
def handling_elsewhere(numbers: Collection[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the block, a handler decides what these signals do, however long that takes.

    Args:
        numbers: the signals; all others end the process as before.
        handler: as of :func:`signal.signal`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, elsewhere = {number: signal.signal(number, handler) for number in numbers}, _now.handled_elsewhere
    _now.handled_elsewhere = elsewhere | frozenset(numbers)
    try:
        yield
    finally:
        _now.handled_elsewhere = elsewhere
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def obeying_signals() -> Iterator[None]:
    """Within the block, one of :data:`SIGNALS` raises :class:`StoppedBySignalError` in the main thread.

    If the block has not ended some seconds later, the process leaves with 128 + the signal's number. In other threads
    than the main one, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _now
    outer, _now = _now, _Signals()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()
    numbers = [number for number in SIGNALS if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
    _now.before = before = {number: signal.signal(number, _on_signal) for number in numbers}
    notice = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watchdog = threading.Thread(target=_watch, args=(_now, reading, ended), name="signals", daemon=True)
    watchdog.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(notice)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)  # the watchdog reads the end
        watchdog.join()
        _now = outer


def _forget_in_child() -> None:
    """In a forked process: signals do what they did before, and are no notice to the parent's watchdog."""
    global _now
    if _now.before:
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)
            for number, handler in _now.before.items():
                signal.signal(number, handler)
    _now = _Signals()


os.register_at_fork(after_in_child=_forget_in_child)


def received_signal() -> int | None:
    """The signal that asked for the end of the block of :func:`obeying_signals`, if any has."""
    return _now.received


def leave(code: int) -> None:
    """Removes what is half-written, ends processes that were started, and ends this one, all within a second or two."""
    threading.Thread(target=_leave_late, args=(code,), daemon=True).start()
    end_children()
    for cleanup in reversed(_cleanups):  # locks, which come first, go last
        with suppress(Exception):
            cleanup()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def end_children() -> None:
    """Ends the processes that this one has started, and theirs, such as those that load volumes or share the pairs."""
    processes = _descendants()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would call their end an error
    for number, seconds in ((signal.SIGTERM, _CHILDREN), (signal.SIGKILL, _CHILDREN)):
        for process in processes:
            with suppress(OSError):
                os.kill(process, number)
        deadline = time.monotonic() + seconds
        while processes and time.monotonic() < deadline:
            processes = [process for process in processes if _is_running(process)]
            time.sleep(0.02)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _now.received is None:
        _now.received = number
    if _now.shields:
        _now.postponed = True
    elif not _now.raised:
        _raise(number)


def _raise(number: int) -> None:
    if not _now.raised:
        _now.raised = True
        raise StoppedBySignalError(number)


def _watch(state: _Signals, reading: int, ended: threading.Event) -> None:
    """Waits for the system's notice of a signal, then for the main thread, then no longer."""
    number: int | None = None
    while number is None:
        noticed = os.read(reading, 64)
        if not noticed:
            break
        number = next((n for n in noticed if n in SIGNALS and n not in state.handled_elsewhere), None)
    if number is not None and not ended.wait(_GRACE):
        with suppress(OSError):
            os.write(2, f"sitreg-lumir: stopped by {signal.Signals(number).name}\n".encode())
        leave(128 + number)
    os.close(reading)


def _leave_late(code: int) -> None:
    time.sleep(_LAST)
    os._exit(code)


def _descendants() -> list[int]:
    """Processes that this one has started, directly or not, but for those that end when it does."""
    children: dict[int, list[int]] = {}
    for process, parent in _parents():
        children.setdefault(parent, []).append(process)
    descendants: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        for process in children.get(waiting.pop(), []):
            if not any(name in _command(process) for name in _LEFT_ALONE):
                descendants.append(process)
                waiting.append(process)
    return descendants


def _parents() -> Iterator[tuple[int, int]]:
    """Each process of the system with its parent; without ``/proc``, those of :mod:`multiprocessing` alone."""
    if not os.path.isdir("/proc/self"):
        import multiprocessing

        yield from ((child.pid, os.getpid()) for child in multiprocessing.active_children() if child.pid is not None)
        return
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", encoding="latin-1") as file:
            yield int(name), int(file.read().rpartition(")")[2].split()[1])


def _command(process: int) -> str:
    with suppress(OSError), open(f"/proc/{process}/cmdline", encoding="latin-1") as file:
        return file.read()
    return ""


def _is_running(process: int) -> bool:
    """Whether a process still runs; a child that has ended is reaped."""
    ended: Any = 0
    with suppress(ChildProcessError):
        ended, _ = os.waitpid(process, os.WNOHANG)
    if ended:
        return False
    try:
        os.kill(process, 0)
    except OSError:
        return False
    with suppress(OSError), open(f"/proc/{process}/stat", encoding="latin-1") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return True
