"""What a model card may hold: types and bounds, checked before anything is made of it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.orientation import check_placement
from sitreg_lumir.io.bounded import check_voxels
from sitreg_lumir.io.json_file import plain_problem
from sitreg_lumir.network.architecture import MOST_CHANNELS, architecture_problem, is_number, is_whole, short

_LONGEST_TEXT = 10_000
_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_MIND_BOUNDS = {"sigma": 16.0, "radius": 16}


def check_card(values: Mapping[str, Any], path: Path) -> None:
    """Compares a card's values with types and bounds.

    Args:
        values: by names; those that a card needs are there.
        path: named in errors.

    Raises:
        InputError: a value is none that a card can have.
    """
    problem = plain_problem(dict(values)) or _problem(values)
    if problem:
        raise InputError(f"{path}: its model card {problem}; copy the member again, or export it again")
    check_voxels(path, values["shape"])
    check_placement(path, np.array(values["affine"], np.float64))


def _problem(values: Mapping[str, Any]) -> str | None:
    problem = architecture_problem(values["architecture"])
    if problem:
        return f"has an impossible architecture: {problem}"
    shape, affine = values["shape"], values["affine"]
    if not isinstance(shape, list) or len(shape) != 3 or not all(is_whole(size, 1, 2**15) for size in shape):
        return f"has the shape {short(shape)}, not three whole numbers"
    rows = isinstance(affine, list) and len(affine) == 4 and all(isinstance(row, list) for row in affine)
    if not rows or not all(len(row) == 4 and all(map(is_number, row)) for row in affine):
        return f"has the affine {short(affine)}, not 4 x 4 numbers"
    if affine[3] != [0, 0, 0, 1]:
        return f"has an affine whose last row is {short(affine[3])}"
    for name in ("intensity", "licence", "version"):
        if not isinstance(values.get(name, ""), str) or len(values.get(name, "")) > _LONGEST_TEXT:
            return f"has {name} {short(values[name])}, not a text"
    training = values.get("training", {})
    if not isinstance(training, dict):
        return f"has training {short(training)}, not an object"
    weight = training.get("diffusion_weight", 1.0)
    if not is_number(weight) or not 0 <= weight <= 1e6:
        return f"has the diffusion_weight {short(weight)}"
    mind, transform = values.get("mind"), values.get("input_transform")
    return (None if mind is None else mind_problem(mind)) or (None if transform is None else _transform(transform))


def mind_problem(mind: Any) -> str | None:
    """What keeps values from being arguments of ``Mind``; None if nothing does."""
    if not isinstance(mind, dict) or not set(mind) <= set(_MIND_BOUNDS):
        return f"has mind {short(mind)}, not sigma and radius"
    for name, most in _MIND_BOUNDS.items():
        value = mind.get(name, 1)
        if not is_number(value) or not 0 < value <= most or (name == "radius" and not is_whole(value, 1, int(most))):
            return f"has mind with {name} {short(value)}, not up to {most:g}"
    return None


def _transform(transform: Any) -> str | None:
    if not isinstance(transform, dict) or not isinstance(transform.get("init_args"), dict):
        return "has an input_transform without class_path and init_args"
    path = transform.get("class_path")
    if not isinstance(path, str) or len(path) > 300 or not _CLASS_PATH.fullmatch(path):
        return f"has an input_transform of the class {short(path)}"
    response = transform.get("response", [])
    if not isinstance(response, list) or len(response) > MOST_CHANNELS or not all(map(_is_float, response)):
        return "has an input_transform whose response is no list of numbers"
    return None


def _is_float(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
