"""What a training writes by Lightning: metrics that survive a resume, and whole checkpoints."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from sitreg_lumir.io.atomic import reason_of, writing
from sitreg_lumir.io.table import read_table
from sitreg_lumir.train.start_again import step_of

_PATHS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path")  # of ModelCheckpoint's state


def drop_rows_from(file: Path, step: int) -> None:
    """Removes the rows of ``metrics.csv`` that a resumed run will write again.

    Args:
        file: the CSV.
        step: the first step that comes again.

    Raises:
        InputError: it is no table.
    """
    if not file.is_file():
        return
    table = read_table(file, "move it away, the run goes on without its rows")
    rows = [cells for _, cells in table.rows if step_of(table, cells) < step]
    with writing(file) as partial, partial.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(table.names)
        writer.writerows(cells[: len(table.names)] for cells in rows)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear whole or not at all: written beside their name, flushed, then renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint whole, or keeps the one before it."""
        remedy = "the checkpoint before it is kept; make room, then go on with --resume"
        with writing(Path(path), remedy=remedy) as partial:
            try:
                super().save_checkpoint(checkpoint, partial, storage_options)
            except RuntimeError as error:  # PyTorch's writer says with a RuntimeError that a disk is full
                raise OSError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """Why PyTorch could not write a file: the system's reason, which it hides in the error's context."""
    cause = error.__context__
    return reason_of(cause) if isinstance(cause, OSError) else " ".join(str(error).split())[:160]


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, but what it keeps in a checkpoint are names, and no paths of this machine.

    So they tell nothing about it, and a run folder that was moved resumes like any other.
    """

    @property
    def state_key(self) -> str:
        """Lightning's own name, so that checkpoints of plain ModelCheckpoints resume."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def state_dict(self) -> dict[str, Any]:
        """The state, each path by its last part."""
        state = super().state_dict()
        for key in _PATHS:
            state[key] = Path(state[key]).name if state.get(key) else state.get(key)
        state["best_k_models"] = {Path(path).name: score for path, score in state["best_k_models"].items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes names, and paths of earlier versions, as files of this run's folder."""
        folder = Path(self.dirpath or "")
        state = {**state_dict, "dirpath": self.dirpath}
        for key in _PATHS[1:]:
            state[key] = str(folder / Path(state[key]).name) if state.get(key) else state.get(key, "")
        models = state.get("best_k_models") or {}
        state["best_k_models"] = {str(folder / Path(path).name): score for path, score in models.items()}
        super().load_state_dict(state)


class StepCheckpoint(RunCheckpoint):
    """A :class:`RunCheckpoint` that never writes between the micro batches of a step.

    A resumed run would otherwise save after its first micro batch, and that file lacks the gradients so far.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when a step is due."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def checkpoint_callbacks(folder: Path, every_n_steps: int, keep_every_n_epochs: int) -> list[ModelCheckpoint]:
    """``last.ckpt`` every few steps and at each epoch's end, and one that stays every few epochs."""
    checkpoints = folder / "checkpoints"
    common: dict[str, Any] = {
        "dirpath": checkpoints,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    return [
        StepCheckpoint(filename="last", every_n_train_steps=every_n_steps, **common),
        RunCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **common),
        RunCheckpoint(
            filename="epoch-{epoch:03d}",
            every_n_epochs=keep_every_n_epochs,
            save_top_k=-1,
            save_on_train_epoch_end=True,
            **common,
        ),
    ]
