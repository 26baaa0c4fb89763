"""The final epochs: weights and rates, triplets in two ways with one gradient, and stopping and resuming."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import data_samples
import pytest
import torch
import warm_processes
from triplet_runs import QUIET, arguments

from sitreg_lumir.cli import main
from sitreg_lumir.network.sitreg import Stage
from sitreg_lumir.train.final_epochs import GroupConsistency, NdvPenalty
from sitreg_lumir.train.module import MindRegistration
from sitreg_lumir.train.triplets import View, pair_of, scale_gradient, three_pairs_in_turn


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_samples.make_dataset(tmp_path_factory.mktemp("final") / "data", training=6)


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with ``whole``: an epoch of pairs, then one of triplets, without a stop."""
    runs = tmp_path_factory.mktemp("trained") / "runs"
    assert main(arguments(root, runs, "whole")) == 0
    return runs


def checkpoint(runs: Path, name: str) -> dict[str, Any]:
    return torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)


def weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return dict(checkpoint(runs, name)["state_dict"])


def rows(runs: Path, name: str) -> list[dict[str, str]]:
    return [row for row in csv.DictReader((runs / name / "metrics.csv").open()) if row.get("train/loss")]


def validation(runs: Path, name: str) -> dict[str, float]:
    """The last validation scores of a run."""
    validated = [row for row in csv.DictReader((runs / name / "metrics.csv").open()) if row.get("val/lncc")]
    return {key: float(value) for key, value in validated[-1].items() if key.startswith("val/") and value}


def test_weights_follow_the_published_schedule() -> None:
    penalty, consistency = NdvPenalty(), GroupConsistency()
    assert [penalty.weight_at(epoch, 0) for epoch in (0, 29.99, 30, 44.9)] == [0, 0, 1e-5, 1e-5]
    assert [consistency.weight_at(epoch, 0) for epoch in (0, 29.99, 30, 30.25, 31, 44.9)] == [0, 0, 0, 10, 40, 40]
    assert (consistency.learning_rate, consistency.triplets_per_epoch) == (1e-4, 2000)


def test_each_image_is_moving_once_and_fixed_once() -> None:
    assert [pair_of(rank) for rank in range(6)] == [(0, 1), (1, 2), (2, 0)] * 2


def test_scaling_a_gradient_keeps_the_value() -> None:
    value = torch.tensor(2.0, requires_grad=True)
    scaled = scale_gradient(value.square(), 3.0)
    scaled.backward()
    assert float(scaled.detach()) == 4 and float(value.grad) == 12


