"""What is taken from inside Lightning, and may change with its versions: in this file alone, with the reason for each.

It lies below ``train``, since the data module needs it, too.
"""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from sitreg_lumir.io.atomic import writing


def datamodule_of(trainer: Trainer) -> Any:
    """The data module that a trainer runs on; Lightning sets it as an attribute that the class does not declare."""
    return trainer.datamodule  # type: ignore[attr-defined]


def running(trainer: Trainer | None) -> str | None:
    """``fit``, ``validate``, ``test`` or ``predict``, whichever a trainer runs.

    ``setup`` cannot tell validation within a training from any other, but the training images are needed then.
    """
    return str(trainer.state.fn.value) if trainer is not None and trainer.state.fn is not None else None


def batches_done(trainer: Trainer) -> int:
    """Batches of the present epoch before this one; a callback's own count would not survive a resume."""
    return trainer.fit_loop.epoch_loop.batch_idx


def batches_consumed(trainer: Trainer) -> int:
    """Batches of the present epoch that a step has used; the loader itself knows only what it has handed out."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(current.processed)


def begin_epoch(trainer: Trainer, batches: int) -> None:
    """Lets an epoch of so many batches begin where a run resumes after the last batch of the epoch before.

    Lightning compares that epoch's count with the length of this one: in a longer one it would take them as done.
    """
    loop = trainer.fit_loop.epoch_loop
    if loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch:
        loop.batch_progress.current.completed = batches


def step_context(trainer: Trainer) -> Any:
    """The context of a training step's forward pass (autocast), for trial steps that take the same memory."""
    return trainer.precision_plugin.train_step_context()


def failed_while_restoring(error: BaseException) -> bool:
    """Whether an error arose while Lightning took its state from a checkpoint, of which it checks nothing itself."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").endswith("trainer.connectors.checkpoint_connector"):
            return True
        trace = trace.tb_next
    return False


def leave_signals_alone(trainer: Trainer) -> Trainer:
    """A trainer that does not handle signals: Lightning's own handlers only take note of SIGTERM, and work goes on."""
    trainer._signal_connector.register_signal_handlers = _no_handlers  # type: ignore[method-assign]
    return trainer


def _no_handlers() -> None:
    """Nothing is registered."""


def true_in_any_process(trainer: Trainer, value: bool) -> bool:
    """Whether a value is true in one process or more; all processes have to ask."""
    return trainer.strategy.reduce_boolean_decision(value, all=False)


def without_anonymous(logger: WandbLogger) -> WandbLogger:
    """A W&B logger without the argument ``anonymous``, which Lightning always passes and W&B warns of."""
    logger._wandb_init.pop("anonymous", None)
    return logger


class _AppendingWriter(ExperimentWriter):
    """Lightning's CSV writer, but rows of an earlier run in the folder stay."""

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.is_file():
            with file.open(newline="") as rows:
                self.metrics_keys = next(csv.reader(rows), [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        file = Path(self.metrics_file_path)
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        with writing(file) as partial, partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames)
            writer.writeheader()
            writer.writerows(rows)


class RunMetrics(CSVLogger):
    """``metrics.csv`` in the run folder; resuming appends, where Lightning's logger would delete the rows so far.

    Each row is on its way to the disk when it is logged, so that a killed run loses none.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> _ExperimentWriter:
        """The writer of ``metrics.csv``, made when it is first used."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment
