"""Epochs at half resolution before those at the full one."""

from pathlib import Path
from typing import Any

import data_samples
import pytest
import torch

from sitreg_lumir.cli import main
from sitreg_lumir.network.weights import CARD_KEY
from sitreg_lumir.train.module import MindRegistration


def fit(root: Path, runs: Path, name: str, *more: str, epochs: int = 2) -> dict[str, Any]:
    """A tiny run of two pairs an epoch, the first epoch at half resolution; its last checkpoint."""
    code = main([
        "fit", "--config", "mind", "--name", name, "--runs", str(runs), "--wandb", "off",
        "--data.root", str(root), "--data.batch_size", "1", "--data.pairs_per_epoch", "2", "--data.num_workers", "0",
        "--data.cache", str(runs / "cache"), "--model.features", "[4,4]", "--model.head_features", "[4,4]",
        "--model.window", "3", "--model.recompute", "false", "--model.augmentation", "Augmentation",
        "--model.coarse_epochs", "1",
        "--trainer.max_epochs", str(epochs), "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0", *more,
    ])  # fmt: skip
    assert code == 0
    return torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
def test_the_first_epochs_see_half_the_resolution_and_resuming_equals_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = data_samples.make_dataset(tmp_path / "data")
    shapes: list[tuple[int, ...]] = []
    pair_loss = MindRegistration.pair_loss

    def noting(self: MindRegistration, moving: Any, fixed: Any, inverse: bool = False) -> Any:
        assert moving.clean.shape == moving.mask.shape == moving.network_input[:, :1].shape
        if not self._on_trial:  # steps that only find out what memory is needed
            shapes.append(tuple(moving.clean.shape[2:]))
        return pair_loss(self, moving, fixed, inverse)

    monkeypatch.setattr(MindRegistration, "pair_loss", noting)
    whole = fit(root, tmp_path / "runs", "whole")
    full = tuple(whole[CARD_KEY]["shape"])
    half = tuple(size // 2 for size in full)
    assert shapes == [half, half, full, full]
    assert whole[CARD_KEY]["training"]["coarse_epochs"] == 1
    assert whole[CARD_KEY]["training"]["diffusion_weight"] == 1.0
    fit(root, tmp_path / "runs", "parts", epochs=1)
    parts = fit(root, tmp_path / "runs", "parts", "--resume")
    assert shapes[4:] == [half, half, full, full]
    assert all(torch.equal(parts["state_dict"][name], values) for name, values in whole["state_dict"].items())


def test_a_negative_number_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_samples.make_dataset(tmp_path / "data")
    code = main([
        "fit", "--config", "mind", "--runs", str(tmp_path / "runs"), "--wandb", "off", "--data.root", str(root),
        "--model.coarse_epochs", "-1",
    ])  # fmt: skip
    assert code == 2
    assert "coarse_epochs" in capsys.readouterr().err
