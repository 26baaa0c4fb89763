"""What a run leaves that was ended before its first checkpoint, and how the same command starts again."""

import math
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.table import Table, read_table

_RESOLVED = "# lightning.pytorch"  # how the resolved config that a run writes begins


def is_first_process() -> bool:
    """Whether this is the process that looks after the run folder; the others of a run follow it."""
    return not any(int(os.environ.get(name) or 0) for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))


def holds_run(folder: Path, checkpoint_every: int) -> bool:
    """Whether a run folder holds a run that would be lost.

    It does not if the run was ended before its first checkpoint: then there is nothing to go on from, and all that it
    has logged comes again.

    Args:
        folder: the run folder; need not exist.
        checkpoint_every: steps between two checkpoints.
    """
    config, metrics, checkpoints = (folder / name for name in ("config.yaml", "metrics.csv", "checkpoints"))
    if not any(path.exists() for path in (config, metrics, checkpoints)):
        return False
    if any(checkpoints.glob("*.ckpt")):
        return True
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        return not all(path.name.startswith(".sitreg-lumir-") for path in checkpoints.iterdir())
    if config.exists() and not _is_of_run(config):
        return True
    return metrics.exists() and (not config.exists() or _last_step(metrics) >= checkpoint_every)


def remove_unfinished_start(folder: Path) -> None:
    """Removes what a run left that :func:`holds_run` finds nothing of worth in; its W&B run begins again, too.

    The config goes last: as long as it is there, the folder is known to be a run's.
    """
    if not (folder / "config.yaml").exists():
        return
    print(f"{folder}: an earlier start ended before its first checkpoint; starts again")
    for name in ("wandb", "panels"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "metrics.csv").unlink(missing_ok=True)
    (folder / "config.yaml").unlink(missing_ok=True)


def _is_of_run(config: Path) -> bool:
    """Whether a run wrote this config: empty, if it was killed just then."""
    with suppress(OSError, UnicodeDecodeError), config.open(encoding="utf-8") as stream:
        text = stream.readline()
        return not text or text.startswith(_RESOLVED)
    return False


def _last_step(metrics: Path) -> float:
    """The last step that a run has logged; a table that cannot be read counts as a long one."""
    try:
        table = read_table(metrics, "")
    except InputError:
        return math.inf
    return max((step_of(table, cells) for _, cells in table.rows), default=0)


def step_of(table: Table, cells: Sequence[str]) -> float:
    """The step of a row of ``metrics.csv``; 0 where it has none, infinity where it is damaged."""
    try:
        step = float(dict(zip(table.names, cells, strict=False)).get("step") or 0)
    except ValueError:
        return math.inf
    return math.inf if math.isnan(step) else step