def test_a_run_changes_phase_on_its_own(trained: Path) -> None:
    logged = rows(trained, "whole")
    assert len(logged) == 6
    assert [bool(row["train/group_consistency"]) for row in logged] == [False, False, False, False, True, True]
    assert [bool(row["train/ndv_sum"]) for row in logged] == [False] * 3 + [True] * 3
    assert checkpoint(trained, "whole")["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-4


@pytest.mark.slow
def test_the_final_epochs_follow_a_finished_first_phase_with_their_own_rate(
    root: Path, trained: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    assert main(arguments(root, runs, "first", epochs=1)) == 0
    first = runs / "first" / "checkpoints" / "last.ckpt"
    assert checkpoint(runs, "first")["optimizer_states"][0]["param_groups"][0]["lr"] == 4e-4
    assert main(arguments(root, runs, "second", "--resume", str(first))) == 0
    assert checkpoint(runs, "second")["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-4
    for name, tensor in weights(trained, "whole").items():
        assert torch.equal(tensor, weights(runs, "second")[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_the_pairs_in_turn_gives_the_gradient_of_keeping_them(recompute: bool) -> None:
    """Also where each pair's activations are recomputed in turn, a recomputation within the other."""

    def gradients(in_turn: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = MindRegistration(
            features=[8, 8], head_features=[8, 8], window=3, recompute=recompute and in_turn
        ).double()
        module.active_terms = lambda scope: [(term, 1.0) for term in module.terms if term.scope == scope]  # type: ignore
        images = torch.rand(3, 1, 1, 10, 8, 6, dtype=torch.float64)
        views = [View(image, image > 0.2, module.inputs(image)) for image in images]
        if in_turn:
            loss, disps, disps_inv, _ = three_pairs_in_turn(module.pair_step, views)
        else:
            steps = [module.pair_step(views[k], views[(k + 1) % 3]) for k in range(3)]
            loss, disps, disps_inv = sum(f[0] for f in steps) / 3, [f[1] for f in steps], [f[2] for f in steps]
        masks = [view.mask for view in views]
        (loss + 40 * GroupConsistency.value(disps, disps_inv, masks)).backward()
        return [parameter.grad for parameter in module.parameters()]

    for kept, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_three_processes_and_one_device_take_the_same_step(root: Path, tmp_path: Path) -> None:
    """Augmented views, ramp, NDV and consistency on: after three steps the weights agree, in float64."""
    runs = tmp_path / "runs"
    common = {"start": 0, "epochs": 1}
    exact = ("--trainer.precision", "64-true")
    assert main(arguments(root, runs, "one", *exact, **common)) == 0
    three = arguments(root, runs, "three", *exact, "--data.batch_size", "3", **common)
    three[three.index("--trainer.devices") + 1] = "3"
    command = [sys.executable, "-m", "sitreg_lumir.cli", *three, "--trainer.strategy", "ddp"]
    done = subprocess.run(command, capture_output=True, text=True, env=QUIET, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(rows(runs, "three")) == 3
    for name, tensor in weights(runs, "one").items():
        torch.testing.assert_close(weights(runs, "three")[name], tensor, atol=1e-6, rtol=0)
    for single, shared in zip(rows(runs, "one"), rows(runs, "three"), strict=True):
        assert float(single["train/lncc"]) == pytest.approx(float(shared["train/lncc"]), abs=1e-5)
    scores = [validation(runs, name) for name in ("one", "three")]
    assert {"val/lncc", "val/dsc/T1-T1", "val/ndv"} <= scores[0].keys()
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_a_message(root: Path, tmp_path: Path) -> None:
    three = arguments(root, tmp_path / "runs", "dying", "--data.batch_size", "3", start=0, epochs=500)
    three[three.index("--trainer.devices") + 1] = "3"
    command = [sys.executable, "-m", "sitreg_lumir.cli", *three, "--trainer.strategy", "ddp"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=QUIET)
    file = tmp_path / "runs" / "dying" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 150
    while not file.is_file() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.2)
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True)
    os.kill(int(listed.stdout.split()[0]), signal.SIGKILL)
    started = time.monotonic()
    output, _ = running.communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert running.returncode != 0
    assert "another process of this run ended" in output or "terminated with code" in output, output[-2000:]


@pytest.mark.slow
def test_two_processes_are_refused_before_anything_runs(root: Path, tmp_path: Path) -> None:
    two = arguments(root, tmp_path / "runs", "two", "--data.batch_size", "2", start=5, epochs=6)
    two[two.index("--trainer.devices") + 1] = "2"
    command = [sys.executable, "-m", "sitreg_lumir.cli", *two, "--trainer.strategy", "ddp"]
    done = subprocess.run(command, capture_output=True, text=True, env=QUIET, timeout=120)
    assert done.returncode == 2
    assert "multiple of 3" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "two" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [2, 4])
def test_a_killed_run_resumes_as_if_it_had_never_stopped(
    root: Path, trained: Path, tmp_path: Path, kill_at: int
) -> None:
    runs = tmp_path / "runs"
    environment = {**QUIET, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed_run = arguments(root, runs, "killed")
    done = warm_processes.run(killed_run, environment=environment, code=KILLED.format(kill_at=kill_at))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert checkpoint(runs, "killed")["global_step"] == kill_at
    assert main(arguments(root, runs, "killed", "--resume")) == 0
    for name, tensor in weights(trained, "whole").items():
        assert torch.equal(tensor, weights(runs, "killed")[name]), name
    logged = ((trained, "whole"), (runs, "killed"))
    whole, killed = ([(row["step"], row["train/loss"]) for row in rows(*run)] for run in logged)
    assert whole == killed


KILLED = """
import os, signal, sys
from lightning.pytorch import Callback
from sitreg_lumir.train import run
from sitreg_lumir.train.callbacks import checkpoint_callbacks

class Kill(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == {kill_at}:
            trainer.loggers[0].save()
            os.kill(os.getpid(), signal.SIGKILL)

run.checkpoint_callbacks = lambda *arguments: [*checkpoint_callbacks(*arguments), Kill()]
from sitreg_lumir.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_resuming_goes_on(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    runs = tmp_path / "runs"
    long = {"start": 500, "epochs": 500}
    loading = ["--data.num_workers", "2"]
    running = warm_processes.start(arguments(root, runs, "long", *loading, **long), environment=QUIET)
    file = runs / "long" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 100
    while not file.is_file() and time.monotonic() < deadline and not running.ended():
        time.sleep(0.2)
    os.killpg(running.pid, number)  # schedulers signal the processes that load volumes, too
    ended = running.wait(timeout=60)
    error = ended.stderr
    assert ended.returncode == 128 + number, error[-2000:]
    assert f"stopped by {number.name}" in error and "--resume" in error and "Traceback" not in error
    step = checkpoint(runs, "long")["global_step"]
    assert f"after step {step}" in error
    epochs = step // 3 + 1
    assert main(arguments(root, runs, "long", "--resume", start=500, epochs=epochs)) == 0
    assert checkpoint(runs, "long")["global_step"] == 3 * epochs


def test_a_loss_that_is_not_finite_names_the_images_and_keeps_the_checkpoint(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    original = MindRegistration.pair_loss

    def broken(self: MindRegistration, *views: View, **options: bool) -> tuple[torch.Tensor, Stage]:
        loss, last = original(self, *views, **options)
        return loss * (float("nan") if self.global_step == 2 else 1.0), last

    monkeypatch.setattr(MindRegistration, "pair_loss", broken)
    assert main(arguments(root, runs, "broken")) == 2
    error = capsys.readouterr().err
    assert "not finite at step 2" in error and "_0000" in error
    saved = checkpoint(runs, "broken")
    assert saved["global_step"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in saved["state_dict"].values())
