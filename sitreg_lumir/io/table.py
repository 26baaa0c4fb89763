"""Tables of text as spreadsheets write them: commas, semicolons or tabs, quotes, byte order marks, empty rows."""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.bounded import read_bytes

_LARGEST = 1 << 28  # bytes
DELIMITERS = (",", ";", "\t")
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")  # bytes that no text holds


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        header: cells of the first line, which name the columns.
        names: of the columns, without blanks around them.
        rows: line in the file and cells of each row that is not empty, without those beyond the last named column if
            these are empty.
        delimiter: between cells.
    """

    header: list[str]
    names: list[str]
    rows: list[tuple[int, list[str]]]
    delimiter: str


def read_table(path: Path, remedy: str) -> Table:
    """Reads a table whose first line names the columns; bytes that are not UTF-8 become surrogates, as in file names.

    Args:
        path: UTF-8 or UTF-16.
        remedy: what the error tells users to do with an unreadable file.

    Raises:
        InputError: the file is missing, too large or no text, or its quotes do not match.
    """
    try:
        lines = _text(read_bytes(path, _LARGEST, "a table")).splitlines(keepends=True)
        first = next((number for number, line in enumerate(lines) if line.strip()), 0)
        stated = re.fullmatch(r"sep=(.)\s*", lines[first]) if lines else None  # a line that Excel understands
        start = first + 1 if stated else first
        delimiter = stated[1] if stated else _delimiter(lines[start] if lines else "")
        reader = csv.reader(lines[start:], delimiter=delimiter, strict=True)
        rows = [(start + reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a readable CSV file ({reason}); {remedy}") from None
    names = [cell.strip() for cell in rows[0][1]] if rows else []
    while names and not names[-1]:
        names.pop()
    header = rows[0][1][: len(names)] if rows else []
    return Table(header, names, [(line, _without_empty_end(row, len(names))) for line, row in rows[1:]], delimiter)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the names of the first one's cells above them, whole or not at all."""
    with (
        writing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _text(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    control = _CONTROL.search(content[: 1 << 16])
    if control:
        raise csv.Error(f"byte {control[0].hex()} at {control.start()}")
    return content.decode("utf-8-sig", errors="surrogateescape")


def _delimiter(header: str) -> str:
    """The delimiter of which a header has most; a comma if it has none."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=lambda delimiter: (bare.count(delimiter), delimiter == ","))


def _without_empty_end(row: list[str], columns: int) -> list[str]:
    while len(row) > columns and not row[-1].strip():
        row = row[:-1]
    return row
