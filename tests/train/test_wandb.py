"""What a training sends to W&B and what it keeps, read back from offline runs; its pictures and its speed."""

import os
import random
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import data_samples
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from wandb_runs import read_run, segments

from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.errors import InputError
from sitreg_lumir.train import panels, run
from sitreg_lumir.train.module import MindRegistration, RawRegistration
from sitreg_lumir.train.run import RunOptions, build, fit
from sitreg_lumir.train.throughput import pairs_in, peak_rss
from sitreg_lumir.train.tracking import dataset_entry, group_of, shareable, variant

wandb = pytest.importorskip("wandb")


def arguments(folder: Path, *more: str, config: str = "mind") -> list[str]:
    """A training of two epochs of two pairs on the data in a folder."""
    return [
        "--config", config, "--data.root", str(folder / "data"), "--data.cache", str(folder / "cache"),
        "--data.validation", "[LUMIR_dataset_multimodal.json]", "--data.batch_size", "1", "--data.num_workers", "0",
        "--data.pairs_per_epoch", "2", "--model.features", "[4,4]", "--model.head_features", "[4,4]",
        "--model.window", "3", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1",
        "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logger sets WANDB_MODE, which must not outlive the test."""
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: an ensemble member, trained for two epochs, resumed for one more, on a machine with a name."""
    folder = tmp_path_factory.mktemp("wandb")
    data_samples.make_dataset(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(socket, "gethostname", lambda: "the-name-of-this-machine")
        where = folder / "runs" / "ens_seed2"
        fit(arguments(folder, config="ens_seed2"), RunOptions(where, panels_every=1))
        resume = where / "checkpoints" / "last.ckpt"
        more = arguments(folder, "--trainer.max_epochs", "3", config="ens_seed2")
        fit(more, RunOptions(where, resume=resume, panels_every=1))
    return where


def test_keys_group_tag_and_config_are_there(logged: Path) -> None:
    stored = read_run(segments(logged)[0])
    assert (stored.run.run_group, list(stored.run.tags)) == ("ensemble", ["mind_final_aug"])
    assert (stored.run.project, stored.run.display_name) == ("sitreg-lumir", "ens_seed2")
    keys = {key for row in stored.history for key in row}
    assert {
        "val/dsc/T1-T1", "val/dsc/T1-T2", "val/gap", "val/lncc", "val/ndv", "train/loss", "train/lncc",
        "train/diffusion", "train/earlier_stages", "train/lr", "train/pairs_per_second", "memory/peak_rss_gb",
    } <= keys  # fmt: skip
    assert stored.config["seed_everything"] == 2
    assert stored.config["data"]["seed"] == 2 and stored.config["data"]["pairs_per_epoch"] == 2
    assert stored.config["model"]["init_args"]["features"] == [4, 4]
    assert stored.config["model"]["init_args"]["augmentation"]["class_path"].endswith("Augmentation")
    assert stored.config["versions"]["torch"] == torch.__version__
    assert stored.config["versions"]["wandb"] == wandb.__version__
    data = stored.config["dataset"]
    assert re.fullmatch(r"[0-9a-f]{64}", data["sha256"])
    assert (data["name"], data["training"], data["pairs"], data["shape"]) == ("tiny", 5, 4, list(data_samples.SHAPE))
    rates = [row["train/lr"] for row in stored.history if "train/lr" in row]
    assert rates == pytest.approx([4e-4] * 4)
    assert all(0.05 < row["memory/peak_rss_gb"] < 500 for row in stored.history if "memory/peak_rss_gb" in row)
    assert all(row["train/pairs_per_second"] > 0 for row in stored.history if "train/pairs_per_second" in row)
    gap = next(row for row in stored.history if "val/gap" in row)
    assert gap["val/gap"] == pytest.approx(gap["val/dsc/T1-T1"] - gap["val/dsc/T1-T2"])


def test_each_logging_has_one_picture_that_is_the_run_folder_s(logged: Path) -> None:
    first, second = segments(logged)
    recorded = []
    for segment in (first, second):
        for row in read_run(segment).history:
            if "panels" in row:
                (name,) = row["panels"]["filenames"]
                picture = segment / "files" / name
                assert picture.stat().st_size <= 1_000_000
                assert (row["panels"]["width"], row["panels"]["height"]) == Image.open(picture).size
                recorded.append(picture.read_bytes())
    kept = sorted((logged / "panels").iterdir())
    assert [file.name for file in kept] == ["epoch-000.png", "epoch-001.png", "epoch-002.png"]
    assert recorded == [file.read_bytes() for file in kept]


def test_nothing_of_this_machine_is_inside(logged: Path) -> None:
    secrets = [str(logged.parents[1]), str(Path.home()), sys.prefix, str(Path.cwd()), "the-name-of-this-machine"]
    for segment in segments(logged):
        files = [file for file in (segment / "files").rglob("*") if file.is_file()]
        assert files and all(file.suffix == ".png" for file in files), "no code, package list, output or metadata"
        stored = read_run(segment)
        for secret in secrets:
            assert secret not in stored.text
            assert not any(secret.encode() in file.read_bytes() for file in files)
        assert stored.run.host == "" and not stored.run.HasField("git")
        assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", stored.text)
        assert stored.config["data"]["root"] == "data" and "cache" not in stored.config["data"]


def test_resuming_goes_on_in_the_same_run_and_the_line_uploads_both(
    logged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (read_run(segment) for segment in segments(logged))
    assert first.run.run_id == second.run.run_id and second.run.resume
    steps = [row["trainer/global_step"] for row in second.history]
    assert min(steps) == 4 and max(steps) == 5
    resume = logged / "checkpoints" / "last.ckpt"
    folder = logged.parents[1]
    fit(arguments(folder, "--trainer.max_epochs", "4", config="ens_seed2"), RunOptions(logged, resume=resume))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wandb sync ")]
    assert shlex.split(line)[2:] == [str(segment) for segment in segments(logged)]
    command = [sys.executable, "-m", *shlex.split(line), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Would sync 3 run(s)" in done.stdout + done.stderr, done.stderr


def test_a_run_that_fails_says_how_to_upload_what_it_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data_samples.make_dataset(tmp_path / "data")

    def broken(self: MindRegistration, *views: Any, **options: Any) -> None:
        raise InputError("broken on purpose")

    monkeypatch.setattr(MindRegistration, "pair_loss", broken)
    with pytest.raises(InputError, match="on purpose"):
        fit(arguments(tmp_path), RunOptions(tmp_path / "runs" / "mine", wandb_images=False))
    assert wandb.run is None
    (segment,) = segments(tmp_path / "runs" / "mine")
    printed = capsys.readouterr().out
    assert f"wandb sync {segment}" in printed and "pictures" not in printed
    assert read_run(segment).exit_code == 1
    assert read_run(segment).run.run_group == ""


def test_pictures_stay_out_of_wandb_unless_asked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert RunOptions(folder, wandb="offline").images_to_wandb
    assert not RunOptions(folder, wandb="online").images_to_wandb
    assert RunOptions(folder, wandb="online", wandb_images=True).images_to_wandb
    data_samples.make_dataset(tmp_path / "data")
    fit(arguments(tmp_path), RunOptions(folder, wandb_images=False))
    (segment,) = segments(folder)
    assert not any("panels" in row for row in read_run(segment).history)
    assert not [file for file in (segment / "files").rglob("*") if file.is_file()]
    assert len(list((folder / "panels").iterdir())) == 2  # the first and the last epoch


def test_an_online_run_is_asked_for_as_such(tmp_path: Path) -> None:
    """Also after an offline run of the same process, which leaves WANDB_MODE behind; nothing is started here."""
    cli = build(arguments(tmp_path), RunOptions(tmp_path / "run", wandb="online"))
    (logger,) = [logger for logger in cli.trainer.loggers if type(logger).__name__ == "WandbLogger"]
    assert logger._wandb_init["mode"] == "online" and logger._wandb_init["resume"] == "allow"
    (shown,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, panels.Panels)]
    assert not shown.to_wandb
    settings = logger._wandb_init["settings"]
    assert settings.disable_code and settings.disable_git and settings.x_disable_machine_info and settings.host == ""


@pytest.mark.parametrize(
    ("config", "tag", "group"),
    [
        ("baseline", "baseline", None),
        ("mind", "mind", None),
        ("mind_final", "mind_final", None),
        ("mind_final_aug", "mind_final_aug", None),
        ("ens_seed4", "mind_final_aug", "ensemble"),
        ("minilumir/mind_final_small", "mind_final", None),
    ],
)
def test_each_shipped_config_has_its_tag_and_group(config: str, tag: str, group: str | None) -> None:
    cli = build(["--config", config, "--data.root", "nowhere"])
    assert variant(cli.model, cli.trainer.callbacks) == tag
    assert group_of([config]) == group


def test_configs_lose_their_folders() -> None:
    config = {
        "config": ["/home/me/ens.yaml"],
        "data": {
            "root": "../secret/LUMIR",
            "cache": "/tmp/me",
            "images": None,
            "validation": ["/home/me/b.json", "c.json"],
        },
        "trainer": {
            "default_root_dir": "~/runs",
            "callbacks": [{"init_args": {"dirpath": "/home/me/x"}}],
            "devices": 3,
        },
    }
    assert shareable(config) == {
        "data": {"root": "LUMIR", "images": None, "validation": ["b.json", "c.json"]},
        "trainer": {"default_root_dir": "runs", "callbacks": [{"init_args": {"dirpath": "x"}}], "devices": 3},
    }


def test_the_checksum_follows_lists_and_files(tmp_path: Path) -> None:
    def entry() -> dict[str, Any]:
        data = LumirDataModule(str(root), validation=["LUMIR_dataset_multimodal.json"], cache=str(tmp_path / "cache"))
        data.prepare_data()
        data.setup()
        return dataset_entry(data)

    root = data_samples.make_dataset(tmp_path / "data")
    first = entry()
    assert entry() == first and first["voxel_size"] == [2.0, 2.0, 2.0]
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    root = moved
    assert entry()["sha256"] == first["sha256"], "where the data lie does not matter"
    content = data_samples.content(root)
    data_samples.write(root, {**content, "training": content["training"][::-1]})
    assert entry()["sha256"] != first["sha256"]
    data_samples.write(root, content)
    assert entry()["sha256"] == first["sha256"]
    data_samples.save(root / "imagesTr/LUMIRMRI_0001_0000.nii.gz", data_samples.head(77) // 200 * 200)
    assert entry()["sha256"] != first["sha256"]


def test_pictures_do_not_change_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_samples.make_dataset(tmp_path / "data")
    augmented = ("--model.augmentation", "Augmentation")
    states = []
    for name in ("with", "without"):
        folder = tmp_path / "runs" / name
        fit(arguments(tmp_path, *augmented), RunOptions(folder, wandb="off", panels_every=1))
        assert (folder / "panels" / "epoch-000.png").is_file() == (name == "with")
        states.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True))
        monkeypatch.setattr(run, "Panels", lambda *settings: Callback())
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)


def shown_pair(seed: int = 0) -> panels.ShownPair:
    return panels.ShownPair("T1-T1  a_b", data_samples.head(seed), data_samples.head(seed + 1))


def test_registering_for_a_picture_leaves_the_module_and_all_random_states_as_they_were() -> None:
    module = MindRegistration(features=[4, 4], head_features=[4, 4]).train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    volumes = panels.register(module, shown_pair(), (2.0, 2.0, 2.0))
    panels.draw([("pair", volumes)])
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after
    assert all(part.training for part in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())
    module.eval()
    panels.register(module, shown_pair(), (2.0, 2.0, 2.0))
    assert not any(part.training for part in module.modules())


def test_two_pictures_differ_only_in_what_the_network_did() -> None:
    """Same slices, same windows: fixed and moving look the same whatever the network does."""
    drawn = []
    for module in (RawRegistration(features=[4, 4], head_features=[4, 4]), RawRegistration([4, 4], [4, 4])):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        drawn.append(np.asarray(panels.draw([("pair", panels.register(module, shown_pair(), (2.0, 2.0, 2.0)))])))
    first, second = drawn
    assert first.shape == second.shape
    width = first.shape[1] // len(panels.COLUMNS)
    same = [np.array_equal(first[:, at : at + width], second[:, at : at + width]) for at in range(0, 5 * width, width)]
    assert same == [True, True, False, False, False]


def test_noise_makes_no_picture_larger_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = len(panels.COLUMNS) * 256 * panels._MOST_PAIRS * (3 * 256 + 2 * panels._TITLE)  # pixels
    assert largest / 4 < 0.95 * panels.MAX_BYTES, "what cannot be compressed takes two bits a pixel at the last try"
    monkeypatch.setattr(panels, "MAX_BYTES", 300 * 300 // 3)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    panels.write_picture(tmp_path / "panels" / "noise.png", Image.fromarray(noise))
    assert 10_000 < (tmp_path / "panels" / "noise.png").stat().st_size <= 300 * 300 // 3
    assert [file.name for file in (tmp_path / "panels").iterdir()] == ["noise.png"]


def test_one_pair_of_each_group_is_shown_else_training_images(tmp_path: Path) -> None:
    root = data_samples.make_dataset(tmp_path / "data")
    data = LumirDataModule(str(root), validation=["LUMIR_dataset_multimodal.json"], cache=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup()
    chosen = [(pair.group, pair.long_name) for pair in panels.choose_pairs(data)]
    assert chosen == [("T1-T1", "0100_0000_0101_0000"), ("T1-T2", "0100_0000_0101_0001")]
    data.pairs = ()
    assert [pair.long_name for pair in panels.choose_pairs(data)] == ["0000_0000_0001_0000"]
    with pytest.raises(InputError, match="panels"):
        panels.Panels(tmp_path, 0, False)


def test_pairs_are_counted_over_all_processes() -> None:
    def batch(groups: int, images: int) -> dict[str, Any]:
        return {"images": torch.zeros(groups, images, 1, 2, 2, 2)}

    assert [pairs_in(batch(4, 2), 1), pairs_in(batch(2, 2), 3)] == [4, 6]
    assert [pairs_in(batch(1, 3), 1), pairs_in(batch(1, 3), 3)] == [3, 3], "a triplet: one process's pairs, or three's"
    assert 50e6 < peak_rss() < 500e9
