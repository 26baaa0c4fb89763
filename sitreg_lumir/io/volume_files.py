"""The files of one volume: most are one, some have a header and voxels apart."""

import re
from pathlib import Path

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.text_headers import read_text_header, voxels_file

PAIR_SUFFIXES = (".img", ".hdr", ".img.gz", ".hdr.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")


def has_suffix(name: str, *suffixes: str) -> bool:
    """Whether a file's name ends so, in capitals or not."""
    return name.lower().endswith(suffixes)


def pair_files(path: Path) -> tuple[Path, Path]:
    """Header and voxels of a ``.hdr`` with its ``.img``, also compressed or in capitals, by the name of either."""
    files = []
    for wanted in ("hdr", "img"):
        named = re.sub(r"(?i)\.(img|hdr)(\.gz)?$", "", path.name)
        options = [path.with_name(f"{named}.{ending}") for ending in (wanted, wanted.upper(), f"{wanted}.gz")]
        files.append(next((option for option in options if option.is_file()), options[0]))
    return files[0], files[1]


def volume_files(path: Path) -> list[Path]:
    """The files that hold a volume, header first; the file alone where another one is missing or cannot be told."""
    files = [path]
    if has_suffix(path.name, *PAIR_SUFFIXES):
        files = list(pair_files(path))
    elif has_suffix(path.name, *ITK_SUFFIXES):
        try:
            files = [path, voxels_file(path, read_text_header(path))]
        except (InputError, OSError, ValueError):  # for the reader to refuse
            return [path]
    return files if len(set(files)) == 2 and all(file.is_file() for file in files) else [path]
