"""`predict --exact` and `--save-maps`, and what `submit` and `apply` make of the maps."""

import json
import zipfile
from pathlib import Path

import data_samples
import numpy as np
import pytest
import torch
from cli_calls import predict_arguments, refused

from sitreg_lumir.cli import main
from sitreg_lumir.geometry.transforms import map_points
from sitreg_lumir.io.maps import load_map
from sitreg_lumir.io.read import load_disp, read_volume
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import ModelCard, save_member

PAIR = "0100_0101"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_samples.make_dataset(tmp_path_factory.mktemp("exact") / "data")


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("members")
    for seed in range(2):
        torch.manual_seed(seed)
        network = SITReg(6, features=(4, 4), head_features=(4, 4))
        for head in network.heads:
            torch.nn.init.normal_(head.final.weight, std=0.3)  # type: ignore[union-attr]
        card = ModelCard(network.architecture, {}, list(data_samples.SHAPE), data_samples.AFFINE.tolist())
        save_member(folder / f"{seed}.safetensors", network, card)
    return folder


@pytest.fixture(scope="module")
def predicted(root: Path, members: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the network's own fields, alone and with maps, and of samples of the maps."""
    folder = tmp_path_factory.mktemp("predicted")
    ways = {"plain": ["--inverse"], "maps": ["--save-maps"], "exact": ["--exact", "--inverse", "--warped"]}
    for way, options in ways.items():
        assert main(predict_arguments(root, members, folder / way, *options)) == 0
    return {way: folder / way for way in ways}


def fields(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("disp_*.nii.gz"))}


def options_in(file: Path) -> dict[str, object]:
    """Options that a field's or a map's JSON tells."""
    stored = json.loads(file.read_text())
    return dict(stored.get("made_from", stored)["options"])


def test_maps_leave_the_network_s_own_fields_as_they_are(predicted: dict[str, Path]) -> None:
    assert fields(predicted["maps"]) == fields(predicted["plain"]) != fields(predicted["exact"])
    assert len(fields(predicted["maps"])) == len(list(predicted["maps"].glob("map_*.safetensors"))) == 3
    assert not list(predicted["exact"].glob("map_*"))
    for way in ("maps", "plain"):
        assert "exact" not in options_in(predicted[way] / f"disp_{PAIR}.json")
    assert options_in(predicted["exact"] / f"disp_{PAIR}.json")["exact"] is True
    assert "exact" not in options_in(predicted["maps"] / f"map_{PAIR}.json")


def test_exact_fields_are_samples_of_the_map(predicted: dict[str, Path], root: Path) -> None:
    exact = load_map(predicted["maps"] / f"map_{PAIR}.safetensors")
    for name, samples in (("disp", exact.disp), ("inverse", exact.inverse.disp)):
        written, _ = load_disp(predicted["exact"] / f"{name}_{PAIR}.nii.gz")
        own, _ = load_disp(predicted["plain"] / f"{name}_{PAIR}.nii.gz")
        assert np.array_equal(written, samples)
        assert 0 < np.abs(samples - own).mean() < 0.3 * np.abs(samples).mean()
    voxels = np.argwhere(exact.brain)
    world = voxels @ data_samples.AFFINE[:3, :3].T
    mapped = map_points(exact, world)
    assert np.abs(mapped - world - 2 * exact.disp[:, *voxels.T].T).max() < 1e-4
    assert np.abs(map_points(exact.inverse, mapped) - world).max() < 1e-3
    fixed, moving = (read_volume(root / f"imagesVal/LUMIRMRI_{subject}_0000.nii.gz")[0] for subject in PAIR.split("_"))
    assert np.array_equal(exact.brain, fixed > 0) and np.array_equal(exact.other_brain, moving > 0)


