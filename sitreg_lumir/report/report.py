"""`report.html`: one file that shows a registered pair, or an evaluated run with its worst cases first."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sitreg_lumir.report.colours import Array
from sitreg_lumir.report.page import Html, tag, write_page
from sitreg_lumir.report.pictures import Volumes, render
from sitreg_lumir.report.scores import DASH, SCORES, Case, Scored, is_known, ranked, read_scores, structures
from sitreg_lumir.report.tables import (
    case_table,
    details,
    figures,
    group_table,
    groups_of,
    number,
    paper_table,
    strips,
    structure_table,
)
from sitreg_lumir.report.viewer import viewer

VERDICTS = {"ok": "✓ Verdict: ok", "check": "! Verdict: check", "failed": "✕ Verdict: failed"}
_LOWEST = 5  # structures named with each pair


def write_pair_report(
    file: str | Path,
    *,
    fixed: Array,
    moving: Array,
    warped: Array,
    disp: Array,
    jac_det: Array | None = None,
    disagreement: Array | None = None,
    voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0),
    numbers: Mapping[str, Any] | None = None,
    verdict: str | None = None,
    reasons: Sequence[str] = (),
    title: str = "Registration",
    names: tuple[str, str] = ("fixed", "moving"),
    slices: int = 16,
) -> None:
    """Writes a page about one pair that needs no other file: pictures of three planes, and the numbers.

    All volumes lie on the fixed grid, axes in RAS order and direction. Texts may come from anywhere, they are
    escaped. Equal input gives equal bytes.

    Args:
        file: where the page goes; replaced if it exists.
        fixed: ``(X, Y, Z)``, background 0.
        moving: ``(X, Y, Z)``, before registration.
        warped: ``(X, Y, Z)``, the moving image after registration.
        disp: ``(3, X, Y, Z)``, voxels, fixed grid.
        jac_det: ``(X, Y, Z)``, no unit; NaN where it is not known.
        disagreement: ``(X, Y, Z)``, mm.
        voxel_size: mm along each axis.
        numbers: plain values stand at the top; each dictionary in it becomes a table. None and NaN show as a dash.
        verdict: ``ok``, ``check`` or ``failed``.
        reasons: for the verdict, one line each.
        title: of the page.
        names: of the fixed and the moving file.
        slices: of each plane.

    Raises:
        ValueError: shapes differ, or ``verdict`` is none of the three.
        InputError: the file cannot be written.
    """
    if verdict is not None and verdict not in VERDICTS:
        raise ValueError(f"verdict must be one of {', '.join(VERDICTS)} or None, got {verdict!r}")
    _check_slices(slices)
    volumes = Volumes(fixed, moving, warped, disp, jac_det, disagreement, voxel_size)
    numbers = numbers or {}
    nested = {str(key): value for key, value in numbers.items() if isinstance(value, Mapping)}
    plain = {str(key): value for key, value in numbers.items() if not isinstance(value, Mapping)}
    parts = [
        tag("p", "sitreg-lumir · one registered pair", class_="kind"),
        tag("h1", title),
        tag("p", "Fixed: ", _name(names[0]), " · Moving: ", _name(names[1]), class_="sub"),
        _verdict(verdict, reasons),
        figures(plain),
        tag("h2", "Pictures"),
        tag("div", viewer(*render(volumes, slices), "pair"), class_="card"),
    ]
    if nested:
        parts += [tag("h2", "Numbers"), details(nested)]
    write_page(Path(file), title, *parts)


def write_run_report(
    file: str | Path,
    evaluation: Scored | str | Path,
    pictures: Iterable[tuple[str, Volumes]] = (),
    *,
    title: str | None = None,
    slices: int = 8,
) -> None:
    """Writes a page about an evaluated run: scores by group, pictures, structures and pairs, the worst first.

    Args:
        file: where the page goes; replaced if it exists.
        evaluation: what ``evaluate`` returned, or the folder of ``evaluation.csv`` and ``.json``.
        pictures: names of pairs as in the evaluation, and the volumes of each; taken one by one, so that a generator
            needs the memory of one pair.
        title: of the page; by default the folder of the fields.
        slices: of each plane of a pair.

    Raises:
        ValueError: a picture is of a pair that was not evaluated.
        InputError: the evaluation cannot be read or the file not be written.
    """
    _check_slices(slices)
    scored = read_scores(Path(evaluation)) if isinstance(evaluation, (str, Path)) else evaluation
    order = {str(case["pair"]): (index, case) for index, case in enumerate(ranked(scored.cases))}
    scored_structures = structures(scored)
    labels = {structure.label: structure.name for structure in scored_structures}
    shown: list[tuple[int, Case, Html]] = []
    for index, (pair, volumes) in enumerate(pictures):
        if pair not in order:
            raise ValueError(f"no scores of pair {pair!r}; there are {', '.join(order)}")
        shown.append((*order[pair], viewer(*render(volumes, slices), f"p{index}")))
    shown.sort(key=lambda pair: pair[0])
    groups = groups_of(scored)
    title = title or f"Evaluation of {scored.summary.get('fields', 'a run')}"
    parts = [
        tag("p", "sitreg-lumir · an evaluated run", class_="kind"),
        tag("h1", title),
        tag("p", f"{len(scored.cases)} pairs: {', '.join(groups)}", class_="sub"),
        tag("h2", "Scores"),
        group_table(scored),
        paper_table(scored),
        strips(scored, groups),
    ]
    if is_known(scored.summary.get("gap")):
        difference = number(scored.summary["gap"], 3)
        parts.append(tag("p", f"Difference of Dice, T1-T1 minus T1-T2: {difference}", class_="sub"))
    if notes := scored.summary.get("notes"):
        parts.append(tag("ul", *(tag("li", note) for note in notes), class_="notes"))
    if shown:
        parts.append(tag("h2", "Worst pairs"))
        parts += [
            _case(case, pictured, labels, index=index, rank=rank, count=len(order))
            for index, (rank, case, pictured) in enumerate(shown)
        ]
    if scored_structures:
        parts += [tag("h2", "Dice of each structure, worst first"), structure_table(scored_structures, groups)]
    parts += [tag("h2", "All pairs, worst first"), case_table(scored.cases)]
    write_page(Path(file), title, *parts)


def _case(case: Case, pictured: Html, labels: Mapping[int, str], *, index: int, rank: int, count: int) -> Html:
    """One pair of a run, open if it is the first."""
    scores = [
        tag("span", f"{heading} {number(case[key], digits)}")
        for key, (heading, digits, _) in SCORES.items()
        if key in case
    ]
    values = [(case[f"dsc/{label}"], name) for label, name in labels.items() if is_known(case.get(f"dsc/{label}"))]
    lowest = ", ".join(f"{name} {value:.3f}" for value, name in sorted(values)[:_LOWEST])
    summary = tag("summary", tag("b", case["pair"]), tag("span", case["group"]), *scores)
    text = f"Place {rank + 1} of {count}, the worst first. Lowest Dice: {lowest or DASH}."
    return tag("details", summary, tag("p", text, class_="hint"), pictured, class_="card case", open=index == 0)


def _verdict(verdict: str | None, reasons: Sequence[str]) -> Html:
    if verdict is None:
        return Html("")
    listed = tag("ul", *(tag("li", reason) for reason in reasons)) if reasons else ""
    return tag("div", tag("strong", VERDICTS[verdict]), listed, class_=f"card verdict {verdict}")


def _name(name: str) -> Html:
    return tag("b", tag("bdi", name))


def _check_slices(slices: int) -> None:
    if slices < 1:
        raise ValueError(f"slices must be 1 or more, got {slices}")
