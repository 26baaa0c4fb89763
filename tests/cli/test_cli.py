"""The command line as a user meets it: help, wrong input, and the way from data to scores."""

import csv
import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import data_samples
import nibabel
import numpy as np
import pytest
import torch
import warm_processes
from cli_calls import SMALL, predict_arguments, refused

from sitreg_lumir.cli import main
from sitreg_lumir.data.cache import VolumeCache
from sitreg_lumir.network.official import official_name
from sitreg_lumir.network.weights import load_member
from sitreg_lumir.train.module import MindRegistration

VERBS = (
    "register", "preprocess", "apply", "resample-field", "template", "fit", "validate", "test", "predict", "evaluate",
    "submit", "container", "export", "demo", "doctor",
)  # fmt: skip


def fit_arguments(root: Path, runs: Path, *more: str, name: str = "tiny") -> list[str]:
    data = [
        "--data.root",
        str(root),
        "--data.batch_size",
        "1",
        "--data.pairs_per_epoch",
        "2",
        "--data.num_workers",
        "0",
    ]
    trainer = [
        "--trainer.max_epochs",
        "2",
        "--trainer.log_every_n_steps",
        "1",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.accelerator",
        "cpu",
    ]
    cache = ["--data.cache", str(runs / "cache")]
    return ["fit", "--config", "mind", "--name", name, "--runs", str(runs), "--wandb", "off",
            *data, *cache, *SMALL, *trainer, *more]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return data_samples.make_dataset(tmp_path / "data")


def test_help_answers_within_two_seconds_and_names_every_verb() -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "sitreg_lumir.cli", "--help"], capture_output=True, text=True)
    assert time.monotonic() - start < 2
    assert done.returncode == 0
    for verb in VERBS:
        assert f"sitreg-lumir {verb}" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_s_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"example: sitreg-lumir {verb}" in capsys.readouterr().out


def test_fit_leaves_a_run_folder_and_goes_on_in_it_only_if_asked_to(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments(root, tmp_path / "runs")) == 0
    folder = tmp_path / "runs" / "tiny"
    assert "sitreg-lumir predict --members" in capsys.readouterr().out
    assert {"config.yaml", "metrics.csv", "checkpoints"} <= {path.name for path in folder.iterdir()}
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    for key in ("train/lncc", "train/diffusion", "train/earlier_stages", "train/loss", "val/dsc/T1-T1", "val/ndv"):
        assert any(row.get(key) for row in rows), key
    assert "val/lncc" in rows[0]
    refused(capsys, fit_arguments(root, tmp_path / "runs"), "tiny", "--resume")
    assert main(fit_arguments(root, tmp_path / "runs", "--resume", "--trainer.max_epochs", "3")) == 0
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    steps = [int(row["step"]) for row in rows if row["val/dsc/T1-T1"]]
    assert steps == [1, 3, 5]  # the first run's rows are kept, none is doubled


