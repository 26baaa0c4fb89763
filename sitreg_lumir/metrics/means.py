"""Means of scores over pairs, for validation during training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from sitreg_lumir.metrics.labels import Volume
from sitreg_lumir.metrics.pair_scores import METRICS, score_pair

CONTRASTS = ("T1-T1", "T1-T2")


class RegistrationScores(Metric):
    """Means of :func:`score_pair` over pairs, apart for their contrasts and groups; processes add up exactly.

    Args:
        contrasts: names reported one by one; pairs of other contrasts count under ``other``.
        groups: names of groups, in which a pair counts as well as under its contrasts.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    infinite: Tensor

    def __init__(self, contrasts: Sequence[str] = CONTRASTS, groups: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.contrasts, self.groups = (*contrasts, "other"), tuple(groups)
        shape = (len(self.contrasts) + len(self.groups), len(METRICS))
        for name in ("sums", "counts", "infinite"):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        disp: Tensor,
        *,
        group: str,
        contrasts: str | None = None,
        fixed_labels: Volume | None = None,
        moving_labels: Volume | None = None,
        fixed_landmarks: Volume | None = None,
        moving_landmarks: Volume | None = None,
        fixed_mask: Volume | None = None,
        labels: Sequence[int] | None = None,
        voxel_size: float | Sequence[float] = 1.0,
        metrics: Sequence[str] | None = None,
    ) -> None:
        """Scores one pair.

        Args:
            disp, fixed_labels and so on: as for :func:`score_pair`.
            group: that the pair counts in; one that is not in ``groups`` counts as its contrasts.
            contrasts: that the pair counts under as well; by default ``group`` says them.
        """
        scores = score_pair(
            disp,
            fixed_labels=fixed_labels,
            moving_labels=moving_labels,
            fixed_landmarks=fixed_landmarks,
            moving_landmarks=moving_landmarks,
            fixed_mask=fixed_mask,
            labels=labels,
            voxel_size=voxel_size,
            metrics=metrics,
        )
        row = group if contrasts is None else contrasts
        rows = [self.contrasts.index(row if row in self.contrasts else "other")]
        if group in self.groups:
            rows.append(len(self.contrasts) + self.groups.index(group))
        for column, name in enumerate(METRICS):
            value = scores.get(name, float("nan"))
            if not np.isnan(value):
                self.sums[rows, column] += value
                self.counts[rows, column] += 1
                self.infinite[rows, column] += float(np.isinf(value))

    def compute(self) -> dict[str, Tensor]:
        """Means over the pairs that have a value; rows and scores without any pair are left out.

        Returns:
            ``<score>/<contrasts>`` and ``<score>/<group>`` for each of ``METRICS``, ``ndv`` (and where there are
            groups ``hd95``) over all pairs, ``gap`` (Dice of the first contrasts minus that of the second), and,
            where a mean is infinite, ``<score>_infinite/<row>``: of how many pairs.
        """
        result: dict[str, Tensor] = {}
        for row, name_of_row in enumerate((*self.contrasts, *self.groups)):
            for column, name in enumerate(METRICS):
                if self.counts[row, column] > 0:
                    result[f"{name}/{name_of_row}"] = self.sums[row, column] / self.counts[row, column]
                if self.infinite[row, column] > 0:
                    result[f"{name}_infinite/{name_of_row}"] = self.infinite[row, column].clone()
        every = slice(len(self.contrasts))  # each pair once
        for name in ("ndv", "hd95") if self.groups else ("ndv",):
            column = METRICS.index(name)
            if self.counts[every, column].sum() > 0:
                result[name] = self.sums[every, column].sum() / self.counts[every, column].sum()
        pair = [f"dsc/{contrasts}" for contrasts in self.contrasts[:2]]
        if all(name in result for name in pair):
            result["gap"] = result[pair[0]] - result[pair[1]]
        return result
