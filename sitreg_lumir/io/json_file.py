"""JSON files as users, other programs and a damaged disk leave them: an object of plain values, or one line."""

import json
import math
from pathlib import Path
from typing import Any

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.bounded import read_bytes

DEEPEST = 64
"""Levels of lists and objects within each other that a file may have."""

_LARGEST = 1 << 27  # bytes
_LARGEST_INTEGER = 2**63


def read_json(path: Path, wanted: str, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: of the file, UTF-8.
        wanted: what it should be, with its article, for errors.
        remedy: what errors tell users to do.

    Raises:
        InputError: the file is missing, too large or no JSON object; or values are no plain ones: nested too deeply,
            numbers that no file needs, letters that cannot be written.
    """
    try:
        content = read_bytes(path, _LARGEST, wanted)
        value = json.loads(content.decode("utf-8-sig"))
        problem = plain_problem(value)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}") from None
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except RecursionError:
        problem = "is nested too deeply"
    except (ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a readable JSON file, not valid JSON ({reason}); {remedy}") from None
    if problem:
        raise InputError(f"{path}: {problem}; {remedy}")
    if not isinstance(value, dict):
        raise InputError(f"{path}: not {wanted}, which holds one object; {remedy}")
    return value


def json_values(value: Any, digits: int | None = None) -> Any:
    """Converts values for JSON: what is not finite to None, numpy's numbers to Python's, rounded to so many digits."""
    if isinstance(value, dict):
        return {str(key): json_values(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item, digits) for item in value]
    if hasattr(value, "item"):  # a number of numpy's
        value = value.item()
    if isinstance(value, float):
        rounded = value if digits is None else float(f"{value:.{digits}g}")
        return rounded if math.isfinite(value) else None
    return value


def plain_problem(value: Any, deepest: int = DEEPEST, *, finite: bool = False) -> str | None:
    """What keeps values from being those of a JSON file; None if nothing does.

    Args:
        value: lists, objects, text, numbers, truth values and None.
        deepest: levels of lists and objects.
        finite: whether NaN is none of them, as in no setting.
    """
    waiting = [(value, 0)]
    while waiting:
        entry, depth = waiting.pop()
        if isinstance(entry, dict | list | tuple):
            if depth >= deepest:
                return "is nested too deeply"
            children = [*entry, *entry.values()] if isinstance(entry, dict) else entry
            waiting += [(child, depth + 1) for child in children]
        elif isinstance(entry, str):
            if not entry.isascii() and any("\ud800" <= letter <= "\udfff" for letter in entry):
                return f"holds text that is not Unicode ({ascii(entry)[:40]})"
        elif isinstance(entry, int) and abs(entry) >= _LARGEST_INTEGER:
            return "holds a whole number beyond 64 bits"
        elif isinstance(entry, float) and (math.isinf(entry) or (finite and math.isnan(entry))):
            return "holds a number that is not finite"
    return None
