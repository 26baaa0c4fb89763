"""Left and right exchanged: in training by draws of the seed, in prediction as a mirrored twin of each member."""

import json
from pathlib import Path

import data_samples
import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

from sitreg_lumir.cli import main
from sitreg_lumir.data.sampler import is_mirrored
from sitreg_lumir.errors import InputError
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.mirrored import MirroredNetwork, left_right_axis, mirrored_field, with_mirrored
from sitreg_lumir.network.sitreg import SITReg, StageNetwork, run_stages
from sitreg_lumir.network.weights import CARD_KEY, ModelCard, save_member
from sitreg_lumir.registration.model import load_model
from sitreg_lumir.train.module import MindRegistration

SHAPES = {0: (16, 18, 14), 1: (18, 16, 14), 2: (18, 14, 16)}  # only the mirrored axis must divide
MIDDLE = np.array([[2.0, 0, 0, -7], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])  # of data_samples' grid, at x = 0


def network(seed: int, in_channels: int, levels: int = 3) -> SITReg:
    torch.manual_seed(seed)
    made = SITReg(in_channels, features=(4,) * levels, head_features=(4,) * levels, inversion_tolerance=1e-6)
    for head in made.heads:
        torch.nn.init.normal_(head.final.weight, std=0.3)
    return made.eval()


