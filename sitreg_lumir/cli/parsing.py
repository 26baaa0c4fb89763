"""What all verbs share: their parsers, and one line for what is not understood."""

import argparse
from collections.abc import Sequence
from typing import TypeAlias

from sitreg_lumir.errors import InputError

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def verb(verbs: Verbs, name: str, summary: str, more: str) -> argparse.ArgumentParser:
    """The parser of a new verb; ``more`` is told after the options, as it is."""
    return verbs.add_parser(
        name,
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


def add_allow_imports(parser: argparse.ArgumentParser) -> None:
    """Modules of the user's that members may need."""
    parser.add_argument(
        "--allow-imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module, such as my_variant (my_variant.py in the working folder), from which members may take the "
        "class of their input transform; importing runs its code",
    )


def refuse(rest: Sequence[str], parser_of: str) -> None:
    """Arguments that the verb does not know."""
    if rest:
        raise InputError(f"unknown argument {rest[0]!r}; see `sitreg-lumir {parser_of} --help`")
