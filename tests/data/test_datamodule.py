"""The data module under a real Trainer: batches, resuming, validation, and clean errors."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from data_samples import AFFINE, SHAPE, content, head, make_dataset, save, write
from lightning.pytorch.callbacks import ModelCheckpoint

from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.sampler import draw_groups, view_seed
from sitreg_lumir.errors import InputError

SHARED = Path(__file__).parents[3] / "shared"


class Recorder(pl.LightningModule):
    """Learns nothing; notes which groups it was given, and can fail at one of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[tuple[int, list[int]]] = []
        self.pairs: list[str] = []
        self.fail_at = fail_at

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if len(self.batches) == self.fail_at:
            raise RuntimeError("stopped here")
        self.batches.append((int(batch["epoch"][0]), batch["index"].tolist()))
        return self.weight.sum() * 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.pairs += [pair.long_name for pair in batch["pair"]]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _data(tmp_path: Path, **options: Any) -> LumirDataModule:
    root = tmp_path / "data"
    if not root.exists():
        make_dataset(root)
    options = {"num_workers": 0, "pairs_per_epoch": 10, "batch_size": 2} | options
    return LumirDataModule(str(root), cache=str(tmp_path / "cache"), **options)


def _trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    silent: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
        **silent
        | {
            "max_epochs": 2,
            "reload_dataloaders_every_n_epochs": 1,
            "enable_checkpointing": "callbacks" in options,
        }
        | options,
    )


