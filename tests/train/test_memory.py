"""How much memory a step needs, what is chosen for it, and that no choice changes the gradient."""

import csv
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import data_samples
import pytest
import torch

from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.train import automatic, memory
from sitreg_lumir.train.automatic import line
from sitreg_lumir.train.final_epochs import GroupConsistency, add_term
from sitreg_lumir.train.memory import Choice, choose, kept_bytes, measure, peak_bytes
from sitreg_lumir.train.module import MindRegistration, RegistrationModule
from sitreg_lumir.train.refusals import unfinished_micro_batch
from sitreg_lumir.train.terms import LossTerm
from sitreg_lumir.train.triplets import View

CPU = torch.device("cpu")


def module_on(precision: str, **options: Any) -> MindRegistration:
    """A module of three levels whose Trainer computes in a precision."""
    module = MindRegistration(features=[8, 16, 16], head_features=[8, 16, 16], window=5, **options)
    consistency = GroupConsistency()
    add_term(module, LossTerm("group_consistency", "triplet", consistency.weight_at, consistency.value))
    half = partial(torch.autocast, "cpu", torch.bfloat16) if precision == "bf16" else nullcontext
    module._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(train_step_context=half))
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "recompute", "triplet"),
    [("32", False, False), ("32", True, False), ("bf16", False, False), ("32", False, True), ("bf16", True, True)],
)
def test_small_trial_steps_tell_what_a_large_one_takes(precision: str, recompute: bool, triplet: bool) -> None:
    """On a grid of odd sizes, too large for a CPU to treat its finest level as a small volume."""
    module, shape = module_on(precision), (64, 51, 30)
    step = automatic._trial_step(module, triplet, recompute)
    counted = peak_bytes(partial(step, 1, shape), CPU)
    assert measure(step, shape, CPU).of(1) == pytest.approx(counted, rel=0.12)
    assert not module.values and not module.recompute and all(p.grad is None for p in module.parameters())


@pytest.mark.slow
def test_recomputing_and_taking_triplets_in_turn_need_less_than_keeping_all() -> None:
    pair, recomputed, triplet = (
        measure(automatic._trial_step(module_on("32"), triplet, recompute), (24, 24, 24), CPU).per_pair
        for triplet, recompute in ((False, False), (False, True), (True, False))
    )
    assert recomputed < 0.75 * pair
    assert pair < triplet < automatic._TRIPLET_AT_MOST * pair


def test_what_is_kept_is_less_than_the_peak_and_counts_shared_storages_once() -> None:
    weight = torch.ones(1000, requires_grad=True)

    def forward() -> torch.Tensor:
        values = weight * 2
        return (values.exp() + values[::2].exp().sum()).sum()  # both views of one storage, and the two results

    assert kept_bytes(forward, [weight]) == 4 * (1000 + 500)
    with memory.LiveTensors() as live:
        first = torch.zeros(1000)
        second = first.view(10, 100)
        del first
        assert live.now == 4000
        del second
        assert live.now == 0
    assert live.peak == 4000


@pytest.mark.parametrize(
    ("room", "recompute", "expected"),
    [
        (None, None, (4, False, True)),
        (100, None, (4, False, True)),
        (50, None, (2, False, True)),
        (25, None, (1, False, True)),
        (19, None, (4, True, True)),
        (7, None, (1, True, True)),
        (3, None, (1, True, False)),
        (25, True, (4, True, True)),
        (7, False, (1, False, False)),
        (math.inf, None, (4, False, True)),
    ],
)
def test_the_most_pairs_are_taken_that_have_room(room: float | None, recompute: bool | None, expected: Any) -> None:
    choice = choose([1, 2, 4], lambda pairs, again: pairs * (4 if again else 20) + 2, room, recompute)
    assert (choice.micro_batch, choice.recompute, choice.fits) == expected


def test_one_line_says_what_was_chosen_and_why() -> None:
    printed = line(Choice(2, False, 31.2e9, True), (160, 224, 192), torch.device("cuda:1"), 40e9, 36e9)
    for words in ("micro_batch 2", "recompute false", "160x224x192", "31.20 GB", "40.0 GB free on cuda:1", "36.0 GB"):
        assert words in printed, words
    assert "\n" not in printed and "not be enough" not in printed
    assert "not be enough" in line(Choice(1, True, 31.2e9, False), (160, 224, 192), CPU, 8e9, 4e9)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_samples.make_dataset(tmp_path_factory.mktemp("memory") / "data", training=6)


