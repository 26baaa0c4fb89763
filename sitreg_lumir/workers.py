"""Shares tasks out to processes, each with its share of the threads; a process that dies costs its task alone.

With one worker the tasks are done by this process itself, and results are the same to the last bit: no computation of
the package depends on the number of threads.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from sitreg_lumir.errors import InputError, StoppedBySignalError
from sitreg_lumir.stop import leave, obeying_signals

_THREADS = "OMP_NUM_THREADS"
_GRACE = 5.0  # seconds that a worker has to remove what it was writing
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class WorkerDied:
    """Stands for a task's result where its process ended before the task was done.

    Attributes:
        exit_code: of the process, negative for a signal.
    """

    exit_code: int

    @property
    def reason(self) -> str:
        """Why the task has no result, in one line."""
        if self.exit_code == -signal.SIGKILL:
            return "its process was killed, most likely for lack of memory; take fewer workers"
        if self.exit_code < 0:
            return f"its process ended by {signal.Signals(-self.exit_code).name}"
        return f"its process ended with exit code {self.exit_code}"


def share_out(
    start: Callable[[Any], Callable[[Task], Result]], settings: Any, tasks: Sequence[Task], workers: int
) -> Iterator[tuple[int, Result | WorkerDied]]:
    """Does all tasks, and yields each one's place in the list with its result, as they get done.

    Args:
        start: called once in each process with the settings; returns what does a task. A function of a module.
        settings: anything that can be sent to a process.
        tasks: anything that can be sent to a process.
        workers: number of processes; with 1 the tasks are done in order by this process.

    Raises:
        InputError: ``start`` refused the settings.
        ValueError: less than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    if workers == 1 or len(tasks) < 2:
        do = start(settings)
        for place, task in enumerate(tasks):
            yield place, do(task)
        return
    waiting = list(enumerate(tasks))[::-1]
    running: list[_Worker] = []
    try:
        running = [_Worker(start, settings, *waiting.pop(), workers) for _ in range(min(workers, len(tasks)))]
        while running:
            ready = wait([worker.connection for worker in running])
            for worker in [worker for worker in running if worker.connection in ready]:
                answer = worker.receive()
                if isinstance(answer, WorkerDied):
                    running.remove(worker)
                    if waiting:
                        running.append(_Worker(start, settings, *waiting.pop(), workers))
                    yield worker.place, answer
                    continue
                place = worker.place
                if waiting:
                    worker.give(*waiting.pop())
                else:
                    running.remove(worker)
                    worker.end()
                yield place, answer
    finally:
        _end_all(running)


class _Worker:
    """A process with the task that it does, seen from the process that shares the tasks out."""

    def __init__(self, start: Callable[[Any], Any], settings: Any, place: int, task: Any, workers: int) -> None:
        import torch

        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // workers)
        self.connection, of_worker = context.Pipe()
        self.process = context.Process(target=_serve, args=(of_worker, start, settings, threads), daemon=True)
        with _threads_of_child(threads):
            self.process.start()
        of_worker.close()
        self.give(place, task)

    def give(self, place: int, task: Any) -> None:
        self.place = place
        with suppress(OSError):  # a process that ended is noticed when its answer is asked for
            self.connection.send(task)

    def receive(self) -> Any:
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return WorkerDied(self.process.exitcode or 0)
        if kind == "refused":
            raise InputError(content)
        if kind == "broken":
            raise RuntimeError(f"a worker failed:\n{content}")
        return content

    def end(self) -> None:
        """Lets a process without a further task end."""
        self.connection.close()
        self.process.join()


def _end_all(workers: Sequence[_Worker]) -> None:
    """Ends processes that still work, and gives them the time to remove what they were writing."""
    for worker in workers:
        worker.process.terminate()
    until = time.monotonic() + _GRACE
    for worker in workers:
        worker.process.join(max(0.0, until - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


@contextmanager
def _threads_of_child(threads: int) -> Iterator[None]:
    """Within the block, processes start with so many threads for what reads their number when it is imported."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def _serve(connection: Connection, start: Callable[[Any], Any], settings: Any, threads: int) -> None:
    """What a worker's process runs: tasks from the connection until it is closed."""
    _prepare_process(threads)
    try:
        with obeying_signals():
            do = start(settings)
            while True:
                try:
                    task = connection.recv()
                except EOFError:
                    return
                connection.send(("done", do(task)))
    except StoppedBySignalError as stop:
        sys.exit(128 + stop.number)
    except InputError as error:
        connection.send(("refused", str(error)))
    except ConnectionError:
        return
    except Exception:
        connection.send(("broken", traceback.format_exc()))


def _prepare_process(threads: int) -> None:
    """Threads and messages of a worker, and its end with the process that started it."""
    import SimpleITK
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    itk: Any = SimpleITK
    itk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    package = logging.getLogger("sitreg_lumir")
    package.setLevel(logging.WARNING)
    package.propagate = False
    if not package.handlers:
        package.addHandler(logging.StreamHandler(sys.stderr))


def _end_with_parent() -> None:
    """Ends this process when the one that started it ends, however it does."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    leave(128 + signal.SIGTERM)
