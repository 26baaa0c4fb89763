"""Means over scored pairs: by group, by contrasts, over all, and as in the paper; and that as a table of text."""

import math
from collections.abc import Sequence
from typing import Any

from sitreg_lumir.data.groups import NO_GROUP, PAPER, PaperColumn, ordered
from sitreg_lumir.metrics import CONTRASTS, mean_scores
from sitreg_lumir.report.scores import DASH, paper_cells

COLUMNS = {  # score -> heading in the table and digits
    "dsc": ("Dice", 3),
    "hd95": ("HD95 vox", 2),
    "hd95_mm": ("HD95 mm", 2),
    "tre": ("TRE vox", 2),
    "tre_mm": ("TRE mm", 2),
    "ndv": ("NDV %", 4),
    "lncc": ("LNCC", 3),
}


def summarise(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over pairs, by group, by contrasts and over all.

    Returns:
        ``groups``: :func:`~sitreg_lumir.metrics.mean_scores` of each group, each pair of contrasts and ``all``.
        ``gap``: Dice of T1-T1 minus that of T1-T2, if there are both. ``paper``, if there are groups: for each column
        of the paper's table ``heading``, ``score``, ``group`` and what ``groups`` has for it.
    """
    grouped = [case for case in cases if "contrasts" in case]
    rows = {
        name: [case for case in grouped if case["group"] == name] for name in ordered(case["group"] for case in grouped)
    }
    named = [name for name in rows if name != NO_GROUP]
    for name in sorted({case.get("contrasts", case["group"]) for case in cases}):
        rows[name] = [case for case in cases if case.get("contrasts", case["group"]) == name]
    groups = {name: mean_scores(members, COLUMNS) for name, members in {**rows, "all": cases}.items()}
    summary: dict[str, Any] = {"groups": groups}
    if all("dsc" in groups.get(name, {}) for name in CONTRASTS):
        summary["gap"] = groups[CONTRASTS[0]]["dsc"]["mean"] - groups[CONTRASTS[1]]["dsc"]["mean"]
    if any(name in named for column in PAPER for name in column.groups):
        summary["paper"] = {column.key: _paper_column(column, groups, named) for column in PAPER}
    return summary


def _paper_column(column: PaperColumn, groups: dict[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """Returns one entry of ``paper``: see :func:`summarise`."""
    group = next((name for name in column.groups if name in named), (*column.groups, "all")[0])
    scores: dict[str, Any] = groups.get(group, {}).get(column.score, {})
    return {"heading": column.heading, "score": column.score, "group": group} | scores


def table(summary: dict[str, Any]) -> str:
    """The summary as text: one line per group, mean (standard deviation) of each score; then the paper's columns."""
    groups = summary["groups"]
    names = [name for name in COLUMNS if any(name in group for group in groups.values())]
    rows = [["", "pairs", *(COLUMNS[name][0] for name in names)]]
    for label, group in groups.items():
        if label == "all" and len(groups) == 2:
            continue
        rows.append([label, str(group["pairs"]), *(_cell(group.get(name), COLUMNS[name][1]) for name in names)])
    lines = _aligned(rows)
    if "gap" in summary:
        lines.append(f"difference of Dice, {CONTRASTS[0]} minus {CONTRASTS[1]}: {summary['gap']:.3f}")
    if "paper" in summary:
        heads, cells = zip(*paper_cells(summary), strict=True)
        plain = [cell.replace("∞", "inf").replace(DASH, "-") for cell in cells]  # for any terminal
        lines += ["", *_aligned([["as in the paper", *heads], ["", *plain]])]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _cell(score: dict[str, float] | None, digits: int) -> str:
    if score is None:
        return "-"
    spread = "" if math.isnan(score["sd"]) else f" ({score['sd']:.{digits}f})"
    return f"{score['mean']:.{digits}f}{spread}"