def arguments(root: Path, runs: Path, name: str, *more: str) -> list[str]:
    callbacks = runs.parent / "ndv.yaml"
    callbacks.write_text(
        "trainer: {callbacks: [{class_path: NdvPenalty, init_args: {start_epoch: 0, weight: 1e-2}}]}\n"
    )
    return [
        "fit", "--config", "mind", "--config", str(callbacks), "--name", name, "--runs", str(runs), "--wandb", "off",
        "--checkpoint-every", "1", "--data.root", str(root), "--data.pairs_per_epoch", "8", "--data.num_workers", "0",
        "--data.cache", str(runs.parent / "cache"), "--model.features", "[8,8]", "--model.head_features", "[8,8]",
        "--model.window", "3", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1",
        "--trainer.limit_val_batches", "0", *more,
    ]  # fmt: skip


def state(runs: Path, name: str) -> dict[str, Any]:
    return dict(torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True))


@pytest.mark.slow
def test_any_micro_batch_takes_the_same_steps_and_logs_the_same_loss(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folded volume, a sum over voxels, included."""
    runs = tmp_path / "runs"
    choices = {"auto": "auto", "one": "1", "two": "2", "four": "4", "all": "null"}
    for name, value in choices.items():
        exact = ["--trainer.precision", "64-true", "--data.micro_batch", value]
        assert main(arguments(root, runs, name, *exact)) == 0
        printed = capsys.readouterr().out
        assert ("memory: micro_batch 1, recompute false" in printed) == (name == "auto" or name == "one"), printed
    logged = {
        name: [
            {key: float(value) for key, value in row.items() if key.startswith("train/") and value}
            for row in csv.DictReader((runs / name / "metrics.csv").open())
            if row.get("train/loss")
        ]
        for name in choices
    }
    keys = ("train/loss", "train/lncc", "train/ndv_sum", "train/diffusion", "train/earlier_stages")
    for name in choices:
        assert len(logged[name]) == 2, "one row for each step"
        for row, expected in zip(logged[name], logged["all"], strict=True):
            for key in keys:
                assert row[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-12), (name, key)
        for key, tensor in state(runs, "all")["state_dict"].items():
            torch.testing.assert_close(state(runs, name)["state_dict"][key], tensor, rtol=1e-7, atol=1e-9)
    for key, tensor in state(runs, "one")["state_dict"].items():
        assert torch.equal(state(runs, "auto")["state_dict"][key], tensor), key


def test_a_run_that_goes_on_within_an_epoch_keeps_its_micro_batch_and_saves_whole_steps_only(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert main(arguments(root, runs, "whole", "--data.micro_batch", "2")) == 0
    pair_loss = RegistrationModule.pair_loss

    def stopped(self: RegistrationModule, *views: View, **options: Any) -> Any:
        if self.global_step == 1 and not self._on_trial:
            raise InputError("stopped here")
        return pair_loss(self, *views, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RegistrationModule, "pair_loss", stopped)
        assert main(arguments(root, runs, "parts", "--data.micro_batch", "2")) == 2
    assert unfinished_micro_batch(state(runs, "parts")) == 2
    capsys.readouterr()
    saved: list[int] = []
    writing = RegistrationModule.on_save_checkpoint

    def note(self: RegistrationModule, checkpoint: dict[str, Any]) -> None:
        saved.append(self.trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        writing(self, checkpoint)

    monkeypatch.setattr(RegistrationModule, "on_save_checkpoint", note)
    assert main(arguments(root, runs, "parts", "--resume")) == 0
    assert "memory: micro_batch 2" in capsys.readouterr().out
    assert saved and all(batches % 2 == 0 for batches in saved), saved
    assert unfinished_micro_batch(state(runs, "parts")) is None
    for key, tensor in state(runs, "whole")["state_dict"].items():
        assert torch.equal(state(runs, "parts")["state_dict"][key], tensor), key


def test_full_memory_is_one_line_that_says_what_to_set(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: RegistrationModule, *views: View, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 3.00 GiB free.")

    monkeypatch.setattr(RegistrationModule, "pair_loss", full)
    assert main(arguments(root, tmp_path / "runs", "full")) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("sitreg-lumir: error: CUDA out of memory") and printed.err.count("\n") == 1
    assert "--data.micro_batch 1" in printed.err and "--model.recompute true" in printed.err
    assert "not be enough" in printed.out


def test_where_one_pair_has_no_room_it_is_recomputed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(automatic, "room_on", lambda device, sharers: 1e-6)
    assert main(arguments(root, tmp_path / "runs", "small")) == 0
    printed = capsys.readouterr().out
    assert "micro_batch 1, recompute true" in printed and "not be enough" in printed
    assert main(arguments(root, tmp_path / "runs", "given", "--model.recompute", "false")) == 0
    assert "recompute false" in capsys.readouterr().out
