"""Ending a run at a time limit: a signal saves the run and stops it."""

import signal
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sitreg_lumir.data.lightning_internals import true_in_any_process
from sitreg_lumir.data.loaders import STOP_SIGNALS
from sitreg_lumir.errors import RunStoppedError
from sitreg_lumir.stop import handling_elsewhere


class StopOnSignal(Callback):
    """On SIGTERM, SIGUSR1 or SIGUSR2 writes last.ckpt after the running optimiser step, then ends the run.

    That is what cluster schedulers send before a time limit. However long a step takes, it is waited for; SIGINT ends
    the run at once, and so does any of them before the first step. Under several processes one that hears it is enough.
    An exception ends the run, not Lightning's ``should_stop``: that would close the epoch, and resuming could not
    go on in its middle.

    Args:
        checkpoint: the file to write.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received: int | None = None
        self._handling = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to the signals that ask for an end."""
        self._handling.enter_context(handling_elsewhere(STOP_SIGNALS, self._receive))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends training after the step during which a signal came."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if true_in_any_process(trainer, self.received is not None):
            trainer.save_checkpoint(self.checkpoint)
            name = signal.Signals(self.received).name if self.received else "a signal to another process"
            raise RunStoppedError(
                f"stopped by {name} after step {trainer.global_step}; saved, go on with --resume",
                128 + (self.received or signal.SIGTERM),
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back to whom they belonged."""
        self._handling.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives them back where an error ends the run, after which ``teardown`` is not called."""
        self._handling.close()