def _fit(tmp_path: Path, resume: Path | None = None, fail_at: int | None = None, **options: Any) -> Recorder:
    module = Recorder(fail_at)
    data = _data(tmp_path, **options.pop("data", {}))
    trainer = _trainer(tmp_path, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not resumable.*")
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    return module


def _every_step(tmp_path: Path, **options: Any) -> ModelCheckpoint:
    options = {"every_n_train_steps": 1, "save_on_train_epoch_end": False} | options
    return ModelCheckpoint(tmp_path / "saved", filename="{epoch}-{step}", save_top_k=-1, **options)


def test_training_batches(tmp_path: Path) -> None:
    data = _data(tmp_path, pairs_per_epoch=11, batch_size=4, micro_batch=2, seed=3)
    assert data.accumulate == 2
    data.trainer = _trainer(tmp_path)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 4  # 11 pairs: two whole batches of 4, in halves
    groups = draw_groups(3, 0, 5, 2, 11)
    for number, batch in enumerate(batches):
        assert batch["images"].shape == (2, 2, 1, *SHAPE)
        assert batch["images"].dtype == torch.uint8
        assert batch["index"].tolist() == [2 * number, 2 * number + 1]
        assert batch["epoch"].tolist() == [0, 0]
        for row, index in enumerate(batch["index"].tolist()):
            assert batch["names"][row] == tuple(f"{subject:04}_0000" for subject in groups[index])
            assert batch["view_seed"][row].tolist() == [view_seed(3, 0, index, k) for k in range(2)]
            for position in range(2):
                expected = head(int(groups[index][position]))
                np.testing.assert_array_equal(batch["images"][row, position, 0], expected)
    np.testing.assert_array_equal(data.affine, AFFINE)
    assert (data.shape, data.evaluation_labels) == (SHAPE, (0, 1, 2))


def test_one_float_volume_makes_a_float_batch(tmp_path: Path) -> None:
    data = _data(tmp_path, batch_size=10)
    save(tmp_path / "data/imagesTr/LUMIRMRI_0002_0000.nii.gz", head(2).astype(np.float32) / 2)
    data.trainer = _trainer(tmp_path)
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["images"].dtype == torch.float32
    assert batch["images"].max() > 200


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_at_any_step_equals_never_having_stopped(tmp_path: Path, accumulate: int) -> None:
    options: dict[str, Any] = {
        "data": {"num_workers": 2, "batch_size": 2 * accumulate, "micro_batch": 2},
        "accumulate_grad_batches": accumulate,
        "num_sanity_val_steps": 0,
    }
    whole = _fit(tmp_path, callbacks=[_every_step(tmp_path)], **options).batches
    steps = 10 // (2 * accumulate)
    assert whole == [(e, [2 * k, 2 * k + 1]) for e in range(2) for k in range(steps * accumulate)]
    for step in (1, steps - 1, steps, steps + 1, 2 * steps - 1):
        (saved,) = (tmp_path / "saved").glob(f"epoch=*-step={step}.ckpt")
        assert _fit(tmp_path, resume=saved, **options).batches == whole[step * accumulate :], saved.name


@pytest.mark.parametrize("when", ["validation", "epoch", "max_steps"])
def test_resuming_from_other_checkpoints(tmp_path: Path, when: str) -> None:
    options: dict[str, Any] = {"max_steps": 10} if when == "max_steps" else {}
    saving = _every_step(tmp_path)
    if when == "validation":
        saving = _every_step(tmp_path, every_n_train_steps=0, every_n_epochs=1)
        options["val_check_interval"] = 2
    if when == "epoch":
        saving = _every_step(tmp_path, every_n_train_steps=0, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = _fit(tmp_path, callbacks=[saving], **options).batches
    checkpoints = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert len(checkpoints) >= 2
    for saved in checkpoints:
        done = int(saved.stem.rpartition("=")[2])
        assert _fit(tmp_path, resume=saved, **options).batches == whole[done:], saved.name


def test_a_batch_that_failed_is_taken_again(tmp_path: Path) -> None:
    whole = _fit(tmp_path).batches
    saving = ModelCheckpoint(tmp_path / "saved", every_n_epochs=99, save_on_exception=True)
    with pytest.raises(RuntimeError, match="stopped here"):
        _fit(tmp_path, fail_at=7, callbacks=[saving])
    (saved,) = (tmp_path / "saved").glob("*.ckpt")
    assert _fit(tmp_path, resume=saved).batches == whole[7:]
    saved.unlink()
    halves: dict[str, Any] = {"data": {"micro_batch": 1}, "accumulate_grad_batches": 2}
    with pytest.raises(RuntimeError, match="stopped here"):
        _fit(tmp_path, fail_at=3, callbacks=[saving], **halves)
    (saved,) = (tmp_path / "saved").glob("*.ckpt")
    with pytest.raises(InputError, match="between the micro batches"):
        _fit(tmp_path, resume=saved, **halves)


def test_other_settings_cannot_continue_an_epoch(tmp_path: Path) -> None:
    _fit(tmp_path, callbacks=[_every_step(tmp_path)])
    saved = tmp_path / "saved/epoch=0-step=3.ckpt"
    with pytest.raises(InputError, match=r"within epoch 0 .*micro_batch 2 -> 1.*end of an epoch"):
        _fit(tmp_path, resume=saved, data={"micro_batch": 1})
    with pytest.raises(InputError, match="seed 0 -> 1"):
        _fit(tmp_path, resume=saved, data={"seed": 1})


def test_validation_pairs_bring_their_labels(tmp_path: Path) -> None:
    data = _data(tmp_path, validation=["LUMIR_dataset_multimodal.json"], num_workers=2)
    data.prepare_data()
    data.setup("validate")
    batches = list(data.val_dataloader())
    assert [batch["pair"][0].group for batch in batches] == ["T1-T1"] * 3 + ["T1-T2"]
    for batch in batches:
        (pair,) = batch["pair"]
        assert batch["fixed"].shape == (1, 1, *SHAPE)
        np.testing.assert_array_equal(batch["fixed"][0, 0], head(int(pair.fixed.subject)))
        np.testing.assert_array_equal(batch["moving_labels"][0, 0], head(int(pair.moving.subject)) // 100)
        assert batch["moving_labels"].dtype == torch.int32
        assert "fixed_landmarks" not in batch
    (tmp_path / "data/labelsVal/LUMIRMRI_0101_0000.nii.gz").unlink()
    assert ["fixed_labels" in batch for batch in data.val_dataloader()] == [False, False, True, True]


@pytest.mark.parametrize("verb", ["validate", "predict"])
def test_the_trainer_sees_each_pair_once(tmp_path: Path, verb: str) -> None:
    data = _data(tmp_path, num_workers=2)
    changed = content(tmp_path / "data")
    del changed["training"]
    write(tmp_path / "data", changed)
    module = Recorder()
    options = {"verbose": False} if verb == "validate" else {"return_predictions": False}
    getattr(_trainer(tmp_path), verb)(module, datamodule=data, **options)
    assert module.pairs == ["0100_0000_0101_0000", "0101_0000_0102_0000", "0102_0000_0100_0000"]
    np.testing.assert_array_equal(data.affine, AFFINE)


def test_processes_share_the_pairs_without_repeating_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data(tmp_path)
    data.prepare_data()
    data.setup("validate")
    names = []
    for rank in range(2):
        monkeypatch.setattr(data, "_processes", lambda rank=rank: (rank, 2))
        names.append([batch["pair"][0].name for batch in data.val_dataloader()])
    assert names == [["0100_0101", "0102_0100"], ["0101_0102"]]


def test_bad_input_is_one_line_before_anything_runs(tmp_path: Path) -> None:
    data = _data(tmp_path)
    file = tmp_path / "data/imagesVal/LUMIRMRI_0101_0000.nii.gz"
    good = file.read_bytes()
    file.write_bytes(good[:-20])
    with pytest.raises(InputError, match="0101_0000"):
        _trainer(tmp_path).fit(Recorder(), datamodule=data)
    file.write_bytes(good)
    with pytest.raises(InputError, match=r"does not divide"):
        _fit(tmp_path, data={"micro_batch": 3})
    with pytest.raises(InputError, match="does not fill one batch"):
        _fit(tmp_path, data={"pairs_per_epoch": 1})
    with pytest.raises(InputError, match="comes from several JSONs"):
        _fit(tmp_path, data={"validation": ["LUMIR_dataset.json"]})
    write(tmp_path / "data", content(tmp_path / "data") | {"training": None})
    with pytest.raises(InputError, match="has no `training` list"):
        _fit(tmp_path)


def test_an_error_in_a_worker_is_one_line(tmp_path: Path) -> None:
    data = _data(tmp_path, num_workers=1)
    save(tmp_path / "data/labelsVal/LUMIRMRI_0101_0000.nii.gz", head(1) / 2)
    with pytest.raises(InputError, match=r"^/.*0101_0000.nii.gz: labels must be integers.*$") as error:
        _trainer(tmp_path).validate(Recorder(), datamodule=data)
    assert "\n" not in str(error.value)


def test_the_trainer_must_reload_each_epoch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reload_dataloaders_every_n_epochs=1"):
        _fit(tmp_path, reload_dataloaders_every_n_epochs=0)


def test_minilumir(tmp_path: Path) -> None:
    root = SHARED / "minilumir" / "2mm"
    if not root.is_dir():
        pytest.skip(f"the small stand-in for LUMIR is not at {root}")
    data = LumirDataModule(str(root), ["LUMIR_dataset_multimodal.json"], num_workers=0, cache=str(tmp_path / "cache"))
    data.trainer = _trainer(tmp_path)
    data.prepare_data()
    data.setup("fit")
    assert (data.shape, len(data.pairs), len(data.train_dataloader())) == ((80, 112, 96), 24, 500)
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (4, 2, 1, 80, 112, 96)
    batch = next(iter(data.val_dataloader()))
    assert int(batch["fixed_landmarks"].max()) == 16
    assert 0 < np.linalg.det(data.affine) < 9
