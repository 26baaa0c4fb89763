"""Configs by name or path, and the nearest name when one is misspelt. Imports nothing heavy."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from sitreg_lumir.errors import InputError


def configs_folder() -> Path:
    """Where the shipped configs are: in the installed package, else at the top of the clone."""
    package = Path(__file__).parents[1]
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Names of the shipped configs, such as ``ens_seed3`` and ``minilumir/mind_small``."""
    folder = configs_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def resolve_config(name: str) -> Path:
    """The file that ``--config NAME`` means: a path, or the name of a shipped config.

    Raises:
        InputError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = configs_folder() / f"{name.removesuffix('.yaml').removeprefix('configs/')}.yaml"
    if shipped.is_file():
        return shipped
    raise InputError(f"{name}: no such config file or shipped config{nearest(name, config_names())}")


def nearest(wrong: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` with the closest known name, or the list of all when none is close."""
    known = sorted(set(known))
    close = get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; choose from {', '.join(known)}"
