"""`doctor`: what it reports where all is well, and what it says where two scans could not be registered."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sitreg_lumir.cli.diagnose import add_doctor
from sitreg_lumir.deform.backends import BACKENDS, choice
from sitreg_lumir.errors import InputError, RunStoppedError
from sitreg_lumir.network import shipped
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import ModelCard, load_members, save_member
from sitreg_lumir.train import doctor, memory


def make_member(file: Path, shape: tuple[int, int, int] = (16, 24, 20), spacing: float = 4.0) -> Path:
    network = SITReg(in_channels=6, features=[4, 4], head_features=[4, 4])
    affine = np.diag([spacing, spacing, spacing, 1.0]).tolist()
    card = ModelCard(network.architecture, {"sigma": 0.5}, list(shape), affine, licence="CC BY 4.0")
    save_member(file, network, card)
    return file


@pytest.fixture
def members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two members, which is where members are looked for."""
    for name in ("one", "two"):
        make_member(tmp_path / "weights" / f"{name}.safetensors")
    monkeypatch.delenv(shipped.VARIABLE, raising=False)
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "weights")
    return tmp_path / "weights"


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_doctor(parser.add_subparsers())
    options, rest = parser.parse_known_args(["doctor", *arguments])
    options.run(options, rest)


def test_all_is_well_and_models_are_reported_with_their_resolution(
    members: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "two scans can be registered"
    for words in (
        f"torch         {torch.__version__}", "16 x 24 x 20", "4 x 4 x 4 mm", "one.safetensors", "two.safetensors",
        "that of its card", "CC BY 4.0", "loops compiled by numba", "__pycache__", "free memory", "offline", "deepbet",
        "ipyniivue", "sitreg-lumir  0",
    ):  # fmt: skip
        assert words in printed, words


def test_json_says_the_same(members: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--json")
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] and report["reasons"] == []
    assert report["versions"]["numpy"] == np.__version__ and None not in report["versions"].values()
    assert report["backends"]["cpu"]["chosen"] == "cpu"
    assert report["device"]["cores"] >= 1 and report["device"]["memory"].endswith(" GB")
    first, second = report["models"]["members"]
    assert (first["grid"], first["resolution"], first["input"]) == ("16 x 24 x 20", "4 x 4 x 4 mm", "MIND")
    assert len(first["sha256"]) == 64 and first["sha256"] != second["sha256"]
    parameters = SITReg(in_channels=6, features=[4, 4], head_features=[4, 4]).parameters()
    assert first["parameters"] == sum(tensor.numel() for tensor in parameters)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """The command ends with 1 and its last lines have these words, in prose and as JSON."""
    with pytest.raises(RunStoppedError) as stop:
        run()
    assert stop.value.exit_code == 1
    head, _, reasons = capsys.readouterr().out.partition("two scans cannot be registered:\n")
    assert head.startswith("versions")
    with pytest.raises(RunStoppedError):
        run("--json")
    report = json.loads(capsys.readouterr().out)
    assert not report["ready"] and [line.strip() for line in reasons.splitlines()] == report["reasons"]
    for word in words:
        assert word in reasons


def test_a_damaged_member_is_named(members: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = members / "two.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(capsys, "two.safetensors", "SHA-256")


def test_without_a_model_it_says_where_it_looked(
    members: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped, "SHIPPED", members / "nowhere")
    refused(capsys, str(members / "nowhere"), shipped.VARIABLE)
    monkeypatch.setenv(shipped.VARIABLE, str(members / "gone.safetensors"))
    refused(capsys, "gone.safetensors", shipped.VARIABLE)
    monkeypatch.setenv(shipped.VARIABLE, str(members / "one.safetensors"))
    run()
    assert f"{shipped.VARIABLE}={members}" in capsys.readouterr().out


def test_members_that_differ_are_refused_as_they_are_when_registering(
    members: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_member(members / "three.safetensors", spacing=2.0)
    with pytest.raises(InputError) as refusal:
        load_members([members])
    refused(capsys, str(refusal.value))


def test_a_missing_package_is_reported_with_its_remedy(
    members: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version_of = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("SimpleITK", "wandb") else version_of(name))
    refused(capsys, "SimpleITK is not installed; pip install SimpleITK")
    report = doctor.examine()
    assert report["reasons"] == ["SimpleITK is not installed; pip install SimpleITK"], "W&B is for training only"
    assert "  wandb         missing" in doctor.lines(report)


def test_a_backend_that_does_not_exist_is_a_reason(
    members: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SITREG_LUMIR_BACKEND", "opencl")
    monkeypatch.setattr(choice, "_forced", "opencl")
    refused(capsys, "SITREG_LUMIR_BACKEND", "opencl")


def test_a_part_that_breaks_does_not_hide_the_others(
    members: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise OSError("no /proc here")

    monkeypatch.setattr(memory, "system_memory", broken)
    report = doctor.examine()
    assert report["device"] == {"error": "OSError: no /proc here"}
    assert report["ready"] and report["models"]["members"], "what memory there is does not decide"
    monkeypatch.setattr(doctor, "_numba_cache", broken)
    refused(capsys, "backends: OSError")


def test_loops_that_cannot_be_kept_are_reported(members: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_numba_cache", lambda: (None, False))
    report = doctor.examine()
    assert report["ready"] and "NUMBA_CACHE_DIR" in "\n".join(doctor.lines(report))


def test_each_gpu_is_reported_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10**9 * (index + 1), 8 * 10**9))
    properties = SimpleNamespace(name="a GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    devices = doctor._device([])
    assert devices["chosen"] == "cuda"
    assert [gpu["free memory"] for gpu in devices["cuda"]] == ["1.0 GB", "2.0 GB"]
    assert devices["cuda"][0]["name"] == "a GPU" and devices["cuda"][0]["capability"] == "9.0"
    assert all(doctor._why(name, "auto") for name in BACKENDS if name != "auto")
