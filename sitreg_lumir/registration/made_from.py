"""What a registration was made from: the SHA-256 of every file, the members, and the options that change results."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sitreg_lumir import __version__
from sitreg_lumir.io.checksum import file_entry
from sitreg_lumir.registration.model import Model
from sitreg_lumir.registration.options import RegisterOptions
from sitreg_lumir.registration.scan import BUILT_IN

_WITHOUT_EFFECT = ("report", "overwrite")  # options that change no result
_FILE_OPTIONS = ("_mask", "_lesion", "_to_template", "initial_transform")  # ends of the names of options that are files


def made_from(
    fixed: str | Path,
    moving: str | Path,
    options: RegisterOptions,
    model: Model,
    read: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The entry ``made_from`` of a summary; equal entries mean equal results.

    Args:
        fixed: file of the fixed scan, or a built-in name.
        moving: that of the moving scan.
        options: with the pair's files.
        model: that registers them.
        read: SHA-256 of the bytes that were read, by absolute paths, see
            :func:`~sitreg_lumir.io.bounded.recorded_checksums`; of other files it is that of the file as it is now.

    Raises:
        InputError: a file cannot be read.
    """
    values = asdict(options)
    files = {name: values[name] for name in values if name.endswith(_FILE_OPTIONS)}
    files = {"fixed": fixed, "moving": moving} | files
    named = {name: str(file) for name, file in files.items() if file is not None}
    return {
        "files": {name: file if file in BUILT_IN else file_entry(Path(file), read) for name, file in named.items()},
        "options": _of_effect(options),
        "members": [dict(entry) for entry in model.checksums],
        "precision": model.precision,
        "flip": model.flip,
        "version": __version__,
    }


def with_later_options(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored entry with the defaults of options that came later, as which it was made."""
    options = stored.get("options")
    return stored | {"options": _of_effect(RegisterOptions()) | options} if isinstance(options, dict) else stored


def _of_effect(options: RegisterOptions) -> dict[str, Any]:
    """The options that change results and are not files, as JSON has them."""
    values = {name: value for name, value in asdict(options).items() if not name.endswith(_FILE_OPTIONS)}
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in values.items()
        if name not in _WITHOUT_EFFECT
    }
