"""The network as its text says, and in less memory: the same numbers; and those of weights that were stored before."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sitreg_lumir.network import memory
from sitreg_lumir.network.ensemble import Ensemble
from sitreg_lumir.network.mirrored import MirroredNetwork
from sitreg_lumir.network.sitreg import SITReg, Stage, StageNetwork, predict_control_points, run_stages
from sitreg_lumir.network.weights import load_member

STORED = Path(__file__).with_name("stored")
SHAPES = [(18, 16, 14), (9, 13, 7), (5, 4, 1)]


def networks(count: int, dtype: torch.dtype = torch.float64, channels: int = 3) -> list[SITReg]:
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        network = SITReg(channels, (4, 8, 8), (4, 8, 8))
        for head in network.heads:
            torch.nn.init.normal_(head.final.weight, std=0.3)
        members.append(network.to(dtype))
    return members


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, batch: int = 1) -> dict[str, Tensor]:
    coarse = torch.rand(2 * batch, 3, 4, 4, 3, generator=torch.Generator().manual_seed(7))
    fixed, moving = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear").to(dtype).split(batch)
    return {"fixed": fixed, "moving": moving}


def tensors(stages: list[Stage]) -> list[Tensor]:
    """All that stages hold."""
    parts = (
        part
        for stage in stages
        for part in (stage.disp, stage.inverse, stage.control_points, stage.control_points_reverse, stage.disagreement)
    )
    return [part for part in parts if part is not None]


def gradients(members: list[SITReg], pair: dict[str, Tensor], **options: bool) -> list[Tensor]:
    """Loss of all stages' fields and its gradients."""
    stages = run_stages(members, **pair, levels=range(3), **options)
    loss = sum(stage.disp.square().mean() + stage.disp_inv.square().mean() for stage in stages)
    parameters = [parameter for member in members for parameter in member.parameters()]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@torch.no_grad()
@pytest.mark.parametrize("levels", [(0,), (0, 2), (1,), (0, 1, 2)])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_less_memory_changes_no_bit(shape: tuple[int, ...], count: int, levels: tuple[int, ...]) -> None:
    members, pair = networks(count), inputs(shape)
    for inverse in (True, False):
        options = {"levels": levels, "inverse": inverse, "disagreement": count > 1}
        plain = tensors(run_stages(members, **pair, **options, plain=True))
        economical = tensors(run_stages(members, **pair, **options))
        assert len(plain) == len(economical) == len(levels) * (3 + inverse + (count > 1))
        assert all(torch.equal(first, second) for first, second in zip(plain, economical, strict=True))
        assert float(plain[-1].abs().max()) > 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_control_points_alone_are_those_of_the_stages(mirrored: bool, count: int, dtype: torch.dtype) -> None:
    members: list[StageNetwork] = [*networks(count, dtype, channels=1)]
    if mirrored:
        members += [MirroredNetwork(member, axis=1) for member in members]
    pair = {name: image[:, :1] for name, image in inputs(SHAPES[0], dtype, batch=2).items()}
    stages = run_stages(members, **pair, levels=range(3))
    updates = predict_control_points(members, **pair)
    assert len(updates) == 3
    for stage, (first, second) in zip(stages, updates, strict=True):
        assert torch.equal(stage.control_points, first) and torch.equal(stage.control_points_reverse, second)
        assert float(first.abs().max()) > 0


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("twins_alone", [False, True])
def test_less_memory_changes_no_bit_of_mirrored_networks(count: int, twins_alone: bool) -> None:
    members = networks(count, channels=1)
    twins = [MirroredNetwork(member, axis=1) for member in members]
    pair = {name: image[:, :1] for name, image in inputs(SHAPES[0]).items()}
    mixed = twins if twins_alone else [*members, *twins]
    plain, economical = (tensors(run_stages(mixed, **pair, levels=(0, 2), plain=plain)) for plain in (True, False))
    assert len(plain) == len(economical) == 2 * 4
    assert all(torch.equal(first, second) for first, second in zip(plain, economical, strict=True))
    unmirrored = tensors(run_stages(members, **pair, levels=(0, 2)))
    assert float((plain[0] - unmirrored[0]).abs().max()) > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_a_network_s_gradients_have_the_same_bits(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float64, torch.float32):
        members, pair = networks(1, dtype), inputs(shape, dtype)
        plain = gradients(members, pair, plain=True)
        for recompute in (False, True):
            economical = gradients(members, pair, recompute=recompute)
            assert all(torch.equal(first, second) for first, second in zip(plain, economical, strict=True))


@pytest.mark.parametrize("count", [2, 3])
def test_an_ensemble_s_gradients_are_equal_to_rounding(count: int) -> None:
    """Features of full resolution are computed apart there, so that their gradients are added up in another order."""
    members, pair = networks(count), inputs(SHAPES[1])
    plain = gradients(members, pair, plain=True)
    for recompute in (False, True):
        torch.testing.assert_close(gradients(members, pair, recompute=recompute), plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_large_volumes_are_equal_to_rounding(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """They are convolved one by one, and sum and difference apart."""
    monkeypatch.setattr(memory, "SLOW_ALONE", 0)
    members, pair = networks(1), inputs(SHAPES[0], batch=batch)
    torch.testing.assert_close(gradients(members, pair), gradients(members, pair, plain=True), rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        plain, economical = (tensors(run_stages(members, **pair, plain=plain)) for plain in (True, False))
    torch.testing.assert_close(economical, plain, rtol=1e-9, atol=1e-9)


@torch.inference_mode()
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_weights_that_were_stored_before_give_their_fields(suffix: str) -> None:
    tensors = load_file(STORED / "fields.safetensors")
    ensemble = Ensemble.of([load_member(STORED / f"member.{suffix}")])
    (stage,) = ensemble.run(fixed=tensors["fixed"], moving=tensors["moving"])
    for field, name in ((stage.disp, "disp"), (stage.disp_inv, "disp_inv")):
        torch.testing.assert_close(field, tensors[name], rtol=0, atol=2e-5)
        assert float(field.abs().max()) > 0.5
