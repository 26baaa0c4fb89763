"""What a run leaves that was ended before its first checkpoint, and how the same command starts again."""

import csv
import os
import shutil
from contextlib import suppress
from pathlib import Path

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
        with metrics.open(newline="") as stream:
            return max((int(float(row.get("step") or 0)) for row in csv.DictReader(stream)), default=0)
    except (OSError, ValueError):
        return float("inf")
