"""Dataset JSONs: what they give, and all that is wrong in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from data_samples import SHAPE, content, head, make_dataset, save, write

from sitreg_lumir.data.images import Image
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.errors import InputError

SHARED = Path(__file__).parents[3] / "shared"


def test_reads_a_folder_or_a_json(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    dataset = read_dataset(root, training=True, validation=True)
    assert dataset == read_dataset(root / "LUMIR_dataset.json")
    assert (dataset.name, dataset.shape, dataset.root) == ("tiny", SHAPE, root)
    assert [image.subject for image in dataset.training] == ["0000", "0001", "0002", "0003", "0004"]
    assert dataset.evaluation_labels == (0, 1, 2)
    assert dataset.label_names[2] == "white"
    pair = dataset.validation[0]
    assert (pair.name, pair.long_name, pair.group) == ("0100_0101", "0100_0000_0101_0000", "T1-T1")
    assert pair.fixed.labels == root / "labelsVal/LUMIRMRI_0100_0000.nii.gz"
    assert pair.fixed.landmarks is None
    (mixed,) = read_dataset(root / "LUMIR_dataset_multimodal.json").validation
    assert (mixed.group, mixed.name) == ("T1-T2", "0100_0101")


def test_plain_strings_and_a_plain_shape_are_understood(tmp_path: Path) -> None:
    changed = content(make_dataset(tmp_path))
    changed["training"] = [entry["image"] for entry in changed["training"]]
    changed["tensorImageShape"] = changed["tensorImageShape"]["0"]
    write(tmp_path, changed)
    assert len(read_dataset(tmp_path, training=True).training) == 5


def test_all_problems_are_named_together(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, training=30)
    (root / "imagesTr/LUMIRMRI_0003_0000.nii.gz").unlink()
    (root / "imagesTr/LUMIRMRI_0004_0000.nii.gz").write_bytes(b"")
    save(root / "imagesVal/LUMIRMRI_0101_0000.nii.gz", head(0)[1:])
    with pytest.raises(InputError) as error:
        read_dataset(root, training=True)
    message = str(error.value)
    assert "3 problems" in message
    assert all(name in message for name in ("0003_0000", "0004_0000", "0101_0000", "(7, 10, 6)"))
    assert "\n" not in message
    for subject in range(30):
        (root / f"imagesTr/LUMIRMRI_{subject:04}_0000.nii.gz").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"31 problems.*0019_0000.*; and 11 more"):
        read_dataset(root, training=True)
    read_dataset(root, training=True, check_files=False)


def _turned(path: Path) -> None:
    """The same voxels at the same places, stored in the other order along the first axis."""
    image: Any = nibabel.load(path)  # type: ignore[attr-defined]
    values, affine = np.asarray(image.dataobj), image.affine.copy()
    affine[:3, 3] += affine[:3, 0] * (values.shape[0] - 1)
    affine[:3, 0] *= -1
    nibabel.Nifti1Image(values[::-1], affine).to_filename(path)


def _elsewhere(path: Path) -> None:
    image: Any = nibabel.load(path)  # type: ignore[attr-defined]
    affine = image.affine.copy()
    affine[1, 3] += 6
    nibabel.Nifti1Image(np.asarray(image.dataobj), affine).to_filename(path)


def _larger(path: Path) -> None:
    nibabel.Nifti1Image(head(0), np.diag([2, 2, 3.0, 1])).to_filename(path)


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        (
            "labelsVal/LUMIRMRI_0101_0000.nii.gz",
            _turned,
            "its axes point to LAS, those of LUMIRMRI_0100_0000.nii.gz",
        ),
        ("imagesVal/LUMIRMRI_0102_0000.nii.gz", _turned, "its axes point to LAS"),
        ("labelsVal/LUMIRMRI_0101_0000.nii.gz", _elsewhere, "it lies up to 6.0 mm from its image"),
        ("imagesVal/LUMIRMRI_0101_0000.nii.gz", _larger, "its voxels are 2 x 2 x 3 mm large"),
    ],
)
def test_headers_are_compared(
    name: str, change: Callable[[Path], None], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_dataset(tmp_path)
    change(root / name)
    with pytest.raises(InputError, match=f"{name}: .*{line}.*store it as that is"):
        read_dataset(root, validation=True)
    assert len(read_dataset(root, validation=True, check_headers=False).validation) == 3
    assert f"{name}: {line}" in capsys.readouterr().err


def test_files_whose_headers_say_nothing_are_taken(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    nibabel.Nifti1Image(head(1) // 100, np.eye(4)).to_filename(root / "labelsVal/LUMIRMRI_0101_0000.nii.gz")
    image = nibabel.Nifti1Image(head(1)[..., None], np.diag([-1.0, 1, 1, 1]))  # a frame alone is a volume
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    image.to_filename(root / "imagesVal/LUMIRMRI_0102_0000.nii.gz")
    read_dataset(root, validation=True)


IMAGE = "./imagesTr/LUMIRMRI_0000_0000.nii.gz"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": None}, "`training`"),
        ({"training": []}, "`training`"),
        ({"training": [{"image": IMAGE}]}, "at least 2"),
        ({"training": [{"image": IMAGE}, {"image": IMAGE}]}, "0000 is listed 2 times"),
        ({"training": [IMAGE, "../other/LUMIRMRI_0001_0000.nii.gz"]}, "leaves the folder"),
        ({"training": [IMAGE, "imagesTr/brain.png"]}, "is no .nii.gz or .nii file"),
        ({"training": [IMAGE, {"image": "imagesTr/brain.nii.gz", "subject": 7}]}, "`subject` 7"),
        ({"training": [{"image": f"imagesTr/sub-1_ses-{visit}_T1w.nii.gz"} for visit in "12"]}, "at least 2"),
        ({"training": [IMAGE, {"picture": "a"}]}, "not a path"),
        ({"training": {"image": IMAGE}}, "must be a list"),
        ({"validation": None}, "`validation`"),
        ({"validation": [{"fixed": IMAGE}]}, "not a path"),
        ({"tensorImageShape": {"0": [1, 2]}}, "tensorImageShape"),
        ({"tensorImageShape": None}, "tensorImageShape"),
    ],
)
def test_wrong_jsons_end_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write(tmp_path, content(make_dataset(tmp_path)) | change)
    with pytest.raises(InputError, match=message) as error:
        read_dataset(tmp_path, training=True, validation=True)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_which_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no JSON file"):
        read_dataset(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="not a readable JSON"):
        read_dataset(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InputError, match="one object"):
        read_dataset(tmp_path)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(InputError, match=r"several JSON files \(a.json, b.json\)"):
        read_dataset(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        read_dataset(tmp_path / "missing")


def test_the_challenges_own_json() -> None:
    file = SHARED / "lumir25" / "LUMIR25_dataset.json"
    if not file.is_file():
        pytest.skip(f"the challenge's list is not at {file}")
    dataset = read_dataset(file, training=True, validation=True, check_files=False)
    assert dataset.shape == (160, 224, 192)
    assert (len(dataset.training), len(dataset.validation)) == (3384, 36)
    assert dataset.evaluation_labels is None
    contrasts = [pair.contrasts for pair in dataset.validation]
    assert (contrasts.count("T1-T1"), contrasts.count("T1-T2")) == (27, 9)
    assert dataset.training[-1] == Image(file.parent / "imagesTr/LUMIRMRI_3383_0000.nii.gz", "3383", "0000")
