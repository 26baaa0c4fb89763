"""What is known of the pairs of a table: results, errors, what is missing; and the table ``pairs.csv``."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sitreg_lumir.challenge.provenance import compare, in_words
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.checksum import file_entry
from sitreg_lumir.io.json_file import read_json
from sitreg_lumir.io.table import write_table
from sitreg_lumir.registration.made_from import with_later_options
from sitreg_lumir.registration.outputs import REPORT, SUMMARY
from sitreg_lumir.registration.pairs_table import PairRow
from sitreg_lumir.registration.scan import BUILT_IN

TABLE = "pairs.csv"
STATE = ".pairs"
"""Folder within that of the results: the errors of pairs, locks, and what is kept of scans that pairs share."""
JUDGED = ("ok", "check", "failed")
"""Verdicts of pairs that are registered; the others are ``error``, ``missing`` and ``outdated``."""


def error_path(folder: Path, pair: PairRow) -> Path:
    """Where the error of a pair is recorded that could not be registered."""
    return folder / STATE / f"{pair.name}.error.json"


def record_error(folder: Path, pair: PairRow, reason: str, details: str = "") -> None:
    """Records why a pair could not be registered.

    Args:
        folder: of all results.
        pair: that could not be registered.
        reason: one line.
        details: a traceback of an unexpected error.
    """
    with writing(error_path(folder, pair)) as temporary:
        content = {"name": pair.name, "reason": reason} | ({"traceback": details} if details else {})
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def recorded_error(folder: Path, pair: PairRow) -> str:
    """The recorded error of a pair; empty if there is none."""
    with suppress(InputError, KeyError):
        return str(read_json(error_path(folder, pair), "an error", "")["reason"])
    return ""


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a registration's folder.

    Raises:
        InputError: it is missing or damaged.
    """
    path = folder / SUMMARY
    remedy = "register the pair again with `overwrite=True`"
    try:
        summary = read_json(path, "a summary", remedy)
    except InputError as error:
        raise InputError(f"{path}: not a readable summary ({str(error).removeprefix(f'{path}: ')})") from None
    problem = _summary_problem(summary)
    if problem:
        raise InputError(f"{path}: {problem}; {remedy}")
    summary["made_from"] = with_later_options(summary["made_from"])
    return summary


def _summary_problem(summary: dict[str, Any]) -> str | None:
    """Why an object is no summary of a registration; None if it is one."""
    if not isinstance(summary.get("made_from"), dict):
        return "does not say what it was made from"
    if summary.get("verdict") not in JUDGED:
        return "does not say its verdict"
    reasons = summary.get("reasons")
    if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
        return "its reasons are no list of lines"
    seconds = summary.get("seconds", {})
    if not isinstance(seconds, dict) or not all(isinstance(value, int | float) for value in seconds.values()):
        return "its seconds are no numbers"
    similarity = summary.get("similarity", {})
    parts = [similarity, *(similarity.values() if isinstance(similarity, dict) else ())]
    parts += [summary.get(name) for name in ("inverse_error_mm", "uncertainty_mm")]
    if not all(part is None or isinstance(part, dict) for part in parts):
        return "its measures are no numbers by names"
    return None


def row_of(pair: PairRow, folder: Path, verdict: str = "", reasons: str = "") -> dict[str, Any]:
    """A pair's row of the table.

    Args:
        pair: the pair.
        folder: of all results.
        verdict: of a pair without results; empty for a pair whose folder is whole.
        reasons: of that verdict.
    """
    row: dict[str, Any] = {"name": pair.name, "fixed": Path(pair.files["fixed"]).name}
    row |= {"moving": Path(pair.files["moving"]).name, "verdict": verdict, "reasons": reasons}
    summary = {} if verdict else read_summary(folder / pair.name)
    if summary:
        row |= {"verdict": summary["verdict"], "reasons": "; ".join(summary["reasons"])}
    similarity = summary.get("similarity") or {}
    for stage in ("aligned", "registered"):
        for key in ("mind", "lncc", "brain_overlap"):
            row[f"{key}_{stage}"] = (similarity.get(stage) or {}).get(key)
    row["ndv_percent"] = summary.get("ndv_percent")
    for key in ("median", "p99"):
        row[f"inverse_error_mm_{key}"] = (summary.get("inverse_error_mm") or {}).get(key)
    row["uncertainty_mm_median"] = (summary.get("uncertainty_mm") or {}).get("median")
    row["seconds"] = sum(summary.get("seconds", {}).values()) or None
    row["report"] = f"{pair.name}/{REPORT}" if (folder / pair.name / REPORT).is_file() else None
    return row


def collect(pairs: Sequence[PairRow], folder: Path) -> list[dict[str, Any]]:
    """Writes ``folder/pairs.csv`` of what is there, whichever processes made it.

    Args:
        pairs: of :func:`~sitreg_lumir.registration.pairs_table.read_pairs`; their files need not be there any more.
        folder: of the results.

    Returns:
        the table's rows. The verdict of a pair is ``missing`` if it was not registered, ``error`` if it could not be,
        and ``outdated`` if one of its files, or what the table names, changed since.

    Raises:
        InputError: the folder is not there; or pairs were registered with different options or members, which the
            table, written all the same, must not mix unnoticed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the one that the pairs were registered into with `out`")
    rows, settings = [], {}
    for pair in pairs:
        if not (folder / pair.name / SUMMARY).is_file():
            error = recorded_error(folder, pair)
            rows.append(row_of(pair, folder, "error" if error else "missing", error or "not registered yet"))
            continue
        try:
            made_from = read_summary(folder / pair.name)["made_from"]
        except InputError as problem:
            rows.append(row_of(pair, folder, "error", str(problem)))
            continue
        changed = _changed(pair, made_from)
        rows.append(row_of(pair, folder, "outdated" if changed else "", changed))
        settings[pair.name] = {name: value for name, value in made_from.items() if name != "files"}
    write_table(folder / TABLE, rows)
    first = next(iter(settings), "")
    for name, own in settings.items():
        differences = compare(settings[first], own)
        if differences:
            raise InputError(
                f"{folder}: {first} and {name} were registered with different settings ({in_words(differences)}, seen "
                f"from the first); register them again with the same ones and `overwrite=True` ({TABLE} is written)"
            )
    return rows


def _changed(pair: PairRow, made_from: dict[str, Any]) -> str:
    """What changed of a pair's files since it was registered; empty if nothing did, or the files are gone."""
    stored = made_from.get("files")
    if not isinstance(stored, dict):
        return "its summary does not say which files it was made from"
    if set(stored) != set(pair.files):
        return f"registered with {', '.join(sorted(stored))}; the table names {', '.join(sorted(pair.files))}"
    for role, file in pair.files.items():
        if file in BUILT_IN or not isinstance(stored[role], dict):
            same = file == stored[role]
        else:
            same = not Path(file).is_file() or file_entry(Path(file))["sha256"] == stored[role].get("sha256")
        if not same:
            return f"{role} {Path(file).name} is another file than the one that was registered"
    return ""
