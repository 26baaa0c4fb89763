"""What all verbs share: their parsers, and one line for what is not understood."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeAlias, TypeVar

from sitreg_lumir.errors import InputError

Options = TypeVar("Options")
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
    parser.add_argument(
        "--header",
        choices=("sform", "qform"),
        help="which of the two orientations in a NIfTI header to use, in every file, where they differ",
    )
    parser.add_argument(
        "--assume-orientation",
        metavar="RAS",
        help="letters that say where the axes of the voxels point to, for images whose header does not",
    )


def add_strip(parser: argparse.ArgumentParser) -> None:
    """How the brain is found in scans of whole heads."""
    parser.add_argument(
        "--strip",
        nargs="?",
        const="deepbet",
        choices=("deepbet", "template"),
        help="find the brain in scans of whole heads that come without a mask: deepbet (T1; the default of --strip), "
        "or template, any contrast, some mm off",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """The members that register scans, and how they compute."""
    parser.add_argument(
        "--members",
        nargs="+",
        metavar="PATH",
        help="trained members: files, folders, or shipped ones by name, such as member1 (default: all shipped ones)",
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu or gpu (default: auto)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add_allow_imports(parser)
    parser.add_argument(
        "--flip", action="store_true", help="also run the members on mirrored scans, and average; twice the time"
    )


def load_chosen(options: argparse.Namespace) -> Any:
    """The :class:`~sitreg_lumir.registration.model.Model` that the options of :func:`add_model` say."""
    from sitreg_lumir.registration.model import load_model

    names = ("device", "precision", "flip", "allow_imports")
    return load_model(options.members, **{name: getattr(options, name) for name in names})


def of_arguments(kind: Callable[..., Options], options: argparse.Namespace) -> Options:
    """A dataclass of options whose fields have the names of the verb's."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})  # type: ignore[arg-type]


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
