"""Compiled CPU loops: the decorator that compiles them, and the threads that share their work.

The loops release the interpreter lock and run on plain Python threads, as many as torch uses. That needs no
threading layer: calls from several threads at once are safe, and a forked process starts threads of its own.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import torch

numba: Any = import_module("numba")  # it has no type information

Loop = TypeVar("Loop", bound=Callable[..., Any])

_log = logging.getLogger(__name__)
_CHUNKS_PER_THREAD = 8
_pool: ThreadPoolExecutor | None = None
_announced = False


def compiled(function: Loop) -> Loop:
    """Compiles a function at its first call, and keeps the machine code on disk where a folder is writable.

    Sums are never reordered, so results depend neither on the number of threads nor on the vector width. After a
    change to a function that another file's loops call, delete ``__pycache__``: numba looks at a loop's own file only.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
    try:
        result: Loop = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache is writable
        result = numba.njit(**options)(function)
    return result


def run(loop: Callable[..., None], tasks: int, *args: Any) -> None:
    """Calls ``loop(first, last, *args)`` for parts of ``range(tasks)``, on as many threads as torch uses.

    The tasks must not write to the same places; which thread takes which part is left open.
    """
    _announce_compilation(loop)
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1:
        loop(0, tasks, *args)
        return
    length = ceil(tasks / (threads * _CHUNKS_PER_THREAD))
    starts = count(0, length)

    def work() -> None:
        while (first := next(starts)) < tasks:
            loop(first, min(first + length, tasks), *args)

    pool = _get_pool(threads)
    futures = [pool.submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for future in futures:
            future.exception()  # waits: the arrays must outlive every thread's work
    for future in futures:
        future.result()


def _get_pool(threads: int) -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(threads, os.cpu_count() or 1), thread_name_prefix="sitreg-lumir-cpu")
    return _pool


def _forget_pool() -> None:
    """A forked process inherits the pool, but not its threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _announce_compilation(loop: Any) -> None:
    """Says once that a pause is coming, if no machine code is on disk."""
    global _announced
    if _announced:
        return
    _announced = True
    folder = loop.stats.cache_path
    module = loop.py_func.__module__.rsplit(".", 1)[-1]
    if folder is None or not any(Path(folder).glob(f"{module}.*.nbi")):
        _log.warning("compiling CPU kernels, once")
