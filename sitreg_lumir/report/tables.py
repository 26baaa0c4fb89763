"""Numbers as HTML: tables of scores, ranges of Dice, and any nested dictionary of results."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sitreg_lumir.report.page import Html, join, tag
from sitreg_lumir.report.scores import DASH, SCORES, Case, Scored, Structure, is_known, paper_cells, ranked

_COLOURS = 5  # of groups, in the style


def number(value: Any, digits: int | None = None) -> str:
    """A value for people: four significant digits, or ``digits`` decimals; a dash for what is missing."""
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return DASH
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        plain = float(value)
        if math.isinf(plain):
            return "∞" if plain > 0 else "-∞"
        if digits is not None:
            return f"{plain:.{digits}f}"
        return f"{plain:.0f}" if abs(plain) >= 1e4 else f"{plain:.4g}"
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(number(item, digits) for item in value) or DASH
    return str(value) or DASH


def figures(numbers: Mapping[str, Any]) -> Html:
    """The numbers that stand at the top, large; nothing if there are none."""
    if not numbers:
        return Html("")
    cells = [tag("div", tag("dt", _words(key)), tag("dd", number(value))) for key, value in numbers.items()]
    return tag("dl", *cells, class_="figures")


def details(numbers: Mapping[str, Mapping[str, Any]]) -> Html:
    """A table for each part of a nested dictionary."""
    tables = []
    for name, part in numbers.items():
        rows = [
            tag("tr", tag("th", key, scope="row", class_="text"), tag("td", number(value), class_="long"))
            for key, value in _flat(part)
        ]
        table = tag("table", tag("caption", _words(name)), tag("tbody", *rows))
        tables.append(tag("div", table, class_="card"))
    return tag("div", *tables, class_="tables")


def _flat(part: object, name: str = "") -> Iterable[tuple[str, object]]:
    """The leaves of nested dictionaries and of lists of them, each with its path."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            yield from _flat(value, f"{name} · {_words(key)}" if name else _words(key))
    elif isinstance(part, (list, tuple)) and any(isinstance(item, Mapping) for item in part):
        for index, value in enumerate(part, start=1):
            yield from _flat(value, f"{name} {index}".strip())
    else:
        yield name, part


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def groups_of(scored: Scored) -> list[str]:
    """Names of the groups that cases are in, in the order of the summary."""
    present = {str(case["group"]) for case in scored.cases}
    return [name for name in scored.summary.get("groups", {}) if name in present] or sorted(present)


def group_table(scored: Scored) -> Html:
    """Mean and standard deviation of each score, by group."""
    groups = scored.summary.get("groups", {})
    keys = [key for key in SCORES if any(key in group for group in groups.values())]
    head = [tag("th", "Group", scope="col"), tag("th", "Pairs", scope="col")]
    rows = []
    for name, group in groups.items():
        if name == "all" and len(groups) == 2:
            continue
        cells = [tag("td", number(group.get("pairs")))]
        for key in keys:
            score, digits = group.get(key) or {}, SCORES[key][1]
            spread = number(score.get("sd"), digits)
            shown = tag("span", f" ± {spread}", class_="spread") if spread != DASH else ""
            mean = "∞" if score.get("infinite") else number(score.get("mean"), digits)
            cells.append(tag("td", mean, shown))
        rows.append(tag("tr", tag("th", name, scope="row"), *cells))
    meanings = ". ".join(dict.fromkeys(SCORES[key][2] for key in keys))
    hint = tag("p", f"Mean ± standard deviation over pairs. {meanings}.", class_="hint")
    return join(_table("Scores by group", [*head, *_headings(keys)], rows), hint)


def paper_table(scored: Scored) -> Html:
    """The columns of the paper's table, if the pairs have the challenge's groups."""
    cells = paper_cells(scored.summary)
    if not cells:
        return Html("")
    head = [tag("th", heading, scope="col") for heading, _ in cells]
    row = tag("tr", *(tag("td", text) for _, text in cells))
    hint = tag("p", "As in the paper: Dice by group, TRE over landmarks, HD95 and NDV over all pairs.", class_="hint")
    return join(_table("As in the paper", head, [row]), hint)


def case_table(cases: Sequence[Case]) -> Html:
    """All pairs, the worst first."""
    keys = [key for key in SCORES if any(key in case for case in cases)]
    rows = [
        tag(
            "tr",
            tag("th", case["pair"], scope="row"),
            tag("td", case["group"], class_="text"),
            *(tag("td", number(case.get(key), SCORES[key][1])) for key in keys),
        )
        for case in ranked(cases)
    ]
    head = [tag("th", "Pair", scope="col"), tag("th", "Group", scope="col", class_="text"), *_headings(keys)]
    return _table("All pairs, worst first", head, rows)


