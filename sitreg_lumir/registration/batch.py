"""Registers the pairs of a table, in any number of processes and on any number of machines, into one folder."""

import logging
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sitreg_lumir.challenge.provenance import compare, in_words
from sitreg_lumir.errors import InputError, RunStoppedError
from sitreg_lumir.io.atomic import check_folder_is_writable
from sitreg_lumir.io.lock import lock_if_free, locked
from sitreg_lumir.io.table import write_table
from sitreg_lumir.registration.bids import check_names, lay_out, prepare_dataset
from sitreg_lumir.registration.made_from import made_from
from sitreg_lumir.registration.model import Model, load_model
from sitreg_lumir.registration.options import RegisterOptions
from sitreg_lumir.registration.outputs import SUMMARY
from sitreg_lumir.registration.pair_rows import (
    STATE,
    TABLE,
    error_path,
    read_summary,
    record_error,
    row_of,
)
from sitreg_lumir.registration.pairs_table import PairRow
from sitreg_lumir.registration.placed_scans import PlacedScans
from sitreg_lumir.registration.register import register_scans
from sitreg_lumir.workers import WorkerDied, share_out

_RUNNING = "running"  # stands for a verdict until the process has ended that registers a pair
_TABLE_SECONDS = 1.0  # between two writings of the table
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One of several parts of a table: pairs ``number``, ``number + count``, ``number + 2 count``, ...

    Args:
        number: from 1 to ``count``.
        count: of all parts.

    Raises:
        InputError: there is no such part.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise InputError(
                f"`shard` {self.number}/{self.count}: of N parts, the first is 1/N and the last N/N; in SLURM that is "
                "--array=1-N"
            )

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard that ``I/N`` names.

        Raises:
            InputError: it is none.
        """
        match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
        if match is None:
            raise InputError(f"`shard` must be I/N, part I of N such as 1/4, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def of(self, pairs: Sequence[PairRow]) -> list[PairRow]:
        """The pairs of this part, in order."""
        return list(pairs[self.number - 1 :: self.count])


@dataclass(frozen=True)
class _Settings:
    """What a process needs to register pairs: a model, or for another process how to load it."""

    folder: Path
    options: RegisterOptions
    shared: frozenset[str]
    model: Model | None
    files: tuple[Path, ...] = ()
    checksums: tuple[dict[str, str], ...] = ()
    bids: Path | None = None
    loading: tuple[tuple[str, Any], ...] = ()
    wait: bool = False

    def loaded(self) -> Model:
        """The model, loaded by this process if need be."""
        if self.model is not None:
            return self.model
        model = load_model(self.files, **dict(self.loading))
        if model.checksums != self.checksums:
            raise InputError(f"{self.files[0]}: the members changed after the start; start again")
        return model


def register_pairs(
    pairs: Sequence[PairRow],
    folder: Path,
    model: Model,
    options: RegisterOptions,
    *,
    workers: int = 1,
    shard: Shard | None = None,
    bids: Path | None = None,
) -> list[dict[str, Any]]:
    """Registers all pairs into ``folder/<name>`` and writes ``folder/pairs.csv``; skips what is registered.

    A pair is skipped if it was registered from the same files by the same members with the same options. A pair that
    cannot be registered is listed in the table with the reason, and the next pairs are registered. Scans that pairs
    share are aligned once. Any number of processes may work in one folder: a pair that another process is registering
    is left to it, and looked at again at the end.

    Args:
        pairs: of :func:`~sitreg_lumir.registration.pairs_table.read_pairs`.
        folder: of the results.
        model: of :func:`~sitreg_lumir.registration.model.load_model`.
        options: for all pairs, without the files that the table names; with ``overwrite``, pairs are registered again
            that were registered otherwise.
        workers: processes that share the pairs and the threads of this one; results do not depend on it.
        shard: the part of the table to register; the table is then left to
            :func:`~sitreg_lumir.registration.pair_rows.collect`.
        bids: BIDS derivatives data set that the results are laid out in, too.

    Returns:
        the rows of the pairs, in the table's order.

    Raises:
        InputError: without ``overwrite``, a pair was registered otherwise; it says what differs. Or the folder cannot
            be written, or there are less than 1 worker.
    """
    if workers < 1:
        raise InputError(f"`workers` must be 1 or more, got {workers}")
    images = Counter(pair.files[role] for pair in pairs for role in ("fixed", "moving"))
    shared = frozenset(image for image, times in images.items() if times > 1)
    chosen = list(pairs) if shard is None else shard.of(pairs)
    _refuse_others(chosen, folder, model, options)
    check_folder_is_writable(folder / STATE)
    if bids is not None:
        check_names([(pair.name, pair.files["fixed"], pair.files["moving"]) for pair in pairs])
        prepare_dataset(bids)
    settings = _Settings(folder, options, shared, model, bids=bids)
    if workers > 1 and len(chosen) > 1:
        loading: dict[str, Any] = {"device": str(model.device), "precision": model.precision, "flip": model.flip}
        loading |= {"allow_imports": model.allow_imports}
        settings = replace(
            settings, model=None, files=model.files, checksums=model.checksums, loading=tuple(loading.items())
        )
    rows: dict[int, dict[str, Any]] = {}
    written = time.monotonic()
    try:
        for place, result in _results(settings, chosen, workers):
            pair = chosen[place]
            if isinstance(result, WorkerDied):
                record_error(folder, pair, result.reason)
                _log.error("%s: %s", pair.name, result.reason)
                result = row_of(pair, folder, "error", result.reason)
            rows[place] = result
            _log.info("%d of %d pairs done: %s: %s", len(rows), len(chosen), pair.name, result["verdict"])
            if shard is None and time.monotonic() - written > _TABLE_SECONDS:
                write_table(folder / TABLE, [rows[place] for place in sorted(rows)])
                written = time.monotonic()
    finally:
        if shard is None and rows:
            write_table(folder / TABLE, [rows[place] for place in sorted(rows)])
    return [rows[place] for place in sorted(rows)]


def _results(
    settings: _Settings, pairs: Sequence[PairRow], workers: int
) -> Iterator[tuple[int, dict[str, Any] | WorkerDied]]:
    """The rows of pairs as they get done, those last that other processes were registering, once these have ended."""
    elsewhere = []
    for place, result in share_out(_start, settings, pairs, workers):
        if isinstance(result, dict) and result["verdict"] == _RUNNING:
            elsewhere.append(place)
        else:
            yield place, result
    if elsewhere:
        _log.info("waiting for other processes, which register %d of the pairs", len(elsewhere))
        left = [pairs[place] for place in elsewhere]
        for place, result in share_out(_start, replace(settings, wait=True), left, workers):
            yield elsewhere[place], result


def _refuse_others(pairs: Sequence[PairRow], folder: Path, model: Model, options: RegisterOptions) -> None:
    """Refuses, before any work, results that were made otherwise."""
    if options.overwrite:
        return
    refused = [reason for pair in pairs if (reason := _why_not(pair, folder / pair.name, model, options))]
    if refused:
        more = f" (and {len(refused) - 1} more pairs)" if len(refused) > 1 else ""
        raise InputError(
            f"{refused[0]}{more}; add `overwrite=True` to register what differs again, or name another folder"
        )


def _start(settings: _Settings) -> Callable[[PairRow], dict[str, Any]]:
    """What registers a pair, in this process."""
    model = settings.loaded()
    placed = PlacedScans(settings.folder / STATE / "scans", settings.shared)
    return lambda pair: _register(pair, settings, model, placed)


def _register(pair: PairRow, settings: _Settings, model: Model, placed: PlacedScans) -> dict[str, Any]:
    """Registers a pair unless that is done or another process does it, and gives its row of the table."""
    folder, options = settings.folder, settings.options
    with ExitStack() as held:
        lock = folder / STATE / f".{pair.name}.lock"
        if settings.wait:
            held.enter_context(locked(lock, wait=True))
        elif not held.enter_context(lock_if_free(lock)):
            return row_of(pair, folder, _RUNNING, "another process is registering it")
        error = details = ""
        differs = _why_not(pair, folder / pair.name, model, options)
        try:
            if (folder / pair.name / SUMMARY).is_file() and not differs:
                _log.info("%s: registered already", folder / pair.name)
            elif differs and not options.overwrite:
                raise InputError(differs)
            else:
                fixed, moving, chosen = _inputs(pair, options)
                register_scans(fixed, moving, folder / pair.name, model, chosen, placed)
            if settings.bids is not None:
                lay_out(settings.bids, folder / pair.name, pair.files["fixed"], pair.files["moving"])
        except InputError as problem:
            error = " ".join(str(problem).split())
        except RunStoppedError:
            raise
        except Exception as problem:  # no pair may take the others with it
            error = f"unexpected {type(problem).__name__}: {' '.join(str(problem).split())}"
            details = traceback.format_exc()
        if error:
            _log.error("%s: %s", pair.name, error)
            record_error(folder, pair, error, details)
            return row_of(pair, folder, "error", error)
        error_path(folder, pair).unlink(missing_ok=True)
        return row_of(pair, folder)


def _inputs(pair: PairRow, options: RegisterOptions) -> tuple[str, str, RegisterOptions]:
    """Fixed and moving image of a pair, and the options with the pair's files."""
    files: dict[str, Any] = dict(pair.files)
    fixed, moving = files.pop("fixed"), files.pop("moving")
    return fixed, moving, replace(options, **files)


def _why_not(pair: PairRow, folder: Path, model: Model, options: RegisterOptions) -> str | None:
    """Why the results in a pair's folder cannot stand for those wanted; None if they can, or if there are none."""
    if not (folder / SUMMARY).is_file():
        return None
    try:
        stored = read_summary(folder)["made_from"]
    except InputError as problem:
        return str(problem).partition(";")[0]
    try:
        wanted = made_from(*_inputs(pair, options), model)
    except InputError:
        return None  # a file is unreadable now: the results are of when it was
    differences = compare(stored, wanted)
    if differences:
        return f"{folder}: was registered otherwise: {in_words(differences)}"
    return None
