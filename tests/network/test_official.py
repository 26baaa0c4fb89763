"""Files of the official implementation become members: its training file's structure, its keys, its surprises."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import data_samples
import pytest
import torch
import warm_processes
from cli_calls import predict_arguments, refused
from official_states import official_state, with_indicators
from safetensors.torch import load_file, save_file
from torch import Tensor

from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.network.official import network_from_official, official_name, read_official
from sitreg_lumir.network.sitreg import SITReg, run_stages
from sitreg_lumir.network.weights import load_member

SETTINGS: dict[str, Any] = {
    "n_features_per_resolution": [4, 8],
    "max_control_point_multiplier": 0.99,
    "transformation_downsampling_factor": [1.0, 1.0, 1.0],
    "normalizer": {"type": "GroupNormalizerFactory", "args": {"n_groups": 4}},
    "activation": {"type": "ReLUFactory"},
    "input_shape": list(data_samples.SHAPE),
}


def settings(folder: Path, **changes: Any) -> None:
    model = {**SETTINGS, **changes}
    (folder / "training_config.json").write_text(json.dumps({"application": {"config": {"model": model}}}))


def export_arguments(weights: Path, dataset: Path, *more: str) -> list[str]:
    output = weights.with_suffix(".safetensors")
    return ["export", str(weights), "--official", "--dataset", str(dataset), "-o", str(output), *more]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return data_samples.make_dataset(tmp_path / "data")


@pytest.mark.parametrize("channels", ["1_channels", "6_channels"])
def test_every_key_of_the_authors_lumir_model_is_understood(shared: Path, tmp_path: Path, channels: str) -> None:
    file = shared / "oracles" / "official_checkpoint_keys.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    keys = json.loads(file.read_text())[channels]
    state = {name: torch.full(shape, 0.25, dtype=getattr(torch, dtype)) for name, (shape, dtype) in keys.items()}
    torch.save({"registration_network": state}, tmp_path / "model_epoch_030.pt")
    network = read_official(tmp_path / "model_epoch_030.pt").network
    published = SITReg(in_channels=int(channels[0]))
    assert network.architecture == published.architecture
    assert sum(parameter.numel() for parameter in network.parameters()) == sum(
        tensor.numel() for tensor in state.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("file", ["network_1ch_odd", "network_6ch"])
def test_a_training_file_imported_by_the_command_gives_the_reference_s_fields(
    oracles: Path, tmp_path: Path, root: Path, file: str
) -> None:
    tensors = load_file(oracles / f"{file}.safetensors")
    state = {name.removeprefix("param/"): value for name, value in tensors.items() if name.startswith("param/")}
    weights = tmp_path / "model_epoch_030.pt"
    torch.save({"registration_network": with_indicators(state)}, weights)
    done = warm_processes.run(export_arguments(weights, root), tmp_path)
    assert done.returncode == 0 and "4 groups" in done.stdout, done.stderr
    member = load_member(weights.with_suffix(".safetensors"))
    member.network.inversion_tolerance = 1e-5
    with torch.no_grad():
        stage = run_stages([member.network], fixed=tensors["image_2"], moving=tensors["image_1"])[-1]
    for name, disp in (("forward", stage.disp), ("inverse", stage.disp_inv)):
        error = (disp - tensors[f"exact/level_0/{name}"]).abs()
        assert float(error.max()) <= 5e-4 and float(error.mean()) <= 5e-5, name
    assert main(predict_arguments(root, weights.with_suffix(".safetensors"), tmp_path / "fields")) == 0
    assert len(list((tmp_path / "fields").glob("disp_*.nii.gz"))) == 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"registration_network": state},
        lambda state: {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "model": dict(state)},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"network": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"a": {"b": OrderedDict(state)}, "loss": [0.5]},
        lambda state: {**state, "something._anything": torch.empty(0, 3, dtype=torch.int64)},
    ],
    ids=["bare", "training file", "beside an optimiser", "module.", "compiled", "nested", "another empty buffer"],
)
def test_the_state_is_found_wherever_it_stands(tmp_path: Path, wrap: Any) -> None:
    state = official_state()
    torch.save(wrap(state), tmp_path / "a.pth")
    network = read_official(tmp_path / "a.pth").network
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[official_name(name)])


@pytest.mark.parametrize(
    "sizes",
    [
        {"features": (4,), "head_features": (8,)},
        {"features": (4, 12, 8, 4, 16, 4, 8), "head_features": (8, 4, 4, 12, 4, 4, 4)},
        {"convolutions": 1},
        {"convolutions": 3, "in_channels": 2},
    ],
)
def test_sizes_are_read_from_the_tensors(tmp_path: Path, sizes: dict[str, Any]) -> None:
    state = official_state(**sizes)
    torch.save({"registration_network": state}, tmp_path / "a.pt")
    architecture = read_official(tmp_path / "a.pt").network.architecture
    for key, value in sizes.items():
        assert architecture[key] == (list(value) if isinstance(value, tuple) else value)


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


HEAD = "_not_none_dense_extration_networks.1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {**s, "_surprise.weight": torch.ones(2)}, ("unknown _surprise.weight",)),
        (lambda s: {**s, "_scale": torch.tensor(2.0)}, ("unknown _scale",)),
        (lambda s: without(s, "_feature_extractor.initial_projection.weight"), ("projection.weight is missing",)),
        (lambda s: without(s, f"{HEAD}.final_convolution.conv.bias"), (f"missing {HEAD}.final_convolution.conv.bias",)),
        (lambda s: {**s, "_affine_extraction_network.final_linear.bias": torch.ones(12)}, ("affine stage",)),
        (lambda s: {k: v for k, v in s.items() if not k.startswith(HEAD)}, ("2 levels", "1 heads")),
        (lambda s: {k: v for k, v in s.items() if "convolutions.convolutions.1" not in k}, ("convolutions", "1", "2")),
        (lambda s: {**s, f"{HEAD}.final_convolution.conv.bias": torch.ones(2)}, ("shape (2,)", "(3,)")),
        (lambda s: {**s, f"{HEAD}.final_convolution.conv.bias": torch.full((3,), torch.nan)}, ("not finite",)),
        (lambda s: {k: v[..., 0] if v.ndim == 5 else v for k, v in s.items()}, ("five axes",)),
        (lambda s: {"one": s, "two": s}, ("several models", "one", "two")),
        (lambda s: {**{f"a.{k}": v for k, v in s.items()}, **{f"b.{k}": v for k, v in s.items()}}, ("several",)),
        (lambda s: {**{f"net.{k}": v for k, v in s.items()}, "discriminator.w": torch.ones(1)}, ("discriminator.w",)),
        (lambda s: {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}}, ("optimiser",)),
        (lambda s: {"state_dict": {"weight": torch.ones(2)}}, ("holds no state dict of the official SITReg",)),
        (lambda s: [1, 2], ("holds no state dict of the official SITReg",)),
    ],
)
def test_surprises_are_refused_by_name_in_one_line(tmp_path: Path, change: Any, words: tuple[str, ...]) -> None:
    torch.save(change(official_state()), tmp_path / "a.pt")
    with pytest.raises(InputError) as caught:
        read_official(tmp_path / "a.pt")
    assert str(caught.value).startswith(str(tmp_path / "a.pt")) and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_groups_come_from_the_option_the_settings_or_the_published_ones(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "model_epoch_002.pt"
    torch.save({"registration_network": official_state(1)}, weights)

    def groups(*more: str) -> int:
        assert main(export_arguments(weights, root, *more)) == 0
        member = load_member(weights.with_suffix(".safetensors"))
        assert f"{member.network.architecture['groups']} groups" in capsys.readouterr().out
        return int(member.network.architecture["groups"])

    assert groups() == 4
    settings(tmp_path, normalizer={"type": "GroupNormalizerFactory", "args": {"n_groups": 2}})
    assert groups() == 2
    assert groups("--groups", "1") == 1
    refused(capsys, export_arguments(weights, root, "--groups", "3"), "groups=3", weights.name)
    refused(capsys, export_arguments(weights, root, "--groups", "0"), "groups=0")
    refused(capsys, ["export", str(weights), "-o", str(tmp_path / "b.safetensors")], "--official")
    settings(tmp_path, input_shape=[160, 224, 192])
    refused(capsys, export_arguments(weights, root), "training_config.json", "(160, 224, 192)", "(8, 10, 6)")
    settings(tmp_path, normalizer={"type": "InstanceNormalizerFactory"})
    refused(capsys, export_arguments(weights, root), "InstanceNormalizerFactory")
    settings(tmp_path, n_features_per_resolution=[4, 16])
    refused(capsys, export_arguments(weights, root), "[4, 16]", "[4, 8]")
    (tmp_path / "training_config.json").write_text("{}")
    refused(capsys, export_arguments(weights, root), "training_config.json")


def test_another_input_is_refused_and_safetensors_are_read(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(official_state(2), tmp_path / "two.pt")
    refused(capsys, export_arguments(tmp_path / "two.pt", root), "two.pt", "2 input channels")
    state = official_state(1)
    save_file(dict(state), tmp_path / "bare.safetensors")
    network = read_official(tmp_path / "bare.safetensors").network
    torch.testing.assert_close(network.state_dict(), network_from_official(state).state_dict(), atol=0, rtol=0)
    with pytest.raises(InputError, match="no such file"):
        read_official(tmp_path / "gone.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="cannot be read"):
        read_official(tmp_path / "broken.pt")