def structure_table(structures: Sequence[Structure], groups: Sequence[str]) -> Html:
    """Dice of each structure, the worst first: mean of each group, the lowest, and a picture of the range."""
    low = floor_of(value for structure in structures for values in structure.values.values() for value in values)
    rows = []
    for structure in structures:
        known = [structure.values.get(group, []) for group in groups]
        every = [value for values in known for value in values]
        rows.append(
            tag(
                "tr",
                tag("th", structure.name, scope="row"),
                *(tag("td", number(float(np.mean(values)) if values else None, 3)) for values in known),
                tag("td", number(min(every, default=None), 3)),
                tag("td", structure.lowest, class_="text"),
                tag("td", _ranges(known, low), class_="range"),
            )
        )
    head = [
        tag("th", "Structure", scope="col"),
        *(tag("th", _key(index), group, scope="col") for index, group in enumerate(groups)),
        tag("th", "Lowest", scope="col"),
        tag("th", "in pair", scope="col", class_="text"),
        tag("th", f"Lowest to highest, mean; {low:g} to 1", scope="col", class_="text"),
    ]
    return _table("Dice of each structure, worst first", head, rows)


def strips(scored: Scored, groups: Sequence[str], score: str = "dsc") -> Html:
    """One line per group with a mark for each pair and a thick one for the mean; nothing without values."""
    known = {
        group: [float(case[score]) for case in scored.cases if case["group"] == group and is_known(case.get(score))]
        for group in groups
    }
    every = [value for values in known.values() for value in values]
    if not every:
        return Html("")
    low = floor_of(every)
    parts: list[Html] = []
    for index, (group, values) in enumerate(known.items()):
        if not values:
            continue
        mean = float(np.mean(values))
        marks = [_bar(value, 0.35, low, 4, 16, f"g{index % _COLOURS} tick") for value in values]
        marks.append(_bar(mean, 0.7, low, 0, 24, f"g{index % _COLOURS}"))
        text = f"Dice of {len(values)} pairs, {group}: {min(values):.3f} to {max(values):.3f}, mean {mean:.3f}"
        track = tag("rect", x=0, y=11, width=100, height=2, class_="track")
        parts += [tag("span", _key(index), group), _chart(24, text, "strip", track, *marks)]
    ends = tag("div", tag("span", f"Dice {low:g}"), tag("span", "1"), class_="ends")
    return tag("div", *parts, ends, class_="strips")


def floor_of(values: Iterable[float]) -> float:
    """Where an axis of Dice starts: the tenth below the lowest value."""
    return min((math.floor(10 * value) / 10 for value in values), default=0.0)


def _ranges(groups: Sequence[Sequence[float]], low: float) -> Html:
    height = 18 / max(len(groups), 1)
    marks, texts = [], []
    for index, values in enumerate(groups):
        if not values:
            continue
        class_, top, mean = f"g{index % _COLOURS}", index * height, float(np.mean(values))
        left, right = (100 * (end - low) / (1 - low) for end in (min(values), max(values)))
        middle = top + height / 2 - 1
        marks.append(
            tag(
                "rect",
                x=f"{left:.2f}",
                y=f"{middle:.1f}",
                width=f"{right - left:.2f}",
                height=2,
                class_=f"{class_} faint",
            )
        )
        marks.append(_bar(mean, 0.9, low, top + 0.12 * height, 0.76 * height, class_))
        texts.append(f"{min(values):.3f} to {max(values):.3f}, mean {mean:.3f}")
    return _chart(18, "; ".join(texts) or "no values", None, *marks)


def _bar(value: float, width: float, low: float, top: float, height: float, class_: str) -> Html:
    """An upright mark at a Dice value, on an axis of 100 from ``low`` to 1."""
    left = 100 * (value - low) / (1 - low) - width / 2
    return tag("rect", x=f"{left:.2f}", y=f"{top:.1f}", width=width, height=f"{height:.1f}", class_=class_)


def _chart(height: int, text: str, class_: str | None, *marks: Html) -> Html:
    box = f"0 0 100 {height}"
    return tag("svg", *marks, viewBox=box, preserveAspectRatio="none", role="img", aria_label=text, class_=class_)


def _key(index: int) -> Html:
    return tag("i", class_=f"key g{index % _COLOURS}")


def _headings(keys: Sequence[str]) -> list[Html]:
    return [tag("th", SCORES[key][0], scope="col", title=SCORES[key][2]) for key in keys]


def _table(name: str, head: Sequence[Html], rows: Sequence[Html]) -> Html:
    """A table that scrolls sideways within the page, also by keyboard."""
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows))
    return tag("div", join(table), class_="card scroll", role="region", aria_label=name, tabindex=0)
