"""How far the members of an ensemble differ: its definition by brute force, its unit, its files."""

import json
import weakref
from pathlib import Path
from typing import Any

import data_samples
import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

from sitreg_lumir.cli import main
from sitreg_lumir.deform.ops import upsample_control_points, warp
from sitreg_lumir.deform.state import SymmetricState
from sitreg_lumir.deform.update import Maps
from sitreg_lumir.network import memory
from sitreg_lumir.network.sitreg import SITReg, run_stages
from sitreg_lumir.network.weights import ModelCard, save_member

SHAPE = (18, 16, 14)


def network(seed: int, in_channels: int = 1, levels: int = 3) -> SITReg:
    torch.manual_seed(seed)
    made = SITReg(in_channels, features=(4,) * levels, head_features=(4,) * levels, inversion_tolerance=1e-4)
    for head in made.heads:
        torch.nn.init.normal_(head.final.weight, std=0.3)
    return made.eval().double()


def images() -> tuple[Tensor, Tensor]:
    coarse = torch.rand(2, 1, 5, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse, size=SHAPE, mode="trilinear")
    return smooth[:1], smooth[1:]


def brute_force(members: list[SITReg], fixed: Tensor, moving: Tensor, field: int = 0) -> tuple[Tensor, SymmetricState]:
    """The summed variance in the middle, from all members' fields at once, and the state after the last stage."""
    pyramids = [member.features(moving, fixed) for member in members]
    state = SymmetricState(SHAPE, members[0].inversion_tolerance)
    total = torch.zeros(1, 1, *SHAPE, dtype=torch.float64)
    for level in reversed(range(members[0].levels)):
        updates = [
            member.control_points(level, features, state.maps)
            for member, features in zip(members, pyramids, strict=True)
        ]
        fields = torch.stack([upsample_control_points(update[field], 2**level, SHAPE) for update in updates])
        total += fields.var(dim=0, correction=0).sum(dim=1, keepdim=True)
        forward, reverse = (torch.stack([update[k] for update in updates]).mean(0) for k in (0, 1))
        state.update(forward, reverse, 2**level)
    return total, state


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 3])
def test_it_is_the_root_of_the_summed_variance_pulled_to_the_fixed_grid(count: int) -> None:
    members = [network(seed) for seed in range(count)]
    fixed, moving = images()
    total, state = brute_force(members, fixed, moving)
    assert state.maps.right_inv is not None
    expected = warp(total, state.maps.right_inv).sqrt()
    (stage,) = run_stages(members, fixed=fixed, moving=moving, disagreement=True)
    assert stage.disagreement is not None and float(expected.max()) > 0.1
    torch.testing.assert_close(stage.disagreement, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(stage.disp, state.fields()[0], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_exchanging_the_images_gives_the_map_of_the_other_side() -> None:
    members = [network(seed) for seed in (0, 1)]
    fixed, moving = images()
    inverse_spread, state = brute_force(members, fixed, moving, field=1)
    swapped, swapped_state = brute_force(members, fixed=moving, moving=fixed)
    torch.testing.assert_close(swapped, inverse_spread, atol=1e-7, rtol=0)
    assert swapped_state.maps.right_inv is not None and state.maps.left_inv is not None
    (stage,) = run_stages(members, fixed=moving, moving=fixed, disagreement=True)
    torch.testing.assert_close(stage.disagreement, warp(inverse_spread, state.maps.left_inv).sqrt(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_identical_members_do_not_disagree_and_the_order_of_members_says_nothing() -> None:
    first, second = network(0), network(1)
    fixed, moving = images()
    (stage,) = run_stages([first, first, first], fixed=fixed, moving=moving, disagreement=True)
    assert stage.disagreement is not None and not stage.disagreement.any()
    stages = [
        run_stages(order, fixed=fixed, moving=moving, disagreement=True)[-1]
        for order in ([first, second], [second, first])
    ]
    torch.testing.assert_close(stages[0].disagreement, stages[1].disagreement, atol=1e-9, rtol=1e-9)
    assert run_stages([first, second], fixed=fixed, moving=moving)[-1].disagreement is None
    with pytest.raises(ValueError, match="two members or more"):
        run_stages([first], fixed=fixed, moving=moving, disagreement=True)


@torch.no_grad()
def test_the_state_does_not_grow_with_the_number_of_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than one member's full-resolution features and control points exist at once."""
    alive: set[int] = set()
    most = 0
    original = memory.control_points_of

    def watched(head: Any, factor: int, moving: Tensor, fixed: Tensor, maps: Maps) -> tuple[Tensor, Tensor]:
        nonlocal most
        if factor == 1:
            alive.add(id(moving))
            weakref.finalize(moving, alive.discard, id(moving))
            most = max(most, len(alive))
        return original(head, factor, moving, fixed, maps)

    monkeypatch.setattr(memory, "control_points_of", watched)
    fixed, moving = images()
    run_stages([network(seed) for seed in range(4)], fixed=fixed, moving=moving, disagreement=True)
    assert 1 <= most <= 2  # the last one is let go when the next takes its name


def members_of(folder: Path, root: Path, size: float) -> Path:
    """Two tiny members for the tiny data set, at voxels of ``size`` mm."""
    affine = np.diag([size, size, size, 1.0])
    for image in root.glob("*/*.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(image).dataobj), affine), image)
    for seed in (0, 1):
        made = network(seed, levels=2).float()
        card = ModelCard(made.architecture, None, list(data_samples.SHAPE), affine.tolist())
        save_member(folder / f"member{seed}.safetensors", made, card)
    return folder


def predict(root: Path, members: Path, out: Path, *more: str) -> int:
    return main([
        "predict", "--members", str(members), "--data.root", str(root / "LUMIR_dataset.json"), "-o", str(out),
        "--data.cache", str(out.parent / "cache"), "--data.num_workers", "0", "--device", "cpu", *more,
    ])  # fmt: skip


def test_it_is_written_in_mm_beside_the_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = {}
    for size in (1.0, 2.0):
        folder = tmp_path / f"{size:g}mm"
        root = data_samples.make_dataset(folder / "data")
        members = members_of(folder / "members", root, size)
        assert predict(root, members, folder / "out", "--disagreement") == 0
        image = nibabel.load(folder / "out" / "disagreement_0100_0101.nii.gz")
        assert image.shape == data_samples.SHAPE and image.get_data_dtype() == np.float32
        np.testing.assert_allclose(np.abs(np.diag(image.affine)[:3]), size)
        maps[size] = image.get_fdata()
    assert maps[1.0].max() > 0.05
    np.testing.assert_allclose(maps[2.0], 2 * maps[1.0], rtol=1e-6)
    names = sorted(path.name for path in (folder / "out").glob("disa*"))
    assert names == [f"disagreement_{pair}.nii.gz" for pair in ("0100_0101", "0101_0102", "0102_0100")]

    capsys.readouterr()
    assert predict(root, members, folder / "out", "--disagreement") == 0
    assert "3 fields are there already, 0 to predict" in capsys.readouterr().out
    (folder / "out" / names[0]).unlink()
    assert predict(root, members, folder / "out", "--disagreement") == 0
    assert "2 fields are there already, 1 to predict" in capsys.readouterr().out
    plain, asked = folder / "plain", folder / "out"
    assert predict(root, members, plain) == 0
    assert (plain / "disp_0100_0101.nii.gz").read_bytes() == (asked / "disp_0100_0101.nii.gz").read_bytes()
    assert len(json.loads((plain / "disp_0100_0101.json").read_text())["members"]) == 2


def test_one_member_or_voxels_that_are_no_cubes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_samples.make_dataset(tmp_path / "data")
    members = members_of(tmp_path / "members", root, 1.0)
    out = tmp_path / "out"
    assert predict(root, members / "member0.safetensors", out, "--disagreement") == 2
    assert "two members or more" in capsys.readouterr().err
    for image in root.glob("*/*.nii.gz"):
        values = np.asarray(nibabel.load(image).dataobj)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([0.5, 1.0, 1.5, 1.0])), image)
    assert predict(root, members, out, "--disagreement") == 2
    error = capsys.readouterr().err
    assert "cubes" in error and "Traceback" not in error and not out.exists()
