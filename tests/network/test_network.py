"""Promises of the network: symmetry, inverse consistency, any shape, ensembles; and of its files."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from sitreg_lumir.deform.ops import compose
from sitreg_lumir.errors import InputError
from sitreg_lumir.network import memory
from sitreg_lumir.network.official import import_official, network_from_official, official_name
from sitreg_lumir.network.shipped import SHIPPED, member_files
from sitreg_lumir.network.sitreg import SITReg, run_stages
from sitreg_lumir.network.weights import ModelCard, load_member, load_members, save_member

SIZES = {"features": (4, 8, 8), "head_features": (4, 8, 8)}


def small_network(in_channels: int = 1, seed: int = 0, **sizes) -> SITReg:
    torch.manual_seed(seed)
    network = SITReg(in_channels, **{**SIZES, **sizes})
    for head in network.heads:
        torch.nn.init.normal_(head.final.weight, std=0.3)
    return network.eval()


def images(
    channels: int = 1, shape: tuple[int, ...] = (18, 16, 14), seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, channels, 5, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")
    return smooth[:1], smooth[1:]


def card(network: SITReg, **changes) -> ModelCard:
    values = {
        "architecture": network.architecture,
        "mind": None,
        "shape": [18, 16, 14],
        "affine": torch.eye(4).tolist(),
    }
    return ModelCard(**{**values, **changes})


@torch.no_grad()
def test_swapping_the_images_swaps_the_fields():
    network = small_network()
    first, second = images()
    disp, disp_inv = network(fixed=first, moving=second)
    swapped, swapped_inv = network(fixed=second, moving=first)
    assert float(disp.abs().max()) > 0.3
    torch.testing.assert_close((swapped, swapped_inv), (disp_inv, disp), atol=1e-4, rtol=0)


@torch.no_grad()
def test_forward_composed_with_inverse_is_nearly_the_identity():
    network = small_network()
    network.inversion_tolerance = 1e-4
    first, second = images()
    disp, disp_inv = network(fixed=first, moving=second)
    inner = compose(disp, disp_inv)[:, :, 3:-3, 3:-3, 3:-3].abs()
    assert float(disp.abs().mean()) > 0.1
    assert float(inner.mean()) < 0.03 and float(inner.max()) < 0.25


@torch.no_grad()
@pytest.mark.parametrize("shape", [(18, 16, 14), (9, 13, 7), (5, 4, 1)])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_any_shape_channels_and_number_of_levels(shape, levels):
    network = small_network(3, features=(8,) * levels, head_features=(8,) * levels)
    fixed, moving = images(3, shape)
    stages = run_stages([network], fixed=fixed, moving=moving, levels=range(levels))
    assert [stage.level for stage in stages] == list(reversed(range(levels)))
    for stage in stages:
        assert stage.disp.shape == stage.disp_inv.shape == (1, 3, *shape)
        assert stage.control_points.shape[2:] == tuple(-(-size // 2**stage.level) for size in shape)
        assert bool(stage.disp.isfinite().all())


@torch.no_grad()
def test_a_batch_gives_what_its_items_give():
    network = small_network()
    pairs = [images(seed=seed) for seed in (1, 2)]
    disp, _ = network(fixed=torch.cat([p[0] for p in pairs]), moving=torch.cat([p[1] for p in pairs]))
    for index, (fixed, moving) in enumerate(pairs):
        alone, _ = network(fixed=fixed, moving=moving)
        assert float((disp[index] - alone[0]).abs().mean()) < 2e-3  # the inversion may stop one look-up later


@torch.no_grad()
def test_an_ensemble_of_copies_is_the_member_and_of_two_lies_elsewhere():
    first, second = small_network(seed=1), small_network(seed=2)
    fixed, moving = images()
    single = run_stages([first], fixed=fixed, moving=moving)[-1].disp
    torch.testing.assert_close(
        run_stages([first, first, first], fixed=fixed, moving=moving)[-1].disp, single, atol=1e-4, rtol=0
    )
    mixed = run_stages([first, second], fixed=fixed, moving=moving)[-1].disp
    assert float((mixed - single).abs().max()) > 0.05


@pytest.mark.parametrize("gradients", [False, True])
def test_volumes_together_and_one_by_one_give_the_same(monkeypatch: pytest.MonkeyPatch, gradients: bool):
    """Large volumes are convolved one by one, sum and difference apart; small ones together."""
    network = small_network().double()
    fixed, moving = (image.double() for image in images())
    results = []
    for few in (10**9, 0):
        monkeypatch.setattr(memory, "SLOW_ALONE", few)
        with torch.set_grad_enabled(gradients):
            disp, disp_inv = network(fixed=fixed, moving=moving)
        if gradients:
            network.zero_grad()
            (disp.square().mean() + disp_inv.square().mean()).backward()
            results.append([disp, disp_inv, *(parameter.grad.clone() for parameter in network.parameters())])
        else:
            results.append([disp, disp_inv])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, atol=1e-9, rtol=1e-6)


def test_recomputing_changes_no_number_and_keeps_less():
    network = small_network()
    fixed, moving = images()
    results, kept = [], []
    for recompute in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            stages = run_stages([network], fixed=fixed, moving=moving, levels=range(3), recompute=recompute)
            loss = sum(stage.disp.square().mean() + stage.disp_inv.square().mean() for stage in stages)
        kept.append(sum(sizes))
        network.zero_grad()
        loss.backward()
        results.append([loss, *(parameter.grad.clone() for parameter in network.parameters())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    assert kept[1] < 0.7 * kept[0]


@torch.no_grad()
def test_one_field_alone_is_the_same_field():
    network = small_network()
    fixed, moving = images()
    (both,) = run_stages([network], fixed=fixed, moving=moving)
    (single,) = run_stages([network], fixed=fixed, moving=moving, inverse=False)
    assert torch.equal(both.disp, single.disp) and single.inverse is None
    with pytest.raises(ValueError, match="without the inverse"):
        _ = single.disp_inv


def test_wrong_input_is_named():
    network = small_network()
    fixed, moving = images()
    with pytest.raises(ValueError, match="fixed and moving must be"):
        network(fixed=fixed, moving=moving[:, :, :-1])
    with pytest.raises(ValueError, match="levels must lie"):
        run_stages([network], fixed=fixed, moving=moving, levels=[3])
    with pytest.raises(ValueError, match="no member"):
        run_stages([], fixed=fixed, moving=moving)
    with pytest.raises(ValueError, match="differ in architecture"):
        run_stages([network, small_network(features=(4, 8, 4))], fixed=fixed, moving=moving)
    with pytest.raises(ValueError, match="one entry per level"):
        SITReg(1, features=(4, 8), head_features=(4,))


def test_a_member_comes_back_as_it_was_written(tmp_path: Path):
    network = small_network()
    save_member(tmp_path / "a.safetensors", network, card(network))
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.json").stat().st_mode  # for others, too
    member = load_member(tmp_path / "a.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(member.network.state_dict()[name], tensor)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.safetensors"]
    save_member(tmp_path / "half.safetensors", network, card(network), torch.float16)
    half = load_member(tmp_path / "half.safetensors").network
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    torch.testing.assert_close(half.state_dict(), network.state_dict(), atol=1e-3, rtol=1e-2)


def test_official_names_come_back(tmp_path: Path):
    network = small_network(6)
    official = {official_name(name): tensor for name, tensor in network.state_dict().items()}
    assert len(official) == len(network.state_dict())
    again = network_from_official(official)
    assert again.architecture == network.architecture
    torch.testing.assert_close(again.state_dict(), network.state_dict(), atol=0, rtol=0)
    torch.save({"epoch": 3, "model": {f"net.{name}": tensor for name, tensor in official.items()}}, tmp_path / "a.pt")
    member = import_official(tmp_path / "a.pt", (18, 16, 14), torch.eye(4).tolist())
    assert member.card.mind == {"sigma": 0.5, "radius": 2} and member.card.shape == [18, 16, 14]
    torch.testing.assert_close(member.network.state_dict(), network.state_dict(), atol=0, rtol=0)
    official.pop(next(iter(official)))
    with pytest.raises(ValueError, match="official"):
        network_from_official(official)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"b\.pt: holds no state dict of the official"):
        import_official(tmp_path / "b.pt", (18, 16, 14), torch.eye(4).tolist())


def test_damaged_or_foreign_members_are_refused_in_one_line(tmp_path: Path):
    network = small_network()
    path = tmp_path / "a.safetensors"
    save_member(path, network, card(network))
    weights, text = path.read_bytes(), path.with_suffix(".json").read_text()

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            load_member(path)
        assert "\n" not in str(caught.value) and path.stem in str(caught.value)

    path.write_bytes(weights[:100])
    refused("SHA-256")
    values = json.loads(text)
    truncated = {**values, "sha256": sha256(weights[:100]).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(truncated))
    refused("truncated")
    path.write_bytes(weights)
    unchecked = {name: value for name, value in values.items() if name != "sha256"}
    path.with_suffix(".json").write_text(json.dumps(unchecked))
    refused("holds no SHA-256")
    path.with_suffix(".json").write_text(
        json.dumps({**values, "architecture": {**network.architecture, "groups": 2, "features": [4, 8]}})
    )
    refused("do not fit")
    path.with_suffix(".json").write_text(json.dumps({"architecture": network.architecture}))
    refused("no model card")
    path.with_suffix(".json").write_text("{")
    refused("not valid JSON")
    path.with_suffix(".json").unlink()
    refused("card")
    path.unlink()
    refused("no such file")
    foreign = tmp_path / "a.ckpt"
    foreign.write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(InputError, match="truncated"):
        load_member(foreign)


def test_members_of_an_ensemble_must_agree(tmp_path: Path):
    network = small_network()
    save_member(tmp_path / "a.safetensors", network, card(network))
    save_member(tmp_path / "b.safetensors", network, card(network))
    assert len(load_members([tmp_path])) == 2
    save_member(tmp_path / "b.safetensors", network, card(network, mind={"sigma": 0.5, "radius": 2}))
    with pytest.raises(InputError, match="mind is"):
        load_members([tmp_path])
    save_member(tmp_path / "b.safetensors", network, card(network, shape=[9, 9, 9]))
    with pytest.raises(InputError, match="shape is"):
        load_members([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    with pytest.raises(InputError, match="no such file or folder"):
        load_members([tmp_path / "c.ckpt"])


def test_shipped_members_are_named_where_files_of_that_name_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert member_files(["member2", "member1.safetensors"]) == [SHIPPED / f"member{k}.safetensors" for k in (2, 1)]
    (tmp_path / "member1").touch()
    assert member_files(["member1"]) == [Path("member1")]
    with pytest.raises(InputError, match=r"membre1: .*shipped ones \(member1, "):
        member_files(["membre1"])
