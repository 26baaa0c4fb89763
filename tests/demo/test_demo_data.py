"""The demo's data: LUMIR's layout, brains with the right contrasts, and fields that are true."""

import json
import socket
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from sitreg_lumir.demo.brain import STRUCTURES
from sitreg_lumir.demo.data import make_demo_data, true_disp
from sitreg_lumir.errors import InputError

SMALL: dict[str, Any] = {"shape": (27, 37, 32), "voxel_size": 6.0, "training": 2, "validation": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of demo data, made without any network."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, lambda *_: pytest.fail("the demo's data must not use the network"))
        dataset = make_demo_data(folder, **SMALL)
    assert dataset == folder / "LUMIR_dataset.json"
    return folder


def read(folder: Path, kind: str, subject: str, modality: str = "0000") -> NDArray[Any]:
    image: Any = nib.load(folder / kind / f"LUMIRMRI_{subject}_{modality}.nii.gz")
    return np.asarray(image.dataobj)


def warp(volume: NDArray[Any], disp: NDArray[Any], order: int) -> NDArray[Any]:
    return np.asarray(ndimage.map_coordinates(volume, np.indices(volume.shape) + disp, order=order))


def mean_dice(first: NDArray[Any], second: NDArray[Any]) -> float:
    return float(
        np.mean(
            [2 * ((first == k) & (second == k)).sum() / ((first == k).sum() + (second == k).sum()) for k in STRUCTURES]
        )
    )


@pytest.mark.parametrize(("name", "modality"), [("LUMIR_dataset", "0000"), ("LUMIR_dataset_multimodal", "0001")])
def test_the_lists_name_every_pair_and_every_file_is_there(made: Path, name: str, modality: str) -> None:
    dataset = json.loads((made / f"{name}.json").read_text())
    assert dataset["tensorImageShape"] == {"0": list(SMALL["shape"])}
    assert dataset["numTraining"] == len(dataset["training"]) == 2
    assert dataset["numValidation"] == len(dataset["validation"]) == 2
    assert list(map(int, dataset["evaluation_labels"])) == list(STRUCTURES)
    assert all(pair["moving"].endswith(f"_{modality}.nii.gz") for pair in dataset["validation"])
    for entry in dataset["training"] + dataset["validation"]:
        assert all((made / path).is_file() for path in entry.values())
    for pair in dataset["validation"]:
        for path in pair.values():
            assert (made / path.replace("images", "labels")).is_file()
            assert (made / path.replace("images", "landmarks")).is_file()


def test_images_are_brains_in_the_challenge_s_frame(made: Path) -> None:
    for folder, subject in (("imagesTr", "0000"), ("imagesTr", "0001"), ("imagesVal", "0100")):
        image: Any = nib.load(made / folder / f"LUMIRMRI_{subject}_0000.nii.gz")
        assert image.get_data_dtype() == np.uint8
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        centre = image.affine @ [*(np.array(image.shape) - 1) / 2, 1]
        np.testing.assert_allclose(centre, [0, -17, 5, 1])
        data = np.asarray(image.dataobj)
        litres = (data > 0).sum() * 6.0**3 / 1e6
        assert 1.4 < litres < 2.4
        assert data.max() == 255
        assert not data[0].any()


def test_contrast_is_that_of_t1_and_t2(made: Path) -> None:
    labels = read(made, "labelsVal", "0100")
    t1, t2 = (read(made, "imagesVal", "0100", modality) for modality in ("0000", "0001"))
    np.testing.assert_array_equal(t1 > 0, t2 > 0)
    assert not labels[t1 == 0].any()
    np.testing.assert_array_equal(labels, read(made, "labelsVal", "0100", "0001"))
    csf, grey, white = (np.isin(labels, ids) for ids in ((7, 27), (1, 2, 3, 21, 22, 23), (4, 5, 24, 25)))
    assert t1[csf].mean() < t1[grey].mean() < t1[white].mean()
    assert t2[csf].mean() > t2[grey].mean() > t2[white].mean()


def test_the_true_fields_align_labels_landmarks_and_images(made: Path) -> None:
    disp = true_disp(made, "0100", "0101")
    assert disp.shape == (3, *SMALL["shape"])
    assert 6 < np.linalg.norm(disp, axis=0).max() * 6.0 < 25  # mm
    fixed, moving = (read(made, "labelsVal", subject) for subject in ("0100", "0101"))
    assert mean_dice(fixed, warp(moving, disp, 0)) > mean_dice(fixed, moving) + 0.1

    fixed, moving = (read(made, "landmarksVal", subject) for subject in ("0100", "0101"))
    ids = np.arange(1, fixed.max() + 1)
    assert len(ids) >= 10
    assert set(ids) == set(np.unique(moving)) - {0}
    centres, before, after = (
        np.array(ndimage.center_of_mass(blobs > 0, blobs, ids)) for blobs in (fixed, moving, warp(moving, disp, 0))
    )
    error_before, error = (np.linalg.norm(located - centres, axis=1).mean() for located in (before, after))
    assert error < 0.6 * error_before

    fixed, moving = (read(made, "imagesVal", subject).astype(float) for subject in ("0100", "0101"))
    brain = fixed > 0
    unaligned, aligned = (np.corrcoef(fixed[brain], image[brain])[0, 1] for image in (moving, warp(moving, disp, 1)))
    assert aligned > unaligned + 0.15  # not near 1: at 6 mm, interpolation blurs most of the cortex away


def test_the_true_fields_are_diffeomorphic_and_inverse(made: Path) -> None:
    forth, back = true_disp(made, "0100", "0101"), true_disp(made, "0101", "0100")
    residual = forth + np.stack([warp(part, forth, 1) for part in back])
    assert np.linalg.norm(residual, axis=0).max() < 0.25  # voxels
    gradient = np.stack([np.stack(np.gradient(part), -1) for part in forth], -2) + np.eye(3)
    assert np.linalg.det(gradient).min() > 0


def test_the_seed_decides_everything(made: Path, tmp_path: Path) -> None:
    again = make_demo_data(tmp_path / "again", **SMALL).parent
    reseeded = make_demo_data(tmp_path / "other", **SMALL, seed=1).parent
    for path in sorted(made.rglob("*.nii.gz")):
        images: list[Any] = [nib.load(root / path.relative_to(made)) for root in (made, again, reseeded)]
        image, repeated, changed = (np.asarray(image.dataobj) for image in images)
        np.testing.assert_array_equal(image, repeated)
        assert (image != changed).any()


def test_a_folder_that_fits_is_reused_and_another_is_refused(made: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    make_demo_data(made, **SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    with pytest.raises(InputError, match="seed 0 there, 5 asked"):
        make_demo_data(made, **SMALL, seed=5)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="mine: exists already"):
        make_demo_data(mine, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sitreg_lumir.demo.data._write_lists", broken)
    with pytest.raises(InputError, match="disk full"):
        make_demo_data(tmp_path / "demo", **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"training": 1}, {"shape": (8, 8, 8)}, {"voxel_size": 0.0}, {"seed": -1}])
def test_parameters_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        make_demo_data(tmp_path / "demo", **{**SMALL, **wrong})
