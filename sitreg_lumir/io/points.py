"""Points as a CSV table with the columns x, y, z in mm; whatever other columns there are stay as they are."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing

_LPS = np.array([-1.0, -1.0, 1.0])  # signs, RAS <-> LPS


@dataclass(frozen=True, eq=False)
class PointTable:
    """A CSV table of points.

    Args:
        rows: all cells as text, the header first.
        axes: the columns that hold x, y and z.
        points: ``(N, 3)`` float64, RAS, mm; NaN where a cell says so.
        lps: whether the text is in LPS, ITK's coordinates.
    """

    rows: list[list[str]]
    axes: tuple[int, int, int]
    points: NDArray[np.float64]
    lps: bool


def read_points(path: Path, *, lps: bool = False) -> PointTable:
    """Reads a CSV file whose header names the columns x, y and z, in any place.

    Args:
        path: UTF-8, cells separated by commas; empty lines are skipped.
        lps: whether its numbers are in LPS instead of RAS.

    Raises:
        InputError: the file is missing, unreadable or empty, a column is missing or there twice, or a line has another
            number of cells or something else than numbers.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            lines = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a readable CSV file ({reason}); export the points as CSV, UTF-8") from None
    names = [cell.strip() for cell in lines[0][1]] if lines else []
    if any(names.count(axis) != 1 for axis in "xyz"):
        present = ",".join(names)[:80] or "nothing"
        raise InputError(f"{path}: the first line must name the columns x, y and z once each, it has {present}")
    if len(lines) == 1:
        raise InputError(f"{path}: only a header, no points")
    x, y, z = (names.index(axis) for axis in "xyz")
    points = np.array([_numbers(path, line, row, len(names), (x, y, z)) for line, row in lines[1:]])
    return PointTable([row for _, row in lines], (x, y, z), points * _LPS if lps else points, lps)


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
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        for row, point in zip(rows, points * _LPS if table.lps else points, strict=True):
            texts = dict(zip(table.axes, map(_text, point), strict=True))
            writer.writerow([texts.get(column, cell) for column, cell in enumerate(row)])


def _numbers(path: Path, line: int, row: list[str], columns: int, axes: tuple[int, int, int]) -> list[float]:
    if len(row) != columns:
        raise InputError(f"{path}: line {line} has {len(row)} cells, the header {columns}; fix the file")
    numbers = []
    for axis, column in zip("xyz", axes, strict=True):
        try:
            numbers.append(float(row[column]))
        except ValueError:
            numbers.append(math.inf)
        if math.isinf(numbers[-1]):
            raise InputError(f"{path}: line {line}: {axis} is {row[column][:40]!r}, not a number of mm; fix the file")
    return numbers


def _text(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.6f}"
