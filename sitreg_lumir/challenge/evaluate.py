"""Scores a folder of fields by the challenge's definitions: a table, a CSV of cases, a JSON of means."""

import csv
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sitreg_lumir import __version__
from sitreg_lumir.challenge.means import summarise, table
from sitreg_lumir.challenge.provenance import find_field, shared_names
from sitreg_lumir.data.groups import NO_GROUP, other_labelling
from sitreg_lumir.data.images import Pair
from sitreg_lumir.data.lumir import LumirDataset, groups_of_pairs, raise_problems
from sitreg_lumir.data.views import clean_view
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing_together
from sitreg_lumir.io.json_file import json_values
from sitreg_lumir.io.read import load_disp, read_labels, read_stated_grid, read_volume
from sitreg_lumir.losses import warped_lncc
from sitreg_lumir.metrics import METRICS, score_pair, values_outside


@dataclass(frozen=True)
class Evaluation:
    """The scores of each pair (``pair``, ``group``, ``field`` and numbers) and the summary that the JSON holds.

    Where pairs have groups, ``contrasts`` stands beside ``group``, which is ``no group`` for the other pairs; else
    ``group`` is the contrasts.
    """

    cases: list[dict[str, Any]]
    summary: dict[str, Any]


def evaluate(
    folder: str | Path | None,
    datasets: Sequence[LumirDataset],
    out: str | Path | None = None,
    *,
    identity: bool = False,
    labels: Sequence[int] | Literal["found"] | None = None,
) -> Evaluation:
    """Scores the field of each validation pair, prints the table and writes ``evaluation.csv`` and ``.json``.

    Args:
        folder: with ``disp_<pair>.nii.gz`` files; not used with ``identity``.
        datasets: one or more lists of pairs. Their ``evaluation_labels`` are scored, exactly those; without such
            a list those of the challenge where it lists a pair; else the labels that are in both maps of a pair, 0
            included. A pair without label maps gets LNCC (clean images, within their masks) instead. Where the
            challenge lists a pair, only the scores are given that it takes of it.
        out: folder of the results; by default ``folder``, and none with ``identity``.
        identity: score the images as they are, as if each field were zero.
        labels: score these instead of all others; ``found``: those that are in both maps of a pair.

    Raises:
        InputError: a pair comes from two data sets in two groups; fields are missing, were made from other images,
            or cannot be read; or the results cannot be written. Missing and unfit fields are all named before
            anything is scored.

    Examples:
        >>> dataset = sitreg_lumir.read_dataset("LUMIR", validation=True)
        >>> evaluation = sitreg_lumir.evaluate(None, [dataset], "affine_only", identity=True)
               pairs ...
        >>> evaluation.summary["groups"]["all"]["ndv"]["mean"]
        0.0
    """
    folder, out = (None if path is None else Path(path) for path in (folder, out))
    pairs = _collect(datasets)
    grouped = bool(groups_of_pairs(pairs))
    notes: list[str] = []
    if identity:
        fields: dict[Pair, Path | None] = dict.fromkeys(pairs)
    elif folder is None:
        raise InputError("no folder of fields given; name it, or ask for identity")
    else:
        fields = dict(_find_fields(folder, list(pairs), notes))
    cases: list[dict[str, Any]] = []
    outside: set[int] = set()  # values of label maps
    for pair, dataset in tqdm(pairs.items(), desc="scoring", unit="pair", disable=None):
        field = fields[pair]
        cases.append(
            {"pair": pair.long_name}
            | _counted_under(pair, grouped)
            | {"field": field.name if field else "identity"}
            | _score(pair, dataset, field, labels, outside)
        )
    summary = summarise(cases) | {
        "version": __version__,
        "fields": "identity" if folder is None or identity else Path(os.path.realpath(folder)).name,
    }
    names = {label: name for dataset in datasets for label, name in dataset.label_names.items()}
    summary["labels"] = _label_means(cases, names)
    notes += _notes(cases, list(pairs))
    if outside:
        notes.append(other_labelling(outside, "--labels or `evaluation_labels` in the dataset JSON"))
    summary["notes"] = notes
    print(table(summary))
    for note in notes:
        print(f"note: {note}")
    target = out or (None if identity else folder)
    if target is not None:
        with writing_together(target / "evaluation.csv", target / "evaluation.json") as (rows, means):
            _write_csv(rows, cases)
            means.write_text(json.dumps(json_values(summary), indent=1) + "\n", encoding="utf-8")
        print(f"written: {target / 'evaluation.csv'}, {target / 'evaluation.json'}")
    return Evaluation(cases, summary)


