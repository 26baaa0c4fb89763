"""The scores of an evaluated run as a report needs them: read from disk, and the worst first."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.json_file import read_json

Case = Mapping[str, Any]
DASH = "\u2013"
SCORES = {  # key -> heading, digits, meaning
    "dsc": ("Dice", 3, "Dice: overlap of structures, 1 is best"),
    "hd95_mm": ("HD95, mm", 2, "HD95: distance that 95 % of the surfaces keep within"),
    "hd95": ("HD95, voxels", 2, "HD95: distance that 95 % of the surfaces keep within"),
    "tre_mm": ("TRE, mm", 2, "TRE: distance of landmarks"),
    "tre": ("TRE, voxels", 2, "TRE: distance of landmarks"),
    "ndv": ("NDV, %", 4, "NDV: folded volume in percent of the brain, 0 is best"),
    "lncc": ("LNCC", 3, "LNCC: local correlation of the images, -1 is best"),
}
_TEXTS = ("pair", "group", "contrasts", "field")  # columns that hold no numbers


class Scored(Protocol):
    """What ``evaluate`` returns: the scores of each pair, and their summary."""

    @property
    def cases(self) -> Sequence[Case]:
        """A row of scores for each pair."""
        ...

    @property
    def summary(self) -> Mapping[str, Any]:
        """Means over pairs, by group."""
        ...


@dataclass(frozen=True)
class StoredScores:
    """The scores of each pair and their summary, read from ``evaluation.csv`` and ``evaluation.json``."""

    cases: list[dict[str, Any]]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Structure:
    """Dice of one label: over the pairs of each group the values there are, and the pair with the lowest."""

    label: int
    name: str
    values: dict[str, list[float]]
    lowest: str


def read_scores(path: str | Path) -> StoredScores:
    """Reads the scores that ``evaluate`` wrote.

    Args:
        path: the folder of ``evaluation.csv`` and ``evaluation.json``, or one of the two.

    Raises:
        InputError: one of them is missing or damaged.

    Examples:
        >>> dataset = sitreg_lumir.read_dataset("LUMIR", validation=True)
        >>> evaluation = sitreg_lumir.evaluate(None, [dataset], "affine_only", identity=True)
               pairs ...
        >>> sitreg_lumir.read_scores("affine_only").cases[0]["pair"]
        '0100_0000_0101_0000'
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    table, summary = folder / "evaluation.csv", folder / "evaluation.json"
    try:
        with table.open(newline="", encoding="utf-8") as stream:
            cases = [
                {key: text if key in _TEXTS else _number(text) for key, text in row.items()}
                for row in csv.DictReader(stream, strict=True)
            ]
        content = read_json(summary, "scores", "evaluate again")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file; run `sitreg-lumir evaluate` first") from None
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(f"{folder}: evaluation.csv or .json is damaged ({error}); evaluate again") from None
    whole = isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in ("groups", "labels"))
    if not whole or not cases or not {"pair", "group"} <= cases[0].keys():
        raise InputError(f"{folder}: evaluation.csv or .json is not what `sitreg-lumir evaluate` writes")
    return StoredScores(cases, content)


def _number(text: str) -> float:
    return float(text) if text else math.nan


def is_known(value: object) -> bool:
    """Whether there is a number: neither missing nor NaN; infinity counts."""
    return isinstance(value, (int, float, np.number)) and not math.isnan(float(value))


def ranked(cases: Iterable[Case]) -> list[Case]:
    """The worst first: by Dice, then HD95; without Dice by LNCC; then those with TRE only, then those without."""

    def badness(case: Case) -> tuple[bool, float, float]:
        value = case.get("dsc") if is_known(case.get("dsc")) else case.get("lncc")
        if not is_known(value):
            error = case.get("tre")
            return True, -float(error) if is_known(error) else 0.0, 0.0  # type: ignore[arg-type]
        distance = case.get("hd95")
        better_high = is_known(case.get("dsc"))
        return False, float(value if better_high else -value), -float(distance) if is_known(distance) else 0.0  # type: ignore[operator,arg-type]

    return sorted(cases, key=badness)


def worst_pairs(cases: Sequence[Case], count: int) -> list[str]:
    """Names of the ``count`` worst pairs of each group, all of them with the worst first."""
    taken: dict[str, int] = {}
    names = []
    for case in ranked(cases):
        group = str(case["group"])
        taken[group] = taken.get(group, 0) + 1
        if taken[group] <= count:
            names.append(str(case["pair"]))
    return names


def paper_cells(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Heading and text of each of the paper's columns, Dice in percent; nothing where there are no groups."""
    cells = []
    for column in summary.get("paper", {}).values():
        score, mean = column["score"], column.get("mean")
        if column.get("infinite"):
            text = "∞"
        elif not is_known(mean):
            text = DASH
        else:
            text = f"{100 * mean:.1f}" if score == "dsc" else f"{mean:.{SCORES[score][1]}f}"
        cells.append((str(column["heading"]), text))
    return cells


def structures(scored: Scored) -> list[Structure]:
    """Dice by label, the lowest mean first; a label without any value comes last."""
    labels = sorted({int(key.removeprefix("dsc/")) for case in scored.cases for key in case if key.startswith("dsc/")})
    names = scored.summary.get("labels", {})
    listed = []
    for label in labels:
        known = [(float(case[key]), case) for case in scored.cases if is_known(case.get(key := f"dsc/{label}"))]
        values: dict[str, list[float]] = {}
        for value, case in known:
            values.setdefault(str(case["group"]), []).append(value)
        lowest = min(known, key=lambda entry: entry[0])[1]["pair"] if known else DASH
        name = names.get(str(label), {}).get("name") or f"label {label}"
        listed.append(Structure(label, str(name), values, str(lowest)))
    return sorted(listed, key=_mean)


def _mean(structure: Structure) -> float:
    values = [value for group in structure.values.values() for value in group]
    return float(np.mean(values)) if values else math.inf
