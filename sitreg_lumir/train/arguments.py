"""Arguments for LightningCLI from what users write: short forms, and what they may leave out."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sitreg_lumir.data.location import usual_data
from sitreg_lumir.train.config_file import read_config
from sitreg_lumir.train.configs import configs_folder, resolve_config

_SEEDS = ("seed_everything", "data.seed")


def with_data_root(args: Sequence[str]) -> list[str]:
    """Turns ``--data FOLDER`` and ``--data FILE.json`` into ``--data.root``; a YAML file stays Lightning's."""
    result: list[str] = []
    arguments = list(args)
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.partition("=")
        if name != "--data" or (not equals and not arguments):
            result.append(argument)
            continue
        value = value if equals else arguments.pop(0)
        is_yaml = value.endswith((".yaml", ".yml")) or value.lstrip().startswith("{")
        result += [f"--data={value}" if is_yaml else f"--data.root={value}"]
    return result


def complete(args: Sequence[str], *, needs_data: bool = True) -> list[str]:
    """Resolves configs and adds what can be left out: the data set, and one of the two seeds.

    Further lists of validation pairs that a shipped config names are taken where they lie beside the data set's JSON,
    and left out with a note elsewhere.

    Args:
        args: of LightningCLI, with names of shipped configs after ``--config``.
        needs_data: whether the data set must be known.

    Raises:
        InputError: a config is missing or no YAML, or there is no data set.
    """
    resolved = with_config_paths(with_data_root(args))
    settings = _settings(resolved)
    added = []
    if needs_data and not settings.get("data.root"):
        settings["data.root"] = str(usual_data())
        added.append(f"--data.root={settings['data.root']}")
    known = [name for name in _SEEDS if name in settings]
    if len(known) == 1 and str(settings[known[0]]).isdigit():  # true and false ask Lightning for other things
        (missing,) = set(_SEEDS) - set(known)
        added.append(f"--{missing}={settings[known[0]]}")
    if needs_data:
        resolved += _without_missing_lists(resolved, Path(str(settings["data.root"])).expanduser())
    return [*added, *resolved]


def _without_missing_lists(args: Sequence[str], root: Path) -> list[str]:
    """The argument that leaves out lists of pairs that only a shipped config names and that are not there."""
    lists: object = None
    for index, argument in enumerate(args):
        name, _, value = argument.partition("=")
        content: dict[str, Any] = {}
        if index and args[index - 1] in ("--config", "-c"):
            data = read_config(Path(argument)).get("data")
            content = data if isinstance(data, dict) else {}
        elif name == "--data" and Path(value).is_file():
            content = read_config(Path(value))
        if "validation" in content:
            shipped = name != "--data" and Path(os.path.realpath(argument)).is_relative_to(
                os.path.realpath(configs_folder())
            )
            lists = content["validation"] if shipped else None
        elif name.rstrip("+") == "--data.validation":
            lists = None
    folder = root if root.is_dir() else root.parent
    if not isinstance(lists, list) or not folder.is_dir():
        return []
    present = [name for name in lists if (folder / str(name)).is_file()]
    missing = [str(name) for name in lists if name not in present]
    if not missing:
        return []
    print(f"note: {', '.join(missing)} of the config is not in {folder}: validated without", file=sys.stderr)
    return [f"--data.validation={json.dumps(present)}"]


def with_config_paths(args: Sequence[str]) -> list[str]:
    """Replaces the names after ``--config`` by files, which must hold YAML."""
    resolved = list(args)
    for index in range(1, len(resolved)):
        if resolved[index - 1] in ("--config", "-c"):
            file = resolve_config(resolved[index])
            read_config(file)
            resolved[index] = str(file)
    return resolved


def _settings(args: Sequence[str]) -> dict[str, Any]:
    """The seeds and the data's root as configs and arguments give them, the last one deciding."""
    settings: dict[str, Any] = {}
    for index, argument in enumerate(args):
        name, equals, value = argument.removeprefix("--").partition("=")
        if index and args[index - 1] in ("--config", "-c"):
            content = read_config(Path(argument))
            settings |= {"seed_everything": content["seed_everything"]} if "seed_everything" in content else {}
            data = content.get("data")
            if isinstance(data, dict):
                settings |= {f"data.{key}": data[key] for key in ("root", "seed") if key in data}
        elif argument.startswith("--data=") and Path(value).is_file():
            settings |= {f"data.{key}": entry for key, entry in read_config(Path(value)).items()}
        elif name in (*_SEEDS, "data.root") and argument.startswith("--"):
            settings[name] = value if equals else args[index + 1] if index + 1 < len(args) else None
    return settings