def _collect(datasets: Sequence[LumirDataset]) -> dict[Pair, LumirDataset]:
    """Each pair once, with the first data set that lists it."""
    pairs: dict[Pair, LumirDataset] = {}
    groups: dict[tuple[Path, Path], tuple[str, LumirDataset]] = {}
    for dataset in datasets:
        for pair in dataset.validation:
            images = (pair.fixed.path, pair.moving.path)
            group, listing = groups.setdefault(images, (pair.named_group, dataset))
            if group != pair.named_group:
                texts = [f"in {name!r}" if name else "in no group" for name in (pair.named_group, group)]
                raise InputError(
                    f"{dataset.path}: the pair {pair.long_name} is {texts[0]} here, but {texts[1]} in {listing.path}; "
                    "name one group or one list"
                )
            pairs.setdefault(pair, dataset)
    return pairs


def _counted_under(pair: Pair, grouped: bool) -> dict[str, str]:
    """``group``, and where any pair has one ``contrasts``."""
    if not grouped:
        return {"group": pair.contrasts}
    return {"group": pair.named_group or NO_GROUP, "contrasts": pair.contrasts}


def _find_fields(folder: Path, pairs: list[Pair], notes: list[str]) -> dict[Pair, Path]:
    """The field of each pair; an error that names all that are missing or made from other images."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the one that `predict -o` wrote to")
    shared = shared_names(pairs)
    fields, missing, refused, foreign = {}, [], [], []
    for pair in tqdm(pairs, desc="checking", unit="pair", disable=None, leave=False):
        try:
            field = find_field(folder, pair, shared=pair.name in shared)
        except InputError as error:
            refused.append(str(error))
            continue
        if field is None:
            missing.append(f"disp_{pair.long_name if pair.name in shared else pair.name}.nii.gz")
        else:
            fields[pair] = field.path
            if field.provenance is None:
                foreign.append(field.path.name)
    problems = [f"{len(missing)} of {len(pairs)} fields are missing: {', '.join(missing)}"] if missing else []
    raise_problems(folder, problems + refused)
    unknown = {pair: path for pair, path in fields.items() if path.name in foreign}
    turned = [path.name for pair, path in unknown.items() if _is_turned(path, pair.fixed.path)]
    if turned:
        text = (
            f"{len(turned)} fields say another orientation than their fixed image and are taken as if they had its: "
            f"{_some(turned)}"
        )
        print(f"warning: {text}", file=sys.stderr)
        notes.append(text)
    if foreign:
        notes.append(f"{len(foreign)} fields have no provenance, their images are taken on trust: {_some(foreign)}")
    extra = sorted(path.name for path in folder.glob("disp_*.nii.gz") if path not in fields.values())
    if extra:
        text = f"{len(extra)} fields in {folder} belong to no pair of the data set and are left out: {_some(extra)}"
        print(f"warning: {text}", file=sys.stderr)
        notes.append(text)
    return fields


def _is_turned(field: Path, image: Path) -> bool:
    """Whether the axes of a field point elsewhere than those of its image, by their headers."""
    grids = [read_stated_grid(path)[1] for path in (field, image)]
    letters = {nibabel.aff2axcodes(affine) for affine in grids if affine is not None}
    return len(letters) > 1


def _score(
    pair: Pair,
    dataset: LumirDataset,
    field: Path | None,
    labels: Sequence[int] | Literal["found"] | None,
    outside: set[int],
) -> dict[str, float]:
    """A pair's scores; values of its label maps that the challenge does not score go to ``outside``."""
    shape = dataset.shape
    fixed, affine = read_volume(pair.fixed.path, shape=shape)
    disp = np.zeros((3, *shape), dtype=np.float32) if field is None else load_disp(field, shape=shape)[0]
    wanted = METRICS if pair.metrics is None else pair.metrics
    maps = _both("labels", pair.fixed.labels, pair.moving.labels, shape) if {"dsc", "hd95"} & set(wanted) else {}
    if labels is None:
        scored: Sequence[int] | None = pair.labels_to_score(dataset.evaluation_labels)
        if dataset.evaluation_labels is None and scored is not None:
            outside |= values_outside(scored, *maps.values())
    else:
        scored = None if labels == "found" else labels
    scores = score_pair(
        disp,
        **maps,
        **(_both("landmarks", pair.fixed.landmarks, pair.moving.landmarks, shape) if "tre" in wanted else {}),
        fixed_mask=fixed > 0,
        labels=scored,
        voxel_size=[float(size) for size in np.linalg.norm(affine[:3, :3], axis=0)],
        metrics=pair.metrics,
    )
    if "dsc" not in scores and ("dsc" in wanted or "tre" not in scores):
        moving, _ = read_volume(pair.moving.path, shape=shape)
        scores["lncc"] = _lncc(torch.from_numpy(disp)[None], _stored(fixed), _stored(moving))
    return scores


