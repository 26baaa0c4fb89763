"""The network and the ensemble against exact values of the reference implementation, gradients included."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sitreg_lumir.deform.ops import use_backend
from sitreg_lumir.network.official import network_from_official, official_name
from sitreg_lumir.network.sitreg import SITReg, run_stages

FILES = ("network_1ch_odd", "network_6ch", "ensemble")


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def members_of(tensors: dict[str, Tensor], dtype: torch.dtype, tolerance: float) -> list[SITReg]:
    prefixes = sorted({name.split("param/")[0] for name in tensors if name.startswith(("param/", "member_"))})
    members = []
    for prefix in prefixes:
        start = f"{prefix}param/"
        state = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        member = network_from_official(state).to(dtype)
        member.inversion_tolerance = tolerance
        members.append(member)
    return members


def exact_levels(tensors: dict[str, Tensor]) -> list[int]:
    return sorted({int(name.split("_")[1].split("/")[0]) for name in tensors if name.startswith("exact/level_")})


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("dtype", "stop", "fields", "points"), [
    (torch.float64, 1e-8, (2e-6, 5e-7), (2e-6, 5e-7)),
    (torch.float32, 1e-5, (5e-4, 5e-5), (1e-4, 1e-5)),
    (torch.float32, 1e-2, (0.03, 1e-3), (0.03, 1e-3)),
])  # fmt: skip
def test_fields_and_control_points_match_the_oracle(oracles: Path, backend, file, dtype, stop, fields, points):
    tensors = load_file(oracles / f"{file}.safetensors")
    members = members_of(tensors, dtype, stop)
    levels = exact_levels(tensors)
    with torch.no_grad():
        stages = run_stages(
            members, fixed=tensors["image_2"].to(dtype), moving=tensors["image_1"].to(dtype), levels=levels
        )
    compared = 0
    for stage in stages:
        found = {
            "forward": (stage.disp, fields),
            "inverse": (stage.disp_inv, fields),
            "control_points_forward": (stage.control_points, points),
            "control_points_reverse": (stage.control_points_reverse, points),
        }
        for name, (value, (largest, mean)) in found.items():
            expected = tensors.get(f"exact/level_{stage.level}/{name}")
            if expected is None:
                continue
            error = (value.double() - expected.double()).abs()
            assert float(error.max()) <= largest, (stage.level, name)
            assert float(error.mean()) <= mean, (stage.level, name)
            compared += 1
    assert compared == sum(name.startswith("exact/level_") for name in tensors)


@pytest.mark.parametrize("file", ["network_1ch_odd", "network_6ch"])
def test_features_match_the_oracle(oracles: Path, file):
    tensors = load_file(oracles / f"{file}.safetensors")
    (network,) = members_of(tensors, torch.float64, 1e-8)
    with torch.no_grad():
        pyramid = zip(*network.encoder(tensors["image_1"].double(), tensors["image_2"].double()), strict=True)
    compared = 0
    for level, (moving, fixed) in enumerate(pyramid):
        for image, features in (("image_1", moving), ("image_2", fixed)):
            name = f"exact/features_{level}/{image}"
            if name in tensors:
                torch.testing.assert_close(features, tensors[name].double(), atol=2e-6, rtol=1e-6)
                compared += 1
        name = f"exact/features_{level}_channel_mean"
        if name in tensors:
            both = torch.stack([moving, fixed])
            torch.testing.assert_close(both.mean((3, 4, 5)), tensors[name].double(), atol=2e-6, rtol=1e-6)
            spread = tensors[f"exact/features_{level}_channel_std"].double()
            torch.testing.assert_close(both.flatten(3).std(3), spread, atol=2e-6, rtol=1e-6)
            compared += 1
    assert compared


@pytest.mark.parametrize(("dtype", "stop", "each", "together"), [
    (torch.float64, 1e-9, 1e-5, 1e-5), (torch.float32, 1e-5, 2e-3, 1e-4),
])  # fmt: skip
def test_gradients_match_the_oracle(oracles: Path, backend, dtype, stop, each, together):
    tensors = load_file(oracles / "network_1ch_odd.safetensors")
    (network,) = members_of(tensors, dtype, stop)
    moving = tensors["image_1"].to(dtype).clone().requires_grad_()
    fixed = tensors["image_2"].to(dtype).clone().requires_grad_()
    stages = run_stages([network], fixed=fixed, moving=moving, levels=range(network.levels))
    total = torch.zeros((), dtype=dtype)
    for stage in stages:
        weight = 1.0 if stage.level == 0 else 0.01
        total = total + weight * (stage.disp.square().mean() + stage.disp_inv.square().mean())
    total.backward()
    assert float(total.detach()) == pytest.approx(float(tensors["grad/scalar"]), rel=1e-5)
    found = {f"grad/param/{official_name(name)}": p.grad for name, p in network.named_parameters()}
    errors, norms = [], []
    for name, grad in {**found, "grad/image_1": moving.grad, "grad/image_2": fixed.grad}.items():
        assert grad is not None
        expected = tensors[name].double()
        error, norm = float((grad.double() - expected).norm()), float(expected.norm())
        if norm > 1e-6 * float(tensors["grad/scalar"]):  # biases before a normalisation have none but rounding
            assert error <= each * norm, name
        if name in found:
            errors.append(error**2)
            norms.append(norm**2)
    assert sum(errors) ** 0.5 <= together * sum(norms) ** 0.5


def test_the_published_network_has_the_published_size():
    assert sum(parameter.numel() for parameter in SITReg(in_channels=1).parameters()) == 15_076_110
