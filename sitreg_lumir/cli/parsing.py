"""What all verbs share: their parsers, and one line for what is not understood."""

import argparse
from collections.abc import Sequence
from typing import TypeAlias

from sitreg_lumir.errors import InputError

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


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
