"""Triplets: what a batch holds, who shares one, and runs that are stopped around the change from pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import SHAPE, head, make_dataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.sampler import draw_groups, view_seed
from sitreg_lumir.errors import InputError

START = 2  # epochs of pairs before those of triplets
PAIR_STEPS, TRIPLET_STEPS = 3, 5


class Recorder(LightningModule):
    """Learns nothing; notes epoch, indices and group size of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[tuple[int, list[int], int]] = []

    def on_train_start(self) -> None:
        self.on_train_epoch_start()  # resuming in the middle of an epoch does not start it

    def on_train_epoch_start(self) -> None:
        self.trainer.accumulate_grad_batches = self.trainer.datamodule.accumulate_in(self.current_epoch)  # type: ignore[attr-defined]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        assert batch["epoch"].tolist() == [self.current_epoch] * len(batch["index"])
        self.batches.append((self.current_epoch, batch["index"].tolist(), batch["images"].shape[1]))
        return self.weight.sum() * 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Triplets(Callback):
    """Asks for triplets in ``setup``, which Lightning calls after that of the data."""

    def __init__(self, start_epoch: int = START, triplets_per_epoch: int = TRIPLET_STEPS) -> None:
        self.start_epoch, self.triplets_per_epoch = start_epoch, triplets_per_epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: LumirDataModule = trainer.datamodule  # type: ignore[attr-defined]
        data.use_triplets(self.start_epoch, self.triplets_per_epoch)


def _data(tmp_path: Path, **options: Any) -> LumirDataModule:
    root = tmp_path / "data"
    if not root.exists():
        make_dataset(root)
    options = {"num_workers": 0, "pairs_per_epoch": 2 * PAIR_STEPS, "batch_size": 2} | options
    return LumirDataModule(str(root), cache=str(tmp_path / "cache"), **options)


def _trainer(tmp_path: Path, **options: Any) -> Trainer:
    silent: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    options = {"max_epochs": START + 2, "callbacks": [], "num_sanity_val_steps": 0} | options
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in options["callbacks"]),
        **silent | options,
    )


