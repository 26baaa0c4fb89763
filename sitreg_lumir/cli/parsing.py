"""What all verbs share: their parsers, and one line for what is not understood."""

import argparse
import re
from collections.abc import Sequence
from typing import TypeAlias

from sitreg_lumir.errors import InputError

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_FLAGS = {  # of other names
    "out": "-o",
    "padding_mm": "--padding",
    "tolerance_mm": "--tolerance",
    "spacing_mm": "--spacing",
    "bias_correction": "--no-bias-correction",
}


def verb(verbs: Verbs, name: str, summary: str, more: str, *, former: str | None = None) -> argparse.ArgumentParser:
    """Makes the parser of a verb.

    Args:
        verbs: what it is added to.
        name: of the verb.
        summary: one sentence on what it does.
        more: is printed below the options as it is.
        former: an earlier name of the verb, which goes on working.
    """
    return verbs.add_parser(
        name,
        aliases=[] if former is None else [former],
        description=summary,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_header_options(parser: argparse.ArgumentParser) -> None:
    """What to do with headers that contradict themselves or say nothing."""
    parser.add_argument("--header", choices=("sform", "qform"), help="which to use, in every file, if they differ")
    parser.add_argument(
        "--assume-orientation", metavar="RAS", help="of images whose header does not say where the axes point to"
    )


def add_allow_imports(
    parser: argparse.ArgumentParser, what: str = "members may take the class of their input transform"
) -> None:
    """Modules of the user's that members or configs may need."""
    parser.add_argument(
        "--allow-imports",
        action="append",
        default=[],
        metavar="MODULE",
        help=f"a module, such as my_variant (my_variant.py in the working folder), from which {what}; importing runs "
        "its code; may be repeated",
    )


def refuse(rest: Sequence[str], parser_of: str) -> None:
    """Arguments that the verb does not know."""
    if rest:
        raise InputError(f"unknown argument {rest[0]!r}; see `sitreg-lumir {parser_of} --help`")


def with_flags(message: str, options: argparse.Namespace) -> str:
    """Writes the arguments that a library's message names in backticks as the verb's options.

    For example ``use `align=none` `` becomes ``use --align none``, and ``add `overwrite=True` `` ``add --overwrite``.

    Args:
        message: of an error.
        options: of the verb; other names in backticks stay as they are.
    """

    def flag(named: re.Match[str]) -> str:
        name, value = named.groups()
        if name not in _FLAGS and name not in vars(options):
            return named[0]
        option = _FLAGS.get(name, f"--{name.replace('_', '-')}")
        return option if value in (None, "True", "False") else f"{option} {value}"

    return re.sub(r"`([a-z_]+)(?:=([^`\s]+))?`", flag, message)
