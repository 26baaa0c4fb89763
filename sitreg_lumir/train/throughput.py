"""What a training costs: learning rate, pairs per second and memory, logged with the loss."""

import resource
import sys
import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

_WINDOW = 50  # batches that the speed is the mean of, at most


class Throughput(Callback):
    """Logs ``train/lr``, ``train/pairs_per_second``, ``memory/peak_rss_gb`` and, on a GPU, ``memory/gpu_peak_gb``.

    Speed is of all processes together, over the last batches, with the time they waited for data; validation and
    pictures between epochs do not count. Memory is in 1e9 bytes, since the process started, of the first process
    without those that load its data; on the GPU what PyTorch had allocated for tensors.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._since = 0.0
        self._warm = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()  # resuming in the middle of an epoch does not start it

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock again: what lies between epochs is no training."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs pairs per second and memory."""
        now = time.perf_counter()
        if len(self._recent) == 1 and not self._warm:
            self._recent.clear()  # the process's first batch, in which code was compiled, tells nothing of the others
            self._warm = True
        self._recent.append((now - self._since, pairs_in(batch, trainer.world_size)))
        self._since = now
        seconds, pairs = (sum(values) for values in zip(*self._recent, strict=True))
        values = {
            "train/lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "train/pairs_per_second": pairs / max(seconds, 1e-9),
            "memory/peak_rss_gb": peak_rss() / 1e9,
        }
        if pl_module.device.type == "cuda":
            values["memory/gpu_peak_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
        for name, value in values.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=len(batch["images"]))


def pairs_in(batch: dict[str, Any], world_size: int) -> int:
    """Pairs that all processes together register in one batch; a triplet has three, one process's or three's."""
    groups, images = batch["images"].shape[:2]
    return int(groups * world_size * (3 if images == 3 and world_size == 1 else 1))


def peak_rss() -> int:
    """The most memory that this process has held so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