def test_ways_of_sampling_do_not_mix(
    predicted: dict[str, Path], root: Path, members: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for path in predicted["plain"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    refused(capsys, predict_arguments(root, members, folder, "--exact"), "options.exact", "absent", "--overwrite")
    assert main(predict_arguments(root, members, folder, "--save-maps")) == 0  # maps are missing: made, fields kept
    assert fields(folder) == fields(predicted["plain"])
    assert main(predict_arguments(root, members, folder, "--save-maps")) == 0
    assert "3 fields are there already" in capsys.readouterr().out.splitlines()[-2]
    assert (
        main(predict_arguments(root, members, folder, "--exact", "--save-maps", "--disagreement", "--overwrite")) == 0
    )
    assert fields(folder) == fields(predicted["exact"])
    refused(capsys, predict_arguments(root, members, folder), "options.exact", "True there", "--overwrite")


def test_maps_of_other_members_are_made_again_or_go(
    root: Path, members: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, alone = tmp_path / "out", members / "0.safetensors"
    assert main(predict_arguments(root, alone, folder, "--save-maps")) == 0
    former = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(predict_arguments(root, members, folder, "--overwrite")) == 0
    assert not list(folder.glob("map_*"))  # those of one member do not lie beside fields of two
    assert main(predict_arguments(root, members, folder, "--save-maps")) == 0
    whole = {path.name: path.read_bytes() for path in folder.glob("map_*")}
    for name in whole:
        (folder / name).write_bytes(former[name])
    refused(capsys, ["submit", str(folder), "--data", str(root), "-o", str(tmp_path / "a.zip"), "--exact"], "3 reasons")
    (folder / f"map_{PAIR}.safetensors").write_bytes(b"half of it")
    (folder / f"map_{PAIR}.json").unlink()
    assert main(predict_arguments(root, members, folder, "--save-maps")) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("map_*")} == whole


def test_submit_exact_takes_maps_or_fields_that_are_samples_of_them(
    predicted: dict[str, Path], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit(way: str, name: str, *options: str) -> list[str]:
        return ["submit", str(predicted[way]), "--data", str(root), "-o", str(tmp_path / name), *options]

    assert main(submit("maps", "of_maps.zip", "--exact")) == 0
    assert "sampled from exact maps" in capsys.readouterr().out
    assert main(submit("exact", "of_fields.zip", "--exact")) == 0
    assert main(submit("maps", "own.zip")) == 0
    assert "exact" not in capsys.readouterr().out.splitlines()[-1]
    contents = {}
    for name in ("of_maps", "of_fields", "own"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as archive:
            contents[name] = {file: archive.read(file) for file in archive.namelist()}
    assert contents["of_maps"] == contents["of_fields"] == fields(predicted["exact"])
    assert contents["own"] == fields(predicted["plain"])
    refused(capsys, submit("plain", "none.zip", "--exact"), "not fit for submission")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of_fields.zip", "of_maps.zip", "own.zip"]


def test_apply_takes_a_predicted_map(
    predicted: dict[str, Path], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Points both ways, and an image on a grid of a quarter of the voxel size."""
    file, points, mapped, back = predicted["maps"] / f"map_{PAIR}.safetensors", *(tmp_path / f"{n}.csv" for n in "abc")
    points.write_text("x,y,z\n6,8,6\n8.5,10.25,4\n")
    assert main(["apply", "-t", str(file), "--to", "moving", "--points", str(points), "-o", str(mapped)]) == 0
    assert main(["apply", "-t", str(file), "--to", "fixed", "--points", str(mapped), "-o", str(back)]) == 0
    read = [np.loadtxt(path, delimiter=",", skiprows=1) for path in (points, mapped, back)]
    assert np.abs(read[2] - read[0]).max() < 1e-3 < np.abs(read[1] - read[0]).max()
    assert np.allclose(read[1], map_points(load_map(file), read[0]), atol=1e-4)
    fine = tmp_path / "fine.nii.gz"
    data_samples.nibabel.save(
        data_samples.nibabel.Nifti1Image(np.ones((32, 40, 24), np.uint8), np.diag([0.5, 0.5, 0.5, 1])), fine
    )
    resampled = tmp_path / "new" / f"disp_{PAIR}.nii.gz"
    assert main(["resample-field", str(file), "--to", str(fine), "-o", str(resampled)]) == 0
    disp, _ = load_disp(resampled)
    voxels = np.argwhere(np.ones(disp.shape[1:]))
    moved_by_map = map_points(load_map(file).on_grids, voxels / 2) * 2 - voxels
    assert np.abs(disp.reshape(3, -1).T - moved_by_map).max() < 1e-4
    stored = json.loads(resampled.with_name(f"disp_{PAIR}.json").read_text())
    assert stored["pair"] == "0100_0000_0101_0000" and stored["carried"]["field"]["name"] == file.name
    image = root / "imagesVal/LUMIRMRI_0101_0000.nii.gz"
    to_fixed = ["apply", "-t", str(file), "--to", "fixed", "--image", str(image), "-o", str(tmp_path / "moved.nii.gz")]
    assert main([*to_fixed, "--reference", str(fine)]) == 0
    moved = read_volume(tmp_path / "moved.nii.gz")[0]
    assert moved.shape == (32, 40, 24) and moved.max() > 0
    gone = str(tmp_path / "gone.safetensors")
    refused(capsys, ["apply", "-t", gone, *to_fixed[3:]], gone, "no such file")
    refused(capsys, ["resample-field", gone, "--to", str(fine), "-o", str(tmp_path / "x.nii")], gone, "no such file")
    refused(capsys, [part for part in to_fixed if part not in ("--to", "fixed")], "map", "--to fixed or --to moving")
