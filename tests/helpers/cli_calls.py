"""Calls of the command line on small data, and how a refused one ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from sitreg_lumir.cli import main

SMALL = ["--model.features", "[4,4]", "--model.head_features", "[4,4]", "--model.window", "3"]


def predict_arguments(root: Path, checkpoint: Path, out: Path, *more: str) -> list[str]:
    cache = ["--data.cache", str(out.parent / "cache"), "--data.num_workers", "0"]
    return ["predict", "--members", str(checkpoint), "--data.root", str(root), "-o", str(out), *cache, *more]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """The command ends with 2 and one line that has these words."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    line = [line for line in error.splitlines() if line.startswith("sitreg-lumir: error:")]
    assert code == 2 and len(line) == 1 and "Traceback" not in error, error
    for word in words:
        assert word in line[0], line[0]


TINY = [
    "--wandb", "off", "--data.batch_size", "1", "--data.pairs_per_epoch", "2", "--data.num_workers", "0",
    "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
    "--trainer.accelerator", "cpu",
]  # fmt: skip


def fit_tiny(root: Path, folder: Path, cache: Path) -> list[str]:
    """Arguments of a training of two steps into ``folder/runs/tiny``; no trial steps tell what memory they take."""
    data = ["--data.root", str(root), "--data.cache", str(cache), "--model.recompute", "false"]
    return ["fit", "--runs", str(folder / "runs"), "--name", "tiny", *data, *TINY, *SMALL]


def shell(arguments: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """The installed command in a process of its own, which has no working folder on its path."""
    command = [str(Path(sys.executable).with_name("sitreg-lumir")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)
