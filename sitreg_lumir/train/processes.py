"""Several processes that train together end together: whatever ends one of them, no other waits for it.

A collective operation waits for all processes. One that ended by an error would be waited for until a time-out, which
NCCL has after ten minutes, so the one that fails says so in the store by which the processes have found each other,
and a thread of each of the others looks there.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch import Trainer

from sitreg_lumir.errors import CollectiveError, InputError, RunStoppedError, StoppedBySignalError

_FAILURE, _LEFT = "sitreg_lumir/failure", "sitreg_lumir/left"  # keys of the store
_EVERY = 0.5  # seconds between two looks
_WAIT = 10.0  # seconds that the failing process waits for the others to have read it
_GRACE = 30.0  # seconds that the others have to end in order


class Failure(NamedTuple):
    """Which process ended, and with which exit code the others are to end."""

    rank: int
    exit_code: int


def named_by_process(names: str) -> str:
    """``images ...`` with the names of all processes that give some, each with its number; all must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return f"images {names}"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, names)
    return " and ".join(f"images {images} of process {rank}" for rank, images in enumerate(gathered) if images)


@contextmanager
def ending_together(trainer: Trainer) -> Iterator[None]:
    """Within the block, an error in one process ends all of them, in seconds.

    The process that fails raises its own error, with its number if it is an :class:`InputError`; all others end with
    the same exit code and no word of their own.

    Args:
        trainer: knows how many processes there are.
    """
    if trainer.world_size == 1:
        yield
        return
    watch = _Watch(trainer.world_size)
    watch.start()
    try:
        yield
    except StoppedBySignalError as stop:
        watch.report(Failure(trainer.global_rank, 128 + stop.number))
        raise
    except Exception as error:
        _leave_the_end_to_us()
        rank = trainer.global_rank
        together = isinstance(error, CollectiveError | RunStoppedError)
        if not together:
            if watch.failure is None and isinstance(error, RuntimeError):
                watch.look_again()  # perhaps a connection broke because another process has ended
            if watch.failure is not None:
                raise RunStoppedError("", watch.failure.exit_code) from None
        watch.report(Failure(rank, _exit_code(error)))
        if together and rank:
            raise RunStoppedError("", _exit_code(error)) from None
        if isinstance(error, InputError) and not together:
            raise InputError(f"{error} (process {rank} of {trainer.world_size})") from None
        raise
    finally:
        watch.stop()


def _exit_code(error: Exception) -> int:
    if isinstance(error, RunStoppedError):
        return error.exit_code
    return 2 if isinstance(error, InputError) else 1


def _leave_the_end_to_us() -> None:
    """Keeps Lightning from killing this process because another one ended with an error, while it still saves."""
    for thread in threading.enumerate():
        children = getattr(thread, "_child_processes", None)
        if thread.name == "child-process-observer" and isinstance(children, list):
            children.clear()


class _Watch(threading.Thread):
    """Looks for the failure of another process, and ends this one if its main thread does not notice."""

    def __init__(self, processes: int) -> None:
        super().__init__(name="other-processes", daemon=True)
        self.processes = processes
        self.failure: Failure | None = None
        self._store: Any = None
        self._left = False
        self._ended = threading.Event()

    def run(self) -> None:
        while self.failure is None:
            if self._ended.wait(_EVERY):
                return
            self._look()
        self._acknowledge()
        _leave_the_end_to_us()
        with suppress(Exception):  # NCCL only: wakes a main thread that waits for a process that has ended
            if dist.get_backend() == "nccl":
                dist.distributed_c10d._abort_process_group()
        if not self._ended.wait(_GRACE):
            os._exit(self.failure.exit_code)

    def report(self, failure: Failure) -> None:
        """Informs the others, and waits until they have read it."""
        with suppress(Exception):  # without a store there is nobody to inform
            store = self._connected()
            if store is None:
                return
            if not store.check([_FAILURE]):
                store.set(_FAILURE, json.dumps(failure))
            self._acknowledge()
            deadline = time.monotonic() + _WAIT
            while store.add(_LEFT, 0) < self.processes and time.monotonic() < deadline:
                time.sleep(_EVERY / 5)

    def look_again(self) -> None:
        """Looks for a failure that was reported just now."""
        deadline = time.monotonic() + 2 * _EVERY
        while self.failure is None and time.monotonic() < deadline:
            self._look()
            time.sleep(_EVERY / 5)

    def stop(self) -> None:
        """Ends the watch: this process leaves on its own."""
        self._acknowledge()
        self._ended.set()

    def _look(self) -> None:
        try:
            store = self._connected()
            if store is not None and store.check([_FAILURE]):
                failure = Failure(*json.loads(store.get(_FAILURE)))
                self.failure = failure if self._ended.is_set() is False else self.failure
        except Exception:  # the store is gone, and with it the first process
            if not self._ended.is_set():
                self.failure = Failure(0, 1)

    def _connected(self) -> Any:
        """A connection of our own to the store, as soon as the processes have found each other."""
        if self._store is None and dist.is_available() and dist.is_initialized():
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_WAIT)
            )
        return self._store

    def _acknowledge(self) -> None:
        if not self._left and self._store is not None:
            self._left = True
            with suppress(Exception):
                self._store.add(_LEFT, 1)
