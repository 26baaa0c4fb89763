"""Which run folders may be started again by the same command, and what checkpoints say of the machine: nothing."""

from pathlib import Path
from typing import Any

import data_samples
import pytest
import torch
from cli_calls import SMALL, TINY, refused

from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.train.callbacks import drop_rows_from
from sitreg_lumir.train.start_again import holds_run, remove_unfinished_start

RESOLVED = "# lightning.pytorch==2.6.6\nseed_everything: 0\n"


def folder_with(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "held"),
    [
        ({}, False),
        ({"config_yaml": RESOLVED}, False),
        ({"config_yaml": ""}, False),
        ({"config_yaml": RESOLVED, "metrics_csv": "step,train/loss\n9,1\n49,1\n"}, False),
        ({"config_yaml": RESOLVED, "panels__epoch-000_png": ""}, False),
        ({"config_yaml": RESOLVED, "metrics_csv": "step,train/loss\n59,1\n"}, True),
        ({"config_yaml": RESOLVED, "metrics_csv": "step,train/loss\nx,1\n"}, True),
        ({"config_yaml": RESOLVED, "metrics_csv": "step,train/loss\ninf,1\n"}, True),
        ({"config_yaml": RESOLVED, "metrics_csv": 'step,"train/loss\n9,1\n'}, True),
        ({"config_yaml": RESOLVED, "checkpoints__last_ckpt": ""}, True),
        ({"config_yaml": RESOLVED, "checkpoints__member_safetensors": ""}, True),
        ({"config_yaml": "data: mine\n"}, True),
        ({"metrics_csv": "step\n"}, True),
    ],
)
def test_a_folder_holds_a_run_if_anything_would_be_lost(tmp_path: Path, files: dict[str, str], held: bool) -> None:
    folder = folder_with(tmp_path / "run", **files)
    assert holds_run(folder, checkpoint_every=50) == held


def test_an_unfinished_start_goes_but_other_files_stay(tmp_path: Path) -> None:
    files = {"config_yaml": RESOLVED, "metrics_csv": "step\n", "wandb__run": "x", "notes_txt": "mine"}
    remove_unfinished_start(folder_with(tmp_path / "run", **files))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def test_checkpoints_hold_no_paths_and_moved_runs_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_samples.make_dataset(tmp_path / "data")
    arguments = ["fit", "--runs", str(tmp_path / "runs"), "--data.root", str(root), "--data.cache", str(tmp_path / "c")]
    assert main([*arguments, "--name", "first", *TINY, *SMALL]) == 0
    file = tmp_path / "runs" / "first" / "checkpoints" / "last.ckpt"
    texts = strings(torch.load(file, weights_only=True))
    assert len(texts) > 50 and [text for text in texts if str(tmp_path) in text or text.startswith("/")] == []
    (tmp_path / "runs" / "first").rename(tmp_path / "runs" / "second")
    epochs = ["--trainer.max_epochs", "2"]
    capsys.readouterr()
    assert main([*arguments, "--name", "second", "--resume", *TINY, *SMALL, *epochs]) == 0
    assert "dirpath has changed" not in capsys.readouterr().err
    assert not (tmp_path / "runs" / "first").exists()
    saved = sorted(path.name for path in (tmp_path / "runs" / "second" / "checkpoints").iterdir())
    assert saved == ["last.ckpt"]
    refused(capsys, [*arguments, "--name", "second", *TINY, *SMALL], "holds a run already")


def test_damaged_rows_go_with_those_that_come_again(tmp_path: Path) -> None:
    table = tmp_path / "metrics.csv"
    table.write_text("step,loss\n9,1\n,2\nnan,3\n1e999,4\nx,5\n8,6,,7\n10,8\n7\n")
    drop_rows_from(table, 10)
    assert table.read_text().split() == ["step,loss", "9,1", ",2", "8,6", "7"]
    table.write_bytes(b"step\0")
    with pytest.raises(InputError, match=r"metrics\.csv: .*move it away"):
        drop_rows_from(table, 10)
