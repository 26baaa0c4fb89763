"""Checkpoints: a flipped bit is noticed or changes nothing; bombs and code are refused; cards keep their bounds."""

import copy
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sitreg_lumir.errors import InputError
from sitreg_lumir.network.card import CARD_KEY, ModelCard
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import load_member, save_member


def checkpoint() -> dict[str, Any]:
    torch.manual_seed(0)
    network = SITReg(in_channels=1, features=[4, 4], head_features=[4, 4])
    card = ModelCard(network.architecture, None, [8, 10, 6], np.eye(4).tolist(), training={"seed": 1})
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    return {"state_dict": state, CARD_KEY: card.to_dict(), "epoch": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(checkpoint(), tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def refused(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        load_member(path)
    assert path.stem in str(error.value) and "\n" not in str(error.value)


def test_a_flipped_bit_is_noticed_or_changes_nothing(path: Path) -> None:
    whole, original = path.read_bytes(), load_member(path)
    expected = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    random = np.random.default_rng(0)
    noticed = 0
    for bit in random.choice(len(whole) * 8, 400, replace=False):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(content)
        try:
            member = load_member(path)
        except InputError:
            noticed += 1
        else:
            assert member.card == original.card
            assert all(torch.equal(tensor, expected[name]) for name, tensor in member.state_dict().items())
    assert noticed > 100  # the rest are fill bytes and dates


def repacked(path: Path, compression: int = zipfile.ZIP_STORED, **records: bytes) -> None:
    """Writes the archive again: compressed, or with other records."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content.update({name.replace("__", "/").replace("_pkl", ".pkl"): data for name, data in records.items()})
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def test_archives_that_claim_more_or_hold_code_are_refused(path: Path) -> None:
    repacked(path, zipfile.ZIP_DEFLATED, a__data__0=bytes(10**8))
    assert path.stat().st_size < 10**6
    refused(path, "compressed")

    class Code:
        def __reduce__(self) -> Any:
            return bytearray, (10**11,)

    torch.save({**checkpoint(), "more": 1}, path)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    repacked(path, **{name.replace("/", "__").replace(".pkl", "_pkl"): pickle.dumps({"state_dict": Code()}, 2)})
    refused(path, "bytearray")
    wide = checkpoint()
    wide["state_dict"]["network.more"] = torch.zeros(1).expand(10**11)
    torch.save(wide, path)
    refused(path, "more than is there")
    circle = checkpoint()
    circle["loops"] = circle
    torch.save(circle, path)
    refused(path, "nested")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: content["state_dict"].popitem(), "do not fit the card"),
        (lambda content: content["state_dict"].update({"network.other": torch.zeros(3)}), "do not fit the card"),
        (lambda content: next(iter(content["state_dict"].values())).fill_(torch.nan), "NaN"),
        (lambda content: content.update(state_dict=[1, 2]), "state_dict"),
        (lambda content: content["state_dict"].update({"network.x": "text"}), "more than tensors"),
        (lambda content: content.pop("state_dict"), "no state_dict"),
        (lambda content: content.pop(CARD_KEY), "no model card"),
        (
            lambda content: content.update(state_dict={k: v.long() for k, v in content["state_dict"].items()}),
            "floating",
        ),
    ],
)
def test_a_wrong_or_incomplete_state_is_refused(path: Path, change: Any, match: str) -> None:
    content = checkpoint()
    change(content)
    torch.save(content, path)
    refused(path, match)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("architecture", 3), ("architecture.features", [10**9, 4]), ("architecture.features", [4] * 1000),
        ("architecture.features", "44"), ("architecture.features", [4, -4]), ("architecture.in_channels", 10**12),
        ("architecture.in_channels", True), ("architecture.convolutions", 10**9), ("architecture.groups", 0),
        ("architecture.groups", 3), ("architecture.bound_multiplier", float("nan")), ("architecture.more", 1),
        ("architecture.bound_multiplier", "0.99"), ("shape", [10**6, 10**6, 10**6]), ("shape", [8, 10]),
        ("shape", "8"), ("shape", [8.0, 10, 6]), ("affine", []), ("affine", [[0.0] * 4] * 4),
        ("affine", [[1, 0], [0, 1]]),
        ("affine", [[float("nan")] * 4] * 4), ("affine", [[1, 0, 0, "x"]] * 4), ("intensity", 7), ("training", [1]),
        ("training", {"diffusion_weight": -1}), ("licence", {}), ("mind", {"sigma": 1e9, "radius": 2}), ("mind", 4),
        ("mind", {"sigma": 0.5, "radius": 10**9}), ("mind", {"sigma": 0.5, "more": 1}),
        ("input_transform", {"class_path": "os; import x", "init_args": {}}), ("version", None),
        ("input_transform", {"class_path": "sitreg_lumir.network.mind.Mind", "init_args": {"sigma": 1e99}}),
    ],
)  # fmt: skip
def test_cards_have_types_and_bounds(tmp_path: Path, entry: str, value: Any) -> None:
    content = checkpoint()
    path = tmp_path / "a.safetensors"
    network = SITReg(in_channels=1, features=[4, 4], head_features=[4, 4])
    save_member(path, network, ModelCard(**content[CARD_KEY]))
    card = json.loads(path.with_suffix(".json").read_text())
    for values, file in ((content[CARD_KEY], tmp_path / "a.ckpt"), (card, path)):
        changed = copy.deepcopy(values)
        *outer, last = entry.split(".")
        target = changed[outer[0]] if outer else changed
        target[last] = value
        if entry == "input_transform":
            changed.pop("mind", None)
        if file.suffix == ".ckpt":
            torch.save({**content, CARD_KEY: changed}, file)
        else:
            file.with_suffix(".json").write_text(json.dumps(changed))
        refused(file, "a")


def test_an_ordered_state_and_old_containers_are_read(path: Path) -> None:
    content = checkpoint()
    content["state_dict"] = OrderedDict(content["state_dict"])
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())
    assert load_member(path).card.training == {"seed": 1}


def test_a_card_always_has_the_checksum_of_its_weights(tmp_path: Path) -> None:
    network = SITReg(in_channels=1, features=[4, 4], head_features=[4, 4])
    save_member(tmp_path / "a.safetensors", network, ModelCard(**checkpoint()[CARD_KEY]))
    stored = json.loads((tmp_path / "a.json").read_text())["sha256"]
    assert stored == sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
