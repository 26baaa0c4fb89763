"""Scores of pairs as a table with a row for each pair, and their means."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sitreg_lumir.metrics.pair_scores import METRICS

Row = Mapping[str, Any]

CONTRASTS = ("T1-T1", "T1-T2")


def mean_scores(rows: Sequence[Row], names: Iterable[str]) -> dict[str, Any]:
    """Means of scores over pairs; a pair whose score is nan, or that has none, does not count.

    Args:
        rows: the scores of each pair.
        names: of the scores.

    Returns:
        the number of ``pairs`` and, for each score that a pair has, ``mean``, ``sd`` (n-1; nan for a single pair and
        where a score is infinite), ``pairs`` and ``infinite``: how many have it, and of how many it is infinite.
    """
    means: dict[str, Any] = {"pairs": len(rows)}
    for name in names:
        values = np.array([row[name] for row in rows if not math.isnan(row.get(name, math.nan))])
        if len(values):
            infinite = int(np.isinf(values).sum())
            means[name] = {
                "mean": float(values.mean()),
                "sd": float(values.std(ddof=1)) if not infinite and len(values) > 1 else math.nan,
                "pairs": len(values),
                "infinite": infinite,
            }
    return means


class PairTable:
    """The scores of the validation pairs during training; processes that share the pairs put their rows together."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, scores: Mapping[str, float], *, contrasts: str, group: str = "") -> None:
        """Adds a pair.

        Args:
            scores: what :func:`~sitreg_lumir.metrics.score_pair` returned.
            contrasts: of the pair; other ones than :data:`CONTRASTS` count under ``other``.
            group: in which the pair counts as well as under its contrasts, if it is in one.
        """
        self.rows.append({**scores, "contrasts": contrasts if contrasts in CONTRASTS else "other", "group": group})

    def means(self) -> dict[str, Tensor]:
        """Means over the pairs of all processes that have a value; all processes must call it.

        Returns:
            float64 scalars: ``<score>/<contrasts>`` and ``<score>/<group>`` for each of ``METRICS``, ``ndv`` (and
            where there are groups ``hd95``) over all pairs, ``gap`` (Dice of the first contrasts minus that of the
            second), and, where a mean is infinite, ``<score>_infinite/<contrasts or group>``: of how many pairs.
        """
        rows = self._of_all_processes()
        groups = sorted({row["group"] for row in rows} - {"", *CONTRASTS, "other"})
        parts = {name: [row for row in rows if row["contrasts"] == name] for name in (*CONTRASTS, "other")}
        parts |= {name: [row for row in rows if row["group"] == name] for name in groups}
        result: dict[str, float] = {}
        for part, members in parts.items():
            means = mean_scores(members, METRICS)
            for name in METRICS:
                if name in means:
                    result[f"{name}/{part}"] = means[name]["mean"]
                    if means[name]["infinite"]:
                        result[f"{name}_infinite/{part}"] = means[name]["infinite"]
        over_all = mean_scores(rows, ("ndv", "hd95") if groups else ("ndv",))
        result |= {name: value["mean"] for name, value in over_all.items() if name != "pairs"}
        first, second = (f"dsc/{contrasts}" for contrasts in CONTRASTS)
        if first in result and second in result:
            result["gap"] = result[first] - result[second]
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in result.items()}

    def clear(self) -> None:
        """Removes all rows."""
        self.rows = []

    def _of_all_processes(self) -> list[Row]:
        """The rows in the order of the pairs, of which process r of W has each W-th from r on."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.rows
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self.rows)
        return [row for row in chain.from_iterable(zip_longest(*gathered)) if row is not None]
