"""Points as a table with the columns x, y, z in mm; whatever other columns there are stay as they are."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.table import read_table

_LPS = np.array([-1.0, -1.0, 1.0])  # signs, RAS <-> LPS


@dataclass(frozen=True, eq=False)
class PointTable:
    """A table of points.

    Args:
        rows: all cells as text, the header first.
        axes: the columns that hold x, y and z.
        points: ``(N, 3)`` float64, RAS, mm; NaN where a cell says so.
        lps: whether the text is in LPS, ITK's coordinates.
        delimiter: between cells.
        decimal_comma: whether numbers have a comma for the point.
    """

    rows: list[list[str]]
    axes: tuple[int, int, int]
    points: NDArray[np.float64]
    lps: bool
    delimiter: str = ","
    decimal_comma: bool = False


def read_points(path: Path, *, lps: bool = False) -> PointTable:
    """Reads a table whose header names the columns x, y and z, in any place.

    Args:
        path: cells separated by commas, semicolons or tabs (then numbers may have a decimal comma); empty rows are
            skipped.
        lps: whether its numbers are in LPS instead of RAS.

    Raises:
        InputError: the file is missing, unreadable or empty, a column is missing or there twice, or a line has another
            number of cells or something else than numbers.
    """
    table = read_table(path, "export the points as CSV, UTF-8")
    names = table.names
    if any(names.count(axis) != 1 for axis in "xyz"):
        names = [name.lower() for name in names]
    if any(names.count(axis) != 1 for axis in "xyz"):
        present = table.delimiter.join(table.names)[:80] or "nothing"
        raise InputError(f"{path}: the first line must name the columns x, y and z once each, it has {present}")
    if not table.rows:
        raise InputError(f"{path}: only a header, no points")
    x, y, z = axes = names.index("x"), names.index("y"), names.index("z")
    comma = table.delimiter != "," and any(
        "," in row[axis] for _, row in table.rows for axis in axes if axis < len(row)
    )
    points = np.array([_numbers(path, line, row, len(names), (x, y, z), comma) for line, row in table.rows])
    rows = [table.header, *(row for _, row in table.rows)]
    return PointTable(rows, (x, y, z), points * _LPS if lps else points, lps, table.delimiter, comma)


def save_points(path: Path, table: PointTable, points: NDArray[Any]) -> None:
    """Writes a table with other coordinates, to a nanometre, all other cells and the order as they were.

    Args:
        path: replaced if it exists, and only by a whole file.
        table: the rows, and whether the text is in LPS.
        points: ``(N, 3)``, RAS, mm, one for each row; NaN is written as ``NaN``.

    Raises:
        ValueError: another number of points than rows.
        InputError: the file cannot be written.
    """
    if points.shape != table.points.shape:
        raise ValueError(f"points must be {table.points.shape}, got {points.shape}")
    header, *rows = table.rows
    with (
        writing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        writer = csv.writer(stream, delimiter=table.delimiter, lineterminator="\n")
        writer.writerow(header)
        for row, point in zip(rows, points * _LPS if table.lps else points, strict=True):
            texts = {axis: _text(value, table.decimal_comma) for axis, value in zip(table.axes, point, strict=True)}
            writer.writerow([texts.get(column, cell) for column, cell in enumerate(row)])


def _numbers(
    path: Path, line: int, row: list[str], columns: int, axes: tuple[int, int, int], comma: bool
) -> list[float]:
    if len(row) != columns:
        raise InputError(f"{path}: line {line} has {len(row)} cells, the header {columns}; fix the file")
    numbers = []
    for axis, column in zip("xyz", axes, strict=True):
        try:
            numbers.append(float(row[column].replace(",", ".") if comma else row[column]))
        except ValueError:
            numbers.append(math.inf)
        if math.isinf(numbers[-1]):
            raise InputError(f"{path}: line {line}: {axis} is {row[column][:40]!r}, not a number of mm; fix the file")
    return numbers


def _text(value: float, comma: bool) -> str:
    text = "NaN" if math.isnan(value) else f"{value:.6f}"
    return text.replace(".", ",") if comma else text