def _fit(
    tmp_path: Path,
    resume: Path | None = None,
    saving: Callback | None = None,
    triplets: Callback | None = None,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> Recorder:
    module = Recorder()
    callbacks = [triplets or Triplets(), *([saving] if saving else [])]
    trainer = _trainer(tmp_path, callbacks=callbacks, **options)
    trainer.fit(
        module, datamodule=_data(tmp_path, **data or {}), ckpt_path=resume, weights_only=True if resume else None
    )
    return module


def _saving(tmp_path: Path, **when: Any) -> ModelCheckpoint:
    when = when or {"every_n_train_steps": 1, "save_on_train_epoch_end": False}
    return ModelCheckpoint(tmp_path / "saved", filename="{epoch}-{step}", save_top_k=-1, **when)


def _loader(tmp_path: Path, rank: int = 0, world_size: int = 1, triplets: int = 6, **options: Any) -> Any:
    """The first epoch's batches of triplets on one of several processes."""
    data = _data(tmp_path, **options)
    data.trainer = _trainer(tmp_path)
    data._processes = lambda: (rank, world_size)  # type: ignore[method-assign]
    data.use_triplets(0, triplets)
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


def test_batches_of_triplets(tmp_path: Path) -> None:
    loader = _loader(tmp_path, seed=3, batch_size=4)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    groups = draw_groups(3, 0, 5, 3, 6)
    for index, batch in enumerate(batches):
        assert batch["images"].shape == (1, 3, 1, *SHAPE)
        assert batch["names"] == [tuple(f"{subject:04}_0000" for subject in groups[index])]
        assert len(set(batch["names"][0])) == 3
        assert (batch["index"].tolist(), batch["epoch"].tolist()) == ([index], [0])
        assert batch["view_seed"].tolist() == [[view_seed(3, 0, index, position) for position in range(3)]]
        for position, subject in enumerate(groups[index]):
            np.testing.assert_array_equal(batch["images"][0, position, 0], head(int(subject)))


def test_three_processes_share_each_triplet(tmp_path: Path) -> None:
    alone = list(_loader(tmp_path))
    for world_size in (3, 6):
        ranks = [list(_loader(tmp_path, rank, world_size)) for rank in range(world_size)]
        teams = world_size // 3
        for step in range(6 // teams):
            for rank in range(world_size):
                batch, expected = ranks[rank][step], alone[step * teams + rank // 3]
                assert batch["names"] == expected["names"]
                assert torch.equal(batch["view_seed"], expected["view_seed"])
                assert torch.equal(batch["images"], expected["images"])


def test_pairs_give_way_to_triplets(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, callbacks=[Triplets()])
    module, data = Recorder(), _data(tmp_path, micro_batch=1)
    trainer.fit(module, datamodule=data)
    pairs = [(epoch, [index], 2) for epoch in range(START) for index in range(2 * PAIR_STEPS)]
    triplets = [(epoch, [index], 3) for epoch in (START, START + 1) for index in range(TRIPLET_STEPS)]
    assert module.batches == pairs + triplets
    assert trainer.global_step == START * PAIR_STEPS + 2 * TRIPLET_STEPS
    assert [data.accumulate_in(epoch) for epoch in range(4)] == [2, 2, 1, 1]
    assert data.accumulate == 1
    module = Recorder()
    _trainer(tmp_path, max_epochs=1).fit(module, datamodule=_data(tmp_path))
    assert all(size == 2 for _, _, size in module.batches)


RUNS: dict[str, dict[str, Any]] = {  # when it saves, how it runs, triplets per epoch
    "each step": {"triplets": TRIPLET_STEPS},
    "each step, fewer triplets": {"triplets": 2},
    "each epoch": {"saving": {"every_n_epochs": 1, "save_on_train_epoch_end": True}},
    "each validation": {"saving": {"every_n_epochs": 1}, "val_check_interval": 2},
    "limited steps": {"max_epochs": -1, "max_steps": START * PAIR_STEPS + 2 * TRIPLET_STEPS},
    "two micro batches": {"data": {"micro_batch": 1}, "batches": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_resuming_anywhere_equals_never_having_stopped(tmp_path: Path, run: str) -> None:
    options = dict(RUNS[run])
    count, batches = options.pop("triplets", TRIPLET_STEPS), options.pop("batches", 1)
    options["triplets"] = Triplets(triplets_per_epoch=count)
    whole = _fit(tmp_path, saving=_saving(tmp_path, **options.pop("saving", {})), **options).batches
    first_phase = START * PAIR_STEPS
    assert len(whole) == first_phase * batches + 2 * count
    checkpoints = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert len(checkpoints) >= 4
    for saved in checkpoints:
        step = int(saved.stem.rpartition("=")[2])
        done = step * batches if step < first_phase else first_phase * (batches - 1) + step
        assert _fit(tmp_path, resume=saved, **options).batches == whole[done:], saved.name


@pytest.mark.parametrize("batch_size", [1, 6])
@pytest.mark.parametrize("when", [{}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}])
def test_after_the_pairs_their_batch_size_may_change(tmp_path: Path, batch_size: int, when: dict[str, Any]) -> None:
    whole = _fit(tmp_path, saving=_saving(tmp_path, **when)).batches
    first_phase = START * PAIR_STEPS
    (saved,) = (tmp_path / "saved").glob(f"epoch=*-step={first_phase}.ckpt")
    assert _fit(tmp_path, resume=saved, data={"batch_size": batch_size}).batches == whole[first_phase:]
    if not when:
        (saved,) = (tmp_path / "saved").glob(f"epoch=*-step={first_phase + 1}.ckpt")
        assert _fit(tmp_path, resume=saved, data={"batch_size": batch_size}).batches == whole[first_phase + 1 :]


def test_an_epoch_of_triplets_is_not_continued_with_pairs(tmp_path: Path) -> None:
    _fit(tmp_path, saving=_saving(tmp_path))
    (saved,) = (tmp_path / "saved").glob(f"epoch=*-step={START * PAIR_STEPS + 2}.ckpt")
    with pytest.raises(InputError, match=r"within epoch 2 .*group_size 3 -> 2"):
        _fit(tmp_path, resume=saved, triplets=Triplets(start_epoch=START + 1))
    (saved,) = (tmp_path / "saved").glob("epoch=*-step=2.ckpt")
    with pytest.raises(InputError, match=r"within epoch 0 .*group_size 2 -> 3"):
        _fit(tmp_path, resume=saved, triplets=Triplets(start_epoch=0))


def test_one_process_and_three_take_over_from_each_other(tmp_path: Path) -> None:
    single, three, six = (_loader(tmp_path, rank=0, world_size=world_size) for world_size in (1, 3, 6))
    state = single.state_dict() | {"consumed": 4}
    three.load_state_dict(state)
    assert [batch["index"].item() for batch in three] == [4, 5]
    with pytest.raises(InputError, match="batch_size 1 -> 2"):
        six.load_state_dict(state)


@pytest.mark.parametrize("early", [True, False])
def test_what_triplets_need_is_checked_before_the_first_epoch(tmp_path: Path, early: bool) -> None:
    def check(world_size: int, count: int = TRIPLET_STEPS, start: int = START, max_epochs: int = 9) -> None:
        data = _data(tmp_path, batch_size=12, pairs_per_epoch=12)
        data.trainer = _trainer(tmp_path, max_epochs=max_epochs)
        data._processes = lambda: (0, world_size)  # type: ignore[method-assign]
        if early:
            data.use_triplets(start, count)
        data.prepare_data()
        data.setup("fit")
        if not early:
            data.use_triplets(start, count)

    for world_size in (1, 3, 6, 12):
        check(world_size)
    for world_size in (2, 4):
        with pytest.raises(InputError, match=rf"^{world_size} processes .* choose 1 process or a multiple of 3"):
            check(world_size)
        check(world_size, max_epochs=START)  # ends before
    if early:
        check(9, start=0)  # needs no batch of pairs
    with pytest.raises(InputError, match=r"triplets_per_epoch 3 .*12 processes, which take 4 per step"):
        check(12, count=3)
    with pytest.raises(InputError, match="got -1 and 5"):
        check(1, start=-1)


def test_triplets_need_three_subjects(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", training=2)
    with pytest.raises(InputError, match="triplets need 3 training images, `training` lists 2"):
        _fit(tmp_path)
