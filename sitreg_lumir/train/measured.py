"""What a module measures: the means of a step's losses over all processes, and the scores of validation pairs."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from nibabel.affines import voxel_sizes
from torch import Tensor

from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.groups import other_labelling
from sitreg_lumir.data.images import Pair
from sitreg_lumir.errors import CollectiveError
from sitreg_lumir.metrics import PairTable, score_pair, values_outside
from sitreg_lumir.train.processes import named_by_process

_LABEL_KEYS = ("fixed_labels", "moving_labels", "fixed_landmarks", "moving_landmarks")


def finite_means(
    values: dict[str, list[Tensor]], names: list[tuple[str, ...]], step: int, processes: int
) -> dict[str, Tensor]:
    """Means of a step's loss and its terms over its micro batches and all processes, if the loss is finite.

    One exchange of a few numbers between the processes serves the log and the decision to stop.

    Args:
        values: scalars by micro batch; ``loss`` is one of them.
        names: of the images in this step.
        step: its number, for the error.
        processes: number of processes, each of which calls this.

    Raises:
        CollectiveError: the loss is not finite in one process or more; raised in all of them.
    """
    means = torch.stack([torch.stack(of_micro_batches).mean() for of_micro_batches in values.values()])
    total = means.clone()
    if processes > 1:
        dist.all_reduce(total)
        total /= processes
    result = dict(zip(values, total, strict=True))
    if not torch.isfinite(result["loss"]):
        own = dict(zip(values, means, strict=True))["loss"]
        culprits = "" if torch.isfinite(own) else "; ".join(", ".join(group) for group in names)
        raise CollectiveError(
            f"the loss is not finite at step {step} ({named_by_process(culprits)}); last.ckpt is good: "
            "check these images, or resume with a lower learning rate"
        )
    return result


def score(
    table: PairTable,
    disp: Tensor,
    pair: Pair,
    batch: dict[str, Any],
    mask: Tensor,
    data: LumirDataModule,
    report_labels: bool,
) -> bool:
    """Adds a validation pair's scores to a table.

    Args:
        table: gets the row.
        disp: ``(1, 3, X, Y, Z)``, voxels.
        pair: whose field that is.
        batch: holds its label maps and landmarks, where there are any.
        mask: of the fixed image, bool, ``(1, 1, X, Y, Z)``.
        data: says which labels count, and the size of a voxel.
        report_labels: warn of labels that nobody listed and that are not scored.

    Returns:
        whether such labels were reported.
    """
    labels = pair.labels_to_score(data.evaluation_labels)
    maps = {key: batch[key][0, 0].cpu() for key in _LABEL_KEYS if key in batch}
    scores = score_pair(
        disp[0].float().cpu(),
        metrics=pair.metrics,
        fixed_mask=mask[0, 0].cpu(),
        labels=labels,
        voxel_size=voxel_sizes(data.affine).tolist(),
        **maps,
    )
    table.add(scores, contrasts=pair.contrasts, group=pair.named_group)
    if labels is None or data.evaluation_labels is not None or not report_labels:
        return False
    outside = values_outside(labels, *(maps[key] for key in _LABEL_KEYS[:2] if key in maps))
    if outside:
        rank_zero_warn(other_labelling(outside, "`evaluation_labels` in the dataset JSON"))
    return bool(outside)
