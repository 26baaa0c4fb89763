"""`fit --init-from`: a new run that starts with a trained member's weights, and says so."""

import hashlib
import json
from pathlib import Path
from typing import Any

import data_samples
import pytest
import torch
from cli_calls import TINY, refused, shell
from official_states import official_state

from sitreg_lumir.cli import main
from sitreg_lumir.network.card import CARD_KEY, ModelCard
from sitreg_lumir.network.official import read_official
from sitreg_lumir.network.shipped import SHIPPED
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import load_member, save_member

SIZES = ["--model.features", "[4,8]", "--model.head_features", "[4,8]", "--model.window", "3"]
SHIPPED_SIZES = ["--model.features", "[8,16,32,32]", "--model.head_features", "[8,16,32,32]", "--model.window", "3"]
STILL = ["--model.learning_rate", "0"]  # the weights stay what they start from


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data_samples.make_dataset(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit_arguments(name: str, *more: str) -> list[str]:
    return ["fit", "--name", name, "--data.root", "data", "--data.cache", "cache", *TINY, *more]


def checkpoint(name: str) -> dict[str, Any]:
    return dict(torch.load(Path("runs") / name / "checkpoints" / "last.ckpt", weights_only=True))


def weights(name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix("network."): tensor for key, tensor in checkpoint(name)["state_dict"].items()}


def write_member(path: Path, in_channels: int = 6, **sizes: Any) -> SITReg:
    network = SITReg(in_channels, **{"features": (4, 8), "head_features": (4, 8), **sizes})
    mind = {"sigma": 0.5, "radius": 2} if in_channels == 6 else None
    card = ModelCard(
        network.architecture,
        mind,
        [80, 112, 96],
        torch.eye(4).tolist(),
        training={"data": "elsewhere", "steps": 7},
        licence="CC0",
    )
    save_member(path, network, card)
    return network


@pytest.mark.slow
def test_from_a_shell_a_shipped_member_is_fine_tuned(place: Path) -> None:
    done = shell(fit_arguments("tuned", "--init-from", "member2", *SHIPPED_SIZES, *STILL), place)
    assert done.returncode == 0, done.stderr
    expected = load_member(SHIPPED / "member2.safetensors").network.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights("tuned").items())
    origin = checkpoint("tuned")[CARD_KEY]["training"]["initialised_from"]
    card = json.loads((SHIPPED / "member2.json").read_text())
    assert origin["file"] == "member2.safetensors" and origin["sha256"] == card["sha256"]
    assert origin["training"] == card["training"] and origin["licence"] == card["licence"]


