"""Data loaders whose processes report mistakes in one line and leave it to the training process when to stop."""

import atexit
import functools
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from sitreg_lumir.errors import InputError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What cluster schedulers send before a time limit."""


class OneLineLoader(DataLoader[Any]):
    """Keeps an ``InputError`` of a worker in one line, and starts the workers at the first batch only.

    Lightning calls ``iter`` twice before each epoch but the first. Workers do not hear :data:`STOP_SIGNALS`:
    schedulers send them to all processes of a job, and the training one decides.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        _end_loaders_at_exit()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # processes inherit what is blocked
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield from batches
        except InputError as error:
            # what a worker raises arrives as its whole traceback, the message last
            message = str(error).strip().splitlines()[-1]
            raise InputError(message.rpartition(f"{InputError.__name__}: ")[2]) from None


@functools.cache
def _end_loaders_at_exit() -> None:
    """Registers, once, that processes which still load volumes end with this one.

    Python would ask them by SIGTERM, which they do not hear, and wait.
    """
    atexit.register(_kill_loaders)


def _kill_loaders() -> None:
    loaders = [child for child in multiprocessing.active_children() if child.daemon]
    if loaders:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would call their end an error
    for loader in loaders:
        loader.kill()
