"""Registers the pairs of a table with one model, and writes a table of the results."""

import csv
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sitreg_lumir.challenge.provenance import compare
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.other_formats import without_suffix
from sitreg_lumir.io.table import read_table
from sitreg_lumir.registration.made_from import made_from
from sitreg_lumir.registration.model import Model
from sitreg_lumir.registration.options import RegisterOptions
from sitreg_lumir.registration.outputs import REPORT, SUMMARY
from sitreg_lumir.registration.register import register_scans
from sitreg_lumir.registration.scan import BUILT_IN

TABLE = "pairs.csv"
FILE_COLUMNS = (
    "fixed",
    "moving",
    "fixed_mask",
    "moving_mask",
    "fixed_lesion",
    "moving_lesion",
    "fixed_to_template",
    "moving_to_template",
    "initial_transform",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairRow:
    """A line of the table: the pair's name, which is also its folder's, and the files by column."""

    name: str
    files: dict[str, str]


def read_pairs(table: Path) -> list[PairRow]:
    """The pairs of a CSV with a header; paths are relative to the table.

    Args:
        table: columns ``fixed`` and ``moving``, and if wanted ``name`` and others of :data:`FILE_COLUMNS`. Without a
            name a pair is called ``<fixed>_<moving>`` after its files.

    Raises:
        InputError: not such a table, a file is missing, or two pairs have one name.
    """
    content = read_table(table, "export it as CSV, UTF-8")
    columns = [name.lower() for name in content.names]
    unknown = [column for column in columns if column not in ("name", *FILE_COLUMNS)]
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if unknown or twice or not {"fixed", "moving"} <= set(columns):
        problem = f"unknown column {unknown[0]!r}" if unknown else "no columns fixed and moving"
        problem = f"two columns {twice}" if twice else problem
        raise InputError(
            f"{table}: {problem}; the header is fixed,moving and if wanted name,{','.join(FILE_COLUMNS[2:])}"
        )
    if not content.rows:
        raise InputError(f"{table}: holds no pair; add a line for each")
    pairs, missing, names = [], [], set()
    for number, cells in content.rows:
        if len(cells) > len(columns):
            raise InputError(
                f"{table}, line {number}: more values than the header has; quote names that hold one of , ;"
            )
        row = dict(zip(columns, map(_unquoted, cells), strict=False))
        files = {column: value for column, value in row.items() if column != "name" and value}
        if "fixed" not in files or "moving" not in files:
            raise InputError(f"{table}, line {number}: fixed or moving is empty; name a file, or {BUILT_IN[0]}")
        files = {column: _located(table, value) for column, value in files.items()}
        missing += [value for value in files.values() if value not in BUILT_IN and not Path(value).is_file()]
        name = row.get("name", "") or f"{_stem(files['fixed'])}_{_stem(files['moving'])}"
        no_folder = _name_problem(name)
        if no_folder:
            raise InputError(f"{table}, line {number}: the name {name!r} {no_folder}; add a column `name` with others")
        if name.casefold() in names:
            raise InputError(
                f"{table}, line {number}: a second pair called {name}; add a column `name` with different names"
            )
        names.add(name.casefold())
        pairs.append(PairRow(name, files))
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{missing[0]}: no such file, named in {table}{more}; paths are relative to the table")
    return pairs


def register_pairs(
    pairs: Sequence[PairRow], folder: Path, model: Model, options: RegisterOptions
) -> list[dict[str, Any]]:
    """Registers all pairs into ``folder/<name>`` and writes ``folder/pairs.csv``; skips what is registered.

    A pair is skipped if it was registered from the same files by the same members with the same options. A pair that
    cannot be registered is listed in the table with the reason, and the next pairs are registered.

    Args:
        pairs: of :func:`read_pairs`.
        folder: of the results.
        model: of :func:`~sitreg_lumir.registration.model.load_model`.
        options: for all pairs, without the files that the table names; with ``overwrite``, pairs are registered again
            that were registered otherwise.

    Returns:
        the table's rows.

    Raises:
        InputError: without ``overwrite``, a pair was registered otherwise; it says what differs. Or the folder cannot
            be written.
    """
    reasons = {pair.name: _why_not(pair, folder / pair.name, model, options) for pair in pairs}
    refused = [reason for reason in reasons.values() if reason]
    if refused and not options.overwrite:
        more = f" (and {len(refused) - 1} more pairs)" if len(refused) > 1 else ""
        raise InputError(
            f"{refused[0]}{more}; add `overwrite=True` to register what differs again, or name another folder"
        )
    rows: list[dict[str, Any]] = []
    for count, pair in enumerate(pairs, start=1):
        _log.info("pair %d of %d: %s", count, len(pairs), pair.name)
        pair_folder = folder / pair.name
        error = ""
        if (pair_folder / SUMMARY).is_file() and not reasons[pair.name]:
            _log.info("%s: registered already", pair_folder)
        else:
            try:
                fixed, moving, chosen = _inputs(pair, options)
                register_scans(fixed, moving, pair_folder, model, chosen)
            except InputError as problem:
                error = " ".join(str(problem).split())
                _log.error("%s: %s", pair.name, error)
        rows.append(_row(pair, pair_folder, error))
        _write(folder / TABLE, rows)
    return rows


def _inputs(pair: PairRow, options: RegisterOptions) -> tuple[str, str, RegisterOptions]:
    """Fixed and moving image of a pair, and the options with the pair's files."""
    files: dict[str, Any] = dict(pair.files)
    fixed, moving = files.pop("fixed"), files.pop("moving")
    return fixed, moving, replace(options, **files)


def _why_not(pair: PairRow, folder: Path, model: Model, options: RegisterOptions) -> str | None:
    """Why the results in a pair's folder cannot stand for those wanted; None if they can, or if there are none."""
    path = folder / SUMMARY
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        stored = summary.get("made_from")
    except (OSError, ValueError, AttributeError):
        return f"{path}: not a readable summary"
    if not isinstance(stored, dict):
        return f"{path}: does not say what it was made from"
    try:
        wanted = made_from(*_inputs(pair, options), model)
    except InputError:
        return None  # a file is unreadable now: the results are of when it was
    differences = compare(stored, wanted)
    if differences:
        return f"{folder}: was registered otherwise: {', '.join(str(difference) for difference in differences[:5])}"
    return None


def _name_problem(name: str) -> str | None:
    """What keeps a pair's name from being a folder's."""
    readable = "".join(
        character for character in name if not "\udc80" <= character <= "\udcff"
    )  # bytes of other letters
    if name.startswith(".") or any(character in "/\\:" for character in name) or not readable.isprintable():
        return "is no folder's: it holds / \\ : or characters that cannot be seen, or starts with a point"
    return "is too long for a folder's" if len(name.encode("utf-8", "surrogateescape")) > 200 else None


def _unquoted(cell: str) -> str:
    """A cell without blanks, and without the quotes that a blank before them kept."""
    cell = cell.strip()
    return cell[1:-1].strip() if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _row(pair: PairRow, pair_folder: Path, error: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": pair.name, "fixed": Path(pair.files["fixed"]).name}
    row |= {"moving": Path(pair.files["moving"]).name, "verdict": "error", "reasons": error}
    summary: dict[str, Any] = {} if error else json.loads((pair_folder / SUMMARY).read_text())
    if summary:
        row |= {"verdict": summary["verdict"], "reasons": "; ".join(summary["reasons"])}
    similarity = summary.get("similarity", {})
    for stage in ("aligned", "registered"):
        for key in ("mind", "lncc", "brain_overlap"):
            row[f"{key}_{stage}"] = (similarity.get(stage) or {}).get(key)
    row["ndv_percent"] = summary.get("ndv_percent")
    for key in ("median", "p99"):
        row[f"inverse_error_mm_{key}"] = summary.get("inverse_error_mm", {}).get(key)
    row["uncertainty_mm_median"] = (summary.get("uncertainty_mm") or {}).get("median")
    row["seconds"] = sum(summary.get("seconds", {}).values()) or None
    row["report"] = f"{pair.name}/{REPORT}" if (pair_folder / REPORT).is_file() else None
    return row


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with (
        writing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _located(table: Path, value: str) -> str:
    """A file's path; a name that is not UTF-8 in the table is that of the file's bytes, or Windows' letters."""
    if value in BUILT_IN:
        return value
    path = table.parent / value
    if any("\udc80" <= character <= "\udcff" for character in value) and not path.is_file():
        path = table.parent / os.fsencode(value).decode("cp1252", errors="replace")
    return str(path)


def _stem(file: str) -> str:
    return without_suffix(Path(file).name)
