"""Where trained members are found: by path or name; none named, by an environment variable, else the shipped ones."""

import os
from collections.abc import Sequence
from pathlib import Path

from sitreg_lumir.errors import InputError

VARIABLE = "SITREG_LUMIR_WEIGHTS"
"""Names members, files or folders with ``os.pathsep`` between them, to be used instead of the shipped ones."""

SHIPPED = Path(__file__).resolve().parents[1] / "weights"
"""Folder of the members that come with the package."""


def default_members() -> list[Path]:
    """The files of the members that are used when none are named.

    Raises:
        InputError: the variable names what is not there, or nothing came with the package.
    """
    named = os.environ.get(VARIABLE)
    if named:
        try:
            return member_files([part for part in named.split(os.pathsep) if part])
        except InputError as error:
            raise InputError(f"{VARIABLE}: {error}") from None
    files = shipped_members()
    if not files:
        raise InputError(f"{SHIPPED}: no trained members here; name some, or set {VARIABLE} to a file or folder")
    return files


def shipped_members() -> list[Path]:
    """The files of the members that come with the package."""
    return sorted(SHIPPED.glob("*.safetensors"))


def member_files(paths: Sequence[str | Path]) -> list[Path]:
    """The member files that ``paths`` stand for, in order: files, folders, or names of members that are shipped.

    Raises:
        InputError: a path is missing, or a folder holds no member.
    """
    files: list[Path] = []
    shipped = {file.stem: file for file in shipped_members()}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(path.glob("[!.]*.safetensors")) or sorted(path.glob("[!.]*.ckpt"))
            if not inside:
                raise InputError(f"{path}: the folder holds no .safetensors or .ckpt file")
            files += inside
        elif path.is_file():
            files.append(path)
        elif str(path).removesuffix(".safetensors") in shipped:
            files.append(shipped[str(path).removesuffix(".safetensors")])
        else:
            raise InputError(
                f"{path}: no such file or folder; name trained members (.ckpt or .safetensors), or shipped ones "
                f"({', '.join(shipped)})"
            )
    if not files:
        raise InputError("no member given; name one or more .ckpt or .safetensors files")
    return files