@pytest.mark.slow
def test_it_is_a_new_run_with_a_new_optimiser_that_goes_on_without_the_file(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = write_member(place / "start.safetensors")
    digest = hashlib.sha256((place / "start.safetensors").read_bytes()).hexdigest()
    start = ["--init-from", "start.safetensors", *SIZES]
    assert main(fit_arguments("whole", *start, "--trainer.max_epochs", "2")) == 0
    assert main(fit_arguments("first", *start)) == 0
    first = checkpoint("first")
    assert first["global_step"] == 2 and first["epoch"] == 0
    assert all(float(state["step"]) == 2 for state in first["optimizer_states"][0]["state"].values())
    assert any(not torch.equal(tensor, network.state_dict()[key]) for key, tensor in weights("first").items())
    refused(capsys, fit_arguments("first", *start, "--resume"), "--init-from", "--resume")
    (place / "start.safetensors").unlink()
    (place / "start.json").unlink()
    assert main(fit_arguments("first", *SIZES, "--resume", "--trainer.max_epochs", "2")) == 0
    for key, tensor in weights("whole").items():
        assert torch.equal(tensor, weights("first")[key]), key
    for name in ("whole", "first"):
        origin = checkpoint(name)[CARD_KEY]["training"]["initialised_from"]
        assert origin["file"] == "start.safetensors" and origin["sha256"] == digest
        assert origin["training"] == {"data": "elsewhere", "steps": 7} and origin["licence"] == "CC0"
    exported = place / "member.safetensors"
    assert main(["export", "runs/first/checkpoints/last.ckpt", "-o", str(exported)]) == 0
    assert json.loads(exported.with_suffix(".json").read_text())["training"]["initialised_from"]["sha256"] == digest
    capsys.readouterr()
    assert main(fit_arguments("again", "--init-from", "runs/first/checkpoints/last.ckpt", *SIZES, *STILL)) == 0
    origin = checkpoint("again")[CARD_KEY]["training"]["initialised_from"]
    assert origin["training"]["initialised_from"]["sha256"] == digest, "the history of the history"
    assert all(torch.equal(tensor, weights("first")[key]) for key, tensor in weights("again").items())


@pytest.mark.parametrize("channels", [1, 6])
def test_files_of_the_authors_code_are_fine_tuned(place: Path, channels: int) -> None:
    torch.save({"registration_network": official_state(channels)}, place / "model_epoch_030.pt")
    model = ["--model", "RawRegistration" if channels == 1 else "MindRegistration", *SIZES]
    assert main(fit_arguments("tuned", "--init-from", "model_epoch_030.pt", *model, *STILL)) == 0
    expected = read_official(place / "model_epoch_030.pt").network.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights("tuned").items())
    assert checkpoint("tuned")[CARD_KEY]["training"]["initialised_from"]["file"] == "model_epoch_030.pt"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"in_channels": 1}, ("in_channels is 1, but this run's is 6", "--model RawRegistration")),
        ({"in_channels": 3}, ("in_channels is 3, but this run's is 6",)),
        ({"features": (8, 8)}, ("features is [8, 8], but this run's is [4, 8]", "--model.features '[8, 8]'")),
        ({"head_features": (4, 4)}, ("head_features is [4, 4]",)),
        ({"features": (4, 8, 8), "head_features": (4, 8, 8)}, ("features is [4, 8, 8]", "head_features is [4, 8, 8]")),
        ({"convolutions": 3}, ("convolutions is 3, but this run's is 2",)),
        ({"groups": 2}, ("groups is 2, but this run's is 4",)),
        ({"bound_multiplier": 0.9}, ("bound_multiplier is 0.9",)),
    ],
)
def test_another_architecture_ends_in_one_line_that_names_it(
    place: Path, capsys: pytest.CaptureFixture[str], sizes: dict[str, Any], words: tuple[str, ...]
) -> None:
    write_member(place / "start.safetensors", **sizes)
    refused(capsys, fit_arguments("tuned", "--init-from", "start.safetensors", *SIZES), "start.safetensors", *words)
    assert not (place / "runs").exists() and not (place / "cache").exists()


def test_a_member_that_is_not_there_or_damaged_ends_in_one_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused_with(member: str, *words: str) -> None:
        refused(capsys, fit_arguments("tuned", "--init-from", member, *SIZES), *words)
        assert not (place / "runs").exists() and not (place / "cache").exists()

    refused_with("membr1", "membr1", "member1")
    refused_with("gone/member.safetensors", "gone/member.safetensors")
    write_member(place / "members" / "a.safetensors")
    write_member(place / "members" / "b.safetensors")
    refused_with("members", "2 members", "a.safetensors")
    (place / "members" / "a.json").unlink()
    refused_with("members/a.safetensors", "card")
    (place / "a.pt").write_bytes(b"PK\x03\x04")
    refused_with("a.pt", "cannot be read")
    torch.save({"weight": torch.ones(1)}, place / "b.pt")
    refused_with("b.pt", "holds no state dict")


def test_another_input_with_as_many_channels_is_reported(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_member(place / "start.safetensors")
    arguments = fit_arguments("tuned", "--init-from", "start.safetensors", *SIZES, *STILL, "--model.sigma", "0.75")
    assert main(arguments) == 0
    assert "start.safetensors was trained on" in caplog.text and "0.75" in caplog.text
    assert checkpoint("tuned")[CARD_KEY]["mind"] == {"sigma": 0.75, "radius": 2}