@pytest.mark.slow
def test_wandb_stays_offline_in_the_run_folder_and_resuming_keeps_its_id(root: Path, tmp_path: Path) -> None:
    arguments = fit_arguments(root, tmp_path / "runs", "--trainer.max_epochs", "1")
    arguments[arguments.index("off")] = "offline"
    for more in ([], ["--resume", "--trainer.max_epochs", "2"]):
        done = warm_processes.run([*arguments, *more], tmp_path)
        assert done.returncode == 0, done.stderr
    logs = list((tmp_path / "runs/tiny/wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 2 and len({log.name for log in logs}) == 1  # run-<id>.wandb
    assert not (tmp_path / "wandb").exists()


def test_fields_are_written_skipped_refused_and_scored(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, checkpoint = trained
    out = tmp_path / "fields"
    assert main(predict_arguments(root, checkpoint, out, "--inverse", "--warped")) == 0
    names = sorted(path.name for path in out.glob("*.nii.gz"))
    assert names == sorted(
        f"{kind}_{pair}.nii.gz"
        for kind in ("disp", "inverse", "warped")
        for pair in ("0100_0101", "0101_0102", "0102_0100")
    )
    field = nibabel.load(out / "disp_0100_0101.nii.gz")
    assert field.shape == (*data_samples.SHAPE, 3) and field.get_data_dtype() == np.float32
    np.testing.assert_allclose(field.affine, data_samples.AFFINE)
    provenance = json.loads((out / "disp_0100_0101.json").read_text())
    assert provenance["fixed"]["name"] == "LUMIRMRI_0100_0000.nii.gz" and len(provenance["members"][0]["sha256"]) == 64

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert main(predict_arguments(root, checkpoint, out)) == 0
    assert "3 fields are there already, 0 to predict" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}

    half_precision = tmp_path / "other.safetensors"
    assert main(["export", str(checkpoint), "-o", str(half_precision), "--half"]) == 0
    refused(capsys, predict_arguments(root, half_precision, out), "disp_0100_0101", "members.0.sha256", "--overwrite")
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(predict_arguments(root, half_precision, out, "--overwrite")) == 0
    assert not list(out.glob("warped_*")), "what an earlier run left does not belong to the new fields"

    assert main(["evaluate", str(out), "--dataset", str(root / "LUMIR_dataset.json")]) == 0
    assert "T1-T1" in capsys.readouterr().out
    assert len(list(csv.DictReader((out / "evaluation.csv").open()))) == 3
    assert json.loads((out / "evaluation.json").read_text())["groups"]["T1-T1"]["pairs"] == 3
    (out / "disp_0101_0102.nii.gz").unlink()
    refused(capsys, ["evaluate", str(out), "--dataset", str(root / "LUMIR_dataset.json")], "0101_0102")


@pytest.mark.slow
def test_two_processes_share_the_pairs(trained: tuple[Path, Path], tmp_path: Path) -> None:
    root, checkpoint = trained
    assert main(predict_arguments(root, checkpoint, tmp_path / "one", "--inverse")) == 0
    two = predict_arguments(root, checkpoint, tmp_path / "two", "--inverse", "--devices", "2", "--device", "cpu")
    done = subprocess.run([sys.executable, "-m", "sitreg_lumir.cli", *two], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 9 and names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        if name.endswith(".nii.gz"):
            by_one, by_two = (nibabel.load(tmp_path / folder / name).get_fdata() for folder in ("one", "two"))
            np.testing.assert_allclose(by_one, by_two, atol=1e-4)


def test_t1_and_t2_runs_into_one_folder_never_mix(trained: tuple[Path, Path], tmp_path: Path) -> None:
    root, checkpoint = trained
    for lists in (
        ["LUMIR_dataset.json", "LUMIR_dataset_multimodal.json"],
        ["LUMIR_dataset_multimodal.json", "LUMIR_dataset.json"],
    ):
        out = tmp_path / lists[0]
        for name in lists:
            assert main(predict_arguments(root / name, checkpoint, out)) == 0
        fields = sorted(path.name for path in out.glob("disp_*.nii.gz"))
        assert len(fields) == 4
        moving = {json.loads(path.read_text())["moving"]["name"]: path.name for path in out.glob("disp_0100*.json")}
        assert set(moving) == {"LUMIRMRI_0101_0000.nii.gz", "LUMIRMRI_0101_0001.nii.gz"}
        second = "LUMIRMRI_0101_0001.nii.gz" if lists[0] == "LUMIR_dataset.json" else "LUMIRMRI_0101_0000.nii.gz"
        assert moving[second] == f"disp_0100_0000_0101_{second[14:18]}.json"  # the later one takes the long name
        assert main(["evaluate", str(out), "--dataset", *[str(root / name) for name in lists]]) == 0


def test_an_ensemble_predicts(trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, checkpoint = trained
    members = tmp_path / "members"
    for name in ("one", "two"):
        assert main(["export", str(checkpoint), "-o", str(members / f"{name}.safetensors")]) == 0
    assert main(predict_arguments(root, members, tmp_path / "both")) == 0
    assert main(predict_arguments(root, checkpoint, tmp_path / "single")) == 0
    both, single = (nibabel.load(tmp_path / name / "disp_0100_0101.nii.gz").get_fdata() for name in ("both", "single"))
    np.testing.assert_allclose(both, single, atol=1e-4)
    assert len(json.loads((tmp_path / "both/disp_0100_0101.json").read_text())["members"]) == 2


def test_official_weights_become_a_member(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, checkpoint = trained
    state = load_member(checkpoint).network.state_dict()
    torch.save({official_name(name): tensor for name, tensor in state.items()}, tmp_path / "official.pth")
    arguments = ["export", str(tmp_path / "official.pth"), "-o", str(tmp_path / "member.safetensors"), "--official"]
    refused(capsys, arguments, "--data")
    assert main([*arguments, "--dataset", str(root)]) == 0
    assert main(predict_arguments(root, tmp_path / "member.safetensors", tmp_path / "out")) == 0


def test_validate_prints_scores(trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, checkpoint = trained
    config = checkpoint.parents[1] / "config.yaml"
    for verb in ("validate", "test"):
        arguments = [
            verb,
            "--config",
            str(config),
            "--ckpt_path",
            str(checkpoint),
            "--data.validation",
            "[LUMIR_dataset_multimodal.json]",
        ]
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert "val/dsc/T1-T1" in printed and "val/dsc/T1-T2" in printed


def test_wrong_data_ends_in_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = root / "imagesTr/LUMIRMRI_0001_0000.nii.gz"
    good = image.read_bytes()
    runs = tmp_path / "runs"

    def fit_is_refused(*words: str) -> None:
        refused(capsys, fit_arguments(root, runs), *words)
        assert not (runs / "tiny" / "checkpoints").exists()

    image.unlink()
    fit_is_refused(image.name)
    image.write_bytes(good[: len(good) // 2])
    fit_is_refused(image.name)
    image.write_bytes(gzip.compress(b"not an image"))
    fit_is_refused(image.name)
    data_samples.save(image, np.ones((*data_samples.SHAPE, 2), np.uint8))
    fit_is_refused(image.name)
    data_samples.save(image, np.ones((4, 4, 4), np.uint8))
    fit_is_refused(image.name, "(4, 4, 4)")
    values = data_samples.head(1).astype(np.float32)
    values[3, 3, 3] = np.nan
    data_samples.save(image, values)
    fit_is_refused(image.name)
    image.write_bytes(good)
    content = data_samples.content(root)
    data_samples.write(root, {key: value for key, value in content.items() if key != "training"})
    fit_is_refused("LUMIR_dataset.json", "training")
    refused(capsys, fit_arguments(root / "nowhere", runs), "nowhere")
    data_samples.write(root, content)
    assert main(fit_arguments(root, runs)) == 0, "a refused run leaves nothing in the way"


def test_wrong_keys_and_files_end_in_one_line(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, checkpoint = trained
    runs = tmp_path / "runs"
    refused(capsys, fit_arguments(root, runs, "--data.batch_sise", "2"), "data.batch_sise", "data.batch_size")
    refused(capsys, fit_arguments(root, runs, "--model.learning_rat", "2"), "learning_rat", "learning_rate")
    refused(capsys, fit_arguments(root, runs, "--trainer.max_epoch", "2"), "trainer.max_epoch", "trainer.max_epochs")
    config = tmp_path / "mine.yaml"
    config.write_text("trainer: {max_epoch: 2}\n")
    refused(capsys, fit_arguments(root, runs, "--config", str(config)), "max_epoch", "max_epochs")
    config.write_text("trainer: {max_epochs: [\n")
    refused(capsys, fit_arguments(root, runs, "--config", str(config)), "mine.yaml")
    refused(capsys, ["fit", "--config", "ens_sed3"], "ens_sed3", "ens_seed3")
    refused(capsys, ["fit", "--config", "mind"], "--data")
    refused(capsys, fit_arguments(root, runs, "--resume", "gone.ckpt"), "gone.ckpt")
    refused(capsys, predict_arguments(root, tmp_path / "gone.ckpt", tmp_path / "out"), "gone.ckpt")
    refused(capsys, predict_arguments(root, checkpoint, tmp_path / "out", "--data.rot", "x"), "data.rot", "data.root")
    refused(capsys, predict_arguments(root, checkpoint, tmp_path / "out", "--data.roo", "x"), "data.roo", "data.root")
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(checkpoint.read_bytes()[:5000])
    refused(capsys, predict_arguments(root, broken, tmp_path / "out"), "broken.ckpt", "truncated")
    refused(capsys, ["evaluate", str(tmp_path / "gone"), "--dataset", str(root)], "gone")
    refused(capsys, ["evaluate", str(root), "--dataset", str(tmp_path / "gone.json")], "gone.json")
    refused(capsys, ["evaluate", "x", "--dataset", str(root), "--fast"], "--fast")
    refused(capsys, ["export", str(checkpoint), "-o", str(tmp_path / "member.pt")], "member.pt", ".safetensors")
    assert not (tmp_path / "out").exists() and not runs.exists()


def test_members_of_another_grid_are_refused(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, checkpoint = trained
    member = tmp_path / "member.safetensors"
    assert main(["export", str(checkpoint), "-o", str(member)]) == 0
    card = json.loads(member.with_suffix(".json").read_text())
    member.with_suffix(".json").write_text(json.dumps({**card, "shape": [80, 112, 96]}))
    refused(capsys, predict_arguments(root, member, tmp_path / "out"), "(80, 112, 96)", "(8, 10, 6)")


def test_what_is_refused_is_refused_before_volumes_are_cached(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid, existing fields, the folder, and for `validate` and `fit --resume` the network."""
    root, checkpoint = trained
    monkeypatch.setattr(VolumeCache, "build", lambda self: pytest.fail("volumes are cached first"))
    content = torch.load(checkpoint, weights_only=True)
    content["sitreg_lumir"]["affine"] = np.diag([4.0, 4.0, 4.0, 1.0]).tolist()
    coarse = tmp_path / "coarse.ckpt"
    torch.save(content, coarse)
    refused(
        capsys, predict_arguments(root, coarse, tmp_path / "out"), "4 mm", "2 mm", "--members", "minilumir/mind_full"
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    refused(capsys, predict_arguments(root, checkpoint, tmp_path / "file/out"), "file/out", "cannot be written")
    shutil.copytree(root / "imagesVal", tmp_path / "fields")
    (tmp_path / "fields/disp_0100_0101.nii.gz").write_bytes(b"")
    refused(capsys, predict_arguments(root, checkpoint, tmp_path / "fields"), "disp_0100_0101", "--overwrite")
    wide = ["--model.features", "[16,16]", "--model.head_features", "[16,16]"]
    data = ["--data.root", str(root), "--data.cache", str(tmp_path / "cache")]
    refused(capsys, ["validate", "--config", "mind", *wide, *data, "--ckpt_path", str(checkpoint)], "another network")
    wide_fit = ["fit", "--config", "mind", "--runs", str(tmp_path / "runs"), "--wandb", "off", *wide, *data]
    refused(capsys, [*wide_fit, "--resume", str(checkpoint)], "another network", "config.yaml")


def test_validation_computes_one_field_and_it_is_bitwise_that_of_both_ways() -> None:
    module = MindRegistration(features=[8, 8, 8], head_features=[8, 8, 8])
    for head in module.network.heads:
        torch.nn.init.normal_(head.final.weight, std=0.5)
    fixed, moving = torch.rand(2, 1, 1, 12, 10, 14)
    with torch.inference_mode():
        both = module(fixed=fixed, moving=moving)[0]
        assert both.abs().max() > 0.5
        assert torch.equal(module.disp(fixed=fixed, moving=moving), both)


def test_no_verb_computes_in_tf32() -> None:
    """Each in a process of its own, which begins with PyTorch's default: on for convolutions."""
    for start in (
        "from sitreg_lumir.train.settings import prepare_process as start; start()",
        "import sitreg_lumir; sitreg_lumir.load_model()",
        "from sitreg_lumir.challenge.predict import Predictor; Predictor([]).setup('predict')",
    ):
        code = f"""
import warnings; warnings.simplefilter("error", UserWarning)
import torch
from sitreg_lumir.network.precision import tf32_is_on
assert torch.backends.cudnn.allow_tf32 and tf32_is_on()
{start}
assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32 and not tf32_is_on()
with torch.backends.cudnn.flags(enabled=True):
    pass
assert torch.get_float32_matmul_precision() == "highest"
"""
        done = warm_processes.run([], code=code)
        assert done.returncode == 0, done.stderr[-1500:]
