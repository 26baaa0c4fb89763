"""Pages of the documentation that are made from the package when the site is built, as hooks of mkdocs.

The command line's reference comes from the parser, the configs' from the files that ship.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["COLUMNS"] = "100"  # argparse wraps its help there

from sitreg_lumir.cli import command_line

if TYPE_CHECKING:
    import argparse

    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]


def verbs() -> "dict[str, argparse.ArgumentParser]":
    """The parser of each verb, in the order of the help text."""
    parsers: dict[str, argparse.ArgumentParser] = {}
    for action in command_line()._actions:
        if action.dest == "verb":
            choices = dict(action.choices or {})  # type: ignore[call-overload]
            parsers = {name: parser for name, parser in choices.items() if parser.prog.endswith(name)}  # no aliases
    return parsers


def command_line_page() -> str:
    """Markdown: what `sitreg-lumir --help` and `sitreg-lumir VERB --help` print."""
    parts = [
        "# Command line",
        "Made from the parser: what `sitreg-lumir --help` and `sitreg-lumir VERB --help` print. `fit`, `validate`, "
        "`test` and `predict` also take every setting of the data, the model and Lightning's Trainer "
        "([training settings](settings.md)).\n\n"
        "Exit codes: 0 it worked; 2 a mistake in what was asked for or in a file, reported in one line; 128 + number "
        "of the signal that ended it (143 by SIGTERM, 130 from the keyboard); `doctor` ends "
        "with 1 where two scans cannot be registered.",
        _block(command_line().format_help()),
    ]
    for name, parser in verbs().items():
        parts += [f"## {name}", _block(parser.format_help())]
    return "\n\n".join(parts) + "\n"


def configs_page() -> str:
    """Markdown: every shipped config with its content."""
    parts = [
        "# Configs",
        "Named by `sitreg-lumir fit --config NAME`; a config states what a run changes, and the defaults of the "
        "classes ([training settings](settings.md)) are the published recipe. Options of the command line come after "
        "the config: `sitreg-lumir fit --config mind --data LUMIR --trainer.max_epochs 10`. A file of yours is "
        "named by its path, and `--print_config` shows what becomes of it.",
    ]
    folder = ROOT / "configs"
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).with_suffix("")
        parts += [f"## {name}", f"```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def members_page() -> str:
    """Markdown: the card of the members that come with the package."""
    return (ROOT / "sitreg_lumir" / "weights" / "README.md").read_text(encoding="utf-8")


PAGES = {
    "reference/cli.md": command_line_page,
    "reference/configs.md": configs_page,
    "reference/shipped-members.md": members_page,
}


def on_files(files: "Files", config: Any) -> "Files":
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """The roles that docstrings put before a name (``:func:``) are for editors: the name alone is shown."""
    return re.sub(r":(?:func|class|meth|data|mod):<code>(?:~[\w.]*?)?(\w[\w.]*)</code>", _short, html)


def _short(match: re.Match[str]) -> str:
    text, name = match.group(0), match.group(1)
    return f"<code>{name.rpartition('.')[2] if '~' in text else name}</code>"


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"
