"""Registers the pairs of a table with one model, and writes a table of the results."""

import csv
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing
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
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restkey="", strict=True)
            columns = list(reader.fieldnames or [])
            lines = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise InputError(f"{table}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as a CSV table ({error})") from None
    unknown = [column for column in columns if column not in ("name", *FILE_COLUMNS)]
    if unknown or not {"fixed", "moving"} <= set(columns):
        problem = f"unknown column {unknown[0]!r}" if unknown else "no columns fixed and moving"
        raise InputError(
            f"{table}: {problem}; the header is fixed,moving and if wanted name,{','.join(FILE_COLUMNS[2:])}"
        )
    if not lines:
        raise InputError(f"{table}: holds no pair; add a line for each")
    pairs, missing, names = [], [], set()
    for number, row in lines:
        if "" in row or None in row.values():
            raise InputError(f"{table}, line {number}: another number of values than the header has; correct the line")
        files = {column: row[column].strip() for column in columns if column != "name" and row[column].strip()}
        if "fixed" not in files or "moving" not in files:
            raise InputError(f"{table}, line {number}: fixed or moving is empty; name a file, or {BUILT_IN[0]}")
        files = {column: _located(table, value) for column, value in files.items()}
        missing += [value for value in files.values() if value not in BUILT_IN and not Path(value).is_file()]
        name = (row.get("name") or "").strip() or f"{_stem(files['fixed'])}_{_stem(files['moving'])}"
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise InputError(f"{table}, line {number}: the name {name!r} is no folder's; use letters, digits, - and _")
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

    A pair that cannot be registered is listed in the table with the reason, and the next pairs are registered.

    Args:
        pairs: of :func:`read_pairs`.
        folder: of the results.
        model: of :func:`~sitreg_lumir.registration.model.load_model`.
        options: for all pairs, without the files that the table names; with ``overwrite``, all are registered again.

    Returns:
        the table's rows.

    Raises:
        InputError: the folder cannot be written.
    """
    rows: list[dict[str, Any]] = []
    for count, pair in enumerate(pairs, start=1):
        _log.info("pair %d of %d: %s", count, len(pairs), pair.name)
        pair_folder = folder / pair.name
        error = ""
        if (pair_folder / SUMMARY).is_file() and not options.overwrite:
            _log.info("%s: registered already", pair_folder)
        else:
            try:
                files: dict[str, Any] = dict(pair.files)
                fixed, moving = files.pop("fixed"), files.pop("moving")
                register_scans(fixed, moving, pair_folder, model, replace(options, **files))
            except InputError as problem:
                error = " ".join(str(problem).split())
                _log.error("%s: %s", pair.name, error)
        rows.append(_row(pair, pair_folder, error))
        _write(folder / TABLE, rows)
    return rows


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
    with writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _located(table: Path, value: str) -> str:
    return value if value in BUILT_IN else str(table.parent / value)


def _stem(file: str) -> str:
    return Path(file).name.removesuffix(".gz").removesuffix(".nii")
