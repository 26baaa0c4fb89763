"""How large a network may be: bounds of its constructor's arguments, checked before memory is spent on it."""

import math
from typing import Any

MOST_LEVELS, MOST_CHANNELS, MOST_CONVOLUTIONS = 12, 4096, 32


def architecture_problem(architecture: Any) -> str | None:
    """What keeps values from being constructor arguments of ``SITReg``; None if nothing does."""
    if not isinstance(architecture, dict):
        return f"must be an object, it is {short(architecture)}"
    known = {"in_channels", "features", "head_features", "convolutions", "groups", "bound_multiplier"}
    unknown = sorted(map(str, architecture.keys() - known))
    missing = sorted({"in_channels", "features", "head_features"} - architecture.keys())
    if unknown or missing:
        return f"has an unknown entry {unknown[0][:40]!r}" if unknown else f"lacks {missing[0]}"
    bounds = {"in_channels": MOST_CHANNELS, "convolutions": MOST_CONVOLUTIONS, "groups": MOST_CHANNELS}
    for name, most in bounds.items():
        if name in architecture and not is_whole(architecture[name], 1, most):
            return f"{name} must be a whole number from 1 to {most}, it is {short(architecture[name])}"
    for name in ("features", "head_features"):
        sizes = architecture[name]
        if (
            not isinstance(sizes, list | tuple)
            or not 1 <= len(sizes) <= MOST_LEVELS
            or not all(is_whole(size, 1, MOST_CHANNELS) for size in sizes)
        ):
            return f"{name} must be 1 to {MOST_LEVELS} whole numbers from 1 to {MOST_CHANNELS}, it is {short(sizes)}"
    share = architecture.get("bound_multiplier", 0.99)
    if not is_number(share) or not 0 < share < 1:
        return f"bound_multiplier must lie between 0 and 1, it is {short(share)}"
    return None


def short(value: Any) -> str:
    """A value as errors show it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether a value is a whole number within bounds, which included."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
