"""Where trained members are found when none are named: an environment variable, then what comes with the package."""

import os
from pathlib import Path

from sitreg_lumir.errors import InputError
from sitreg_lumir.network.weights import member_files

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
