"""Reads a table of pairs: their names and files."""

import os
from dataclasses import dataclass
from pathlib import Path

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.other_formats import without_suffix
from sitreg_lumir.io.table import read_table
from sitreg_lumir.registration.scan import BUILT_IN

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


@dataclass(frozen=True)
class PairRow:
    """A line of the table: the pair's name, which is also its folder's, and the files by column."""

    name: str
    files: dict[str, str]


def read_pairs(table: Path, *, check_files: bool = True) -> list[PairRow]:
    """The pairs of a CSV with a header; paths are relative to the table.

    Args:
        table: columns ``fixed`` and ``moving``, and if wanted ``name`` and others of :data:`FILE_COLUMNS`. Without a
            name a pair is called ``<fixed>_<moving>`` after its files.
        check_files: whether all files have to be there.

    Raises:
        InputError: not such a table, a file is missing, or two pairs have one name.
    """
    content = read_table(table, "export it as CSV, UTF-8")
    columns = [name.lower() for name in content.names]
    unknown = [column for column in columns if column not in ("name", *FILE_COLUMNS)]
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if unknown or twice or not {"fixed", "moving"} <= set(columns):
        problem = f"unknown column {unknown[0][:40]!r}" if unknown else "no columns fixed and moving"
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
            raise InputError(
                f"{table}, line {number}: the name {name[:200]!r} {no_folder}; add a column `name` with others"
            )
        if name.casefold() in names:
            raise InputError(
                f"{table}, line {number}: a second pair called {name}; add a column `name` with different names"
            )
        names.add(name.casefold())
        pairs.append(PairRow(name, files))
    if missing and check_files:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{missing[0]}: no such file, named in {table}{more}; paths are relative to the table")
    return pairs


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