def _both(kind: str, fixed: Path | None, moving: Path | None, shape: tuple[int, ...]) -> dict[str, Any]:
    """The keyword arguments of :func:`score_pair` for two label files, none unless both exist."""
    if fixed is None or moving is None:
        return {}
    return {f"fixed_{kind}": read_labels(fixed, shape=shape), f"moving_{kind}": read_labels(moving, shape=shape)}


def _stored(volume: NDArray[Any]) -> Tensor:
    return torch.from_numpy(volume)[None, None]


def _lncc(disp: Tensor, fixed: Tensor, moving: Tensor) -> float:
    fixed, fixed_mask = clean_view(fixed)
    moving, moving_mask = clean_view(moving)
    with torch.no_grad():
        return float(warped_lncc(disp, fixed, moving, fixed_mask, moving_mask))


def _label_means(cases: Sequence[dict[str, Any]], names: dict[int, str]) -> dict[str, Any]:
    """Dice of each label, mean over the pairs that have it."""
    labels = sorted({int(key.removeprefix("dsc/")) for case in cases for key in case if key.startswith("dsc/")})
    means = {}
    for label in labels:
        values = [case[f"dsc/{label}"] for case in cases if not math.isnan(case.get(f"dsc/{label}", math.nan))]
        means[str(label)] = {"name": names.get(label, ""), "dsc": float(np.mean(values)) if values else math.nan}
    return means


def _notes(cases: Sequence[dict[str, Any]], pairs: Sequence[Pair]) -> list[str]:
    notes = []
    infinite = [case["pair"] for case in cases if math.isinf(case.get("hd95", 0.0))]
    if infinite:
        notes.append(f"HD95 is infinite, a label is lost in warping: {len(infinite)} pairs: {_some(infinite)}")
    lost = [case["pair"] for case in cases if math.isnan(case.get("tre", 0.0))]
    if lost:
        notes.append(f"TRE leaves out pairs that lose a landmark in warping: {len(lost)} pairs: {_some(lost)}")
    without = [(pair, case["pair"]) for pair, case in zip(pairs, cases, strict=True) if "lncc" in case]
    bare = [name for pair, name in without if pair.metrics is None or "dsc" in pair.metrics]
    if bare:
        notes.append(f"no label maps beside the images, LNCC instead of Dice: {len(bare)} pairs: {_some(bare)}")
    unmarked = [name for _, name in without if name not in bare]
    if unmarked:
        notes.append(f"no landmarks beside the images, LNCC instead of TRE: {len(unmarked)} pairs: {_some(unmarked)}")
    return notes


def _write_csv(path: Path, cases: Sequence[dict[str, Any]]) -> None:
    per_label = {key for case in cases for key in case if "/" in key}
    columns = [name for name in (*METRICS, "lncc") if any(name in case for case in cases)]
    columns += sorted(per_label, key=lambda key: (key.split("/")[0], int(key.split("/")[1])))
    with path.open("w", newline="", encoding="utf-8") as stream:
        under = ["group", "contrasts"] if "contrasts" in cases[0] else ["group"]
        writer = csv.DictWriter(stream, ["pair", *under, "field", *columns], lineterminator="\n")
        writer.writeheader()
        for case in cases:
            writer.writerow({key: "" if value != value else value for key, value in case.items()})


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f", and {len(names) - count} more" if len(names) > count else "")