def images(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    coarse = torch.rand(2, 1, 5, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")
    return smooth[:1], smooth[1:]


def test_the_axis_comes_from_the_matrix_wherever_it_stands() -> None:
    lumir = np.array([[-1.0, 0, 0, 79.5], [0, 0, 1, -100], [0, 1, 0, -130], [0, 0, 0, 1]])
    assert left_right_axis(lumir, (160, 224, 192), "x") == 0
    for order, axis in (([1, 0, 2], 1), ([1, 2, 0], 2)):
        turned = lumir[:, [*order, 3]]
        shape = [(160, 224, 192)[k] for k in order]
        assert left_right_axis(turned, shape, "x") == axis
    turned = np.eye(4)
    turned[:2, :2] = [[0.99, -0.14], [0.14, 0.99]]
    for matrix in (np.eye(4), turned, np.diag([1.0, 1, 1, 1]) + 10 * np.eye(4, k=3)):
        with pytest.raises(InputError, match=r"here: mirroring needs a grid"):
            left_right_axis(matrix, (160, 224, 192), "here")


@torch.no_grad()
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("members", [1, 2])
def test_mirrored_images_give_the_mirrored_fields(axis: int, members: int) -> None:
    networks = [network(seed, 6).double() for seed in range(members)]
    twins: list[StageNetwork] = [*networks, *(MirroredNetwork(single, axis) for single in networks)]
    fixed, moving = images(SHAPES[axis])
    mind = Mind()

    def fields(run: list[StageNetwork], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        (stage,) = run_stages(run, fixed=mind(first), moving=mind(second))
        return stage.disp, stage.disp_inv

    disp, disp_inv = fields(twins, fixed, moving)
    reversed_disp, reversed_inv = fields(twins, fixed.flip(axis + 2), moving.flip(axis + 2))
    assert float(disp.abs().max()) > 0.5
    torch.testing.assert_close(reversed_disp, mirrored_field(disp, axis), atol=1e-5, rtol=0)
    torch.testing.assert_close(reversed_inv, mirrored_field(disp_inv, axis), atol=1e-5, rtol=0)
    alone = fields(list(networks), fixed, moving)[0]
    alone_reversed = fields(list(networks), fixed.flip(axis + 2), moving.flip(axis + 2))[0]
    assert float((alone_reversed - mirrored_field(alone, axis)).abs().max()) > 0.05, "without twins it is not so"
    swapped, swapped_inv = fields(twins, moving, fixed)
    torch.testing.assert_close((swapped, swapped_inv), (disp_inv, disp), atol=1e-9, rtol=0)


@torch.no_grad()
def test_a_twin_alone_is_the_network_between_two_mirrors() -> None:
    single = network(0, 1).double()
    fixed, moving = images(SHAPES[0])
    (stage,) = run_stages([MirroredNetwork(single, 0)], fixed=fixed, moving=moving)
    disp, _ = single(fixed=fixed.flip(2), moving=moving.flip(2))
    torch.testing.assert_close(stage.disp, mirrored_field(disp, 0), atol=1e-5, rtol=0)


def test_what_cannot_be_mirrored_is_refused() -> None:
    with pytest.raises(ValueError, match="12 input channels"):
        MirroredNetwork(network(0, 12), 0)
    with pytest.raises(InputError, match="10 voxels from left to right must divide by 4"):
        with_mirrored([network(0, 1)], MIDDLE + np.diag([0, 0, 0, 0]) - 2 * np.eye(4, k=3), (10, 8, 8))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(data_samples, "AFFINE", MIDDLE)
    return data_samples.make_dataset(tmp_path / "data")


def fit(root: Path, runs: Path, name: str, *more: str) -> int:
    return main([
        "fit", "--config", "mind", "--name", name, "--runs", str(runs), "--wandb", "off", "--checkpoint-every", "1",
        "--data.root", str(root), "--data.batch_size", "2", "--data.pairs_per_epoch", "6", "--data.num_workers", "0",
        "--data.cache", str(runs.parent / "cache"), "--model.features", "[4,4]", "--model.head_features", "[4,4]",
        "--model.window", "5", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0", *more,
    ])  # fmt: skip


@pytest.mark.slow
def test_training_mirrors_every_other_pair_whole(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [is_mirrored(3, epoch, index) for epoch in range(4) for index in range(100)]
    assert 150 < sum(drawn) < 250 and drawn != [is_mirrored(4, e, i) for e in range(4) for i in range(100)]
    recorded: list[tuple[Tensor, Tensor, bool]] = []
    original = MindRegistration.mirrored

    def watched(self: MindRegistration, batch: dict) -> dict:  # type: ignore[type-arg]
        changed = original(self, batch)
        for stored, received, index in zip(batch["images"], changed["images"], batch["index"].tolist(), strict=True):
            recorded.append((stored, received, is_mirrored(0, self.current_epoch, index)))
        return changed

    monkeypatch.setattr(MindRegistration, "mirrored", watched)
    runs = tmp_path / "runs"
    assert fit(root, runs, "plain") == 0
    assert all(torch.equal(stored, received) for stored, received, _ in recorded) and len(recorded) == 12
    recorded.clear()
    assert fit(root, runs, "whole", "--data.mirror", "true") == 0
    for stored, received, mirrored in recorded:  # (2, 1, X, Y, Z)
        assert torch.equal(received, stored.flip(2) if mirrored else stored)
    assert {mirrored for _, _, mirrored in recorded} == {True, False}
    whole = torch.load(runs / "whole" / "checkpoints" / "last.ckpt", weights_only=True)
    assert whole[CARD_KEY]["training"]["mirror"] is True

    def failing(self: MindRegistration, batch: dict) -> dict:  # type: ignore[type-arg]
        if self.global_step == 4:
            raise InputError("ended on purpose")
        return original(self, batch)

    mirror = ("--data.mirror", "true")
    monkeypatch.setattr(MindRegistration, "mirrored", failing)
    assert fit(root, runs, "parts", *mirror) == 2
    monkeypatch.setattr(MindRegistration, "mirrored", original)
    assert fit(root, runs, "parts", "--resume") == 2, "within an epoch it cannot be changed"
    assert fit(root, runs, "parts", *mirror, "--resume") == 0
    parts = torch.load(runs / "parts" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.equal(parts["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())


def test_training_on_a_grid_beside_the_middle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_samples.make_dataset(tmp_path / "data")
    assert fit(root, tmp_path / "runs", "off", "--data.mirror", "true") == 2
    assert "LUMIR_dataset.json: --data.mirror true: mirroring needs" in capsys.readouterr().err


def test_predict_and_register_average_with_mirrored_members(root: Path, tmp_path: Path) -> None:
    made = network(0, 1, levels=2)
    file = tmp_path / "member.safetensors"
    save_member(file, made, ModelCard(made.architecture, None, list(data_samples.SHAPE), MIDDLE.tolist()))
    fields = {}
    for name, more in (("plain", []), ("flip", ["--flip", "--disagreement"])):
        common = ["predict", "--members", str(file), "--data.root", str(root), "-o", str(tmp_path / name)]
        common += ["--data.cache", str(tmp_path / "cache"), "--data.num_workers", "0", "--device", "cpu"]
        assert main([*common, *more]) == 0
        fields[name] = nibabel.load(tmp_path / name / "disp_0100_0101.nii.gz").get_fdata()
        assert main([*common, *(["--flip"] if not more else [])]) == 2, "made otherwise"
    assert np.abs(fields["flip"] - fields["plain"]).max() > 0.02
    assert json.loads((tmp_path / "flip" / "disp_0100_0101.json").read_text())["options"]["flip"] is True
    model = load_model(file, device="cpu", flip=True)
    stored = [nibabel.load(root / f"imagesVal/LUMIRMRI_{n}_0000.nii.gz").get_fdata() / 255 for n in ("0100", "0101")]
    fixed, moving = (torch.from_numpy(values).float()[None, None] for values in stored)
    (stage,) = model.run(fixed=fixed, moving=moving)
    np.testing.assert_allclose(stage.disp[0].movedim(0, -1).numpy(), fields["flip"], atol=1e-4)
    assert len(model.ensemble.networks) == 2 * len(model.members) and "mirrored" in str(model)
