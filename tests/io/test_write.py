"""Fields and volumes survive the way through files; broken files are refused in one line."""

import errno
import gzip
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.read import load_disp
from sitreg_lumir.io.write import save_disp, save_volume

SHAPE = (5, 7, 6)
AFFINE = np.array([[2.0, 0, 0, -79], [0, 2, 0, -128], [0, 0, 2, -90], [0, 0, 0, 1]])


@pytest.fixture
def disp() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)


def test_field_round_trip_and_form_on_disk(tmp_path: Path, disp: NDArray[np.float32]) -> None:
    path = tmp_path / "new" / "disp_0100_0101.nii.gz"
    save_disp(path, disp, AFFINE)
    loaded, affine = load_disp(path, shape=SHAPE)
    np.testing.assert_array_equal(loaded, disp)
    np.testing.assert_array_equal(affine, AFFINE)
    image = nibabel.Nifti1Image.from_filename(path)
    assert image.shape == (*SHAPE, 3)
    assert image.get_data_dtype() == np.float32
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.get_qform(), AFFINE)
    np.testing.assert_array_equal(image.get_fdata()[..., 1], disp[1])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_same_field_gives_same_bytes(tmp_path: Path, disp: NDArray[np.float32]) -> None:
    save_disp(tmp_path / "a.nii.gz", disp, AFFINE)
    save_disp(tmp_path / "b.nii.gz", disp, AFFINE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(("dtype", "stored"), [(bool, "u1"), ("u1", "u1"), ("i8", "i4"), ("f8", "f4")])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_volume_round_trip(tmp_path: Path, dtype: str, stored: str, suffix: str) -> None:
    volume = np.random.default_rng(0).integers(0, 2, SHAPE).astype(dtype)
    path = tmp_path / f"warped{suffix}"
    save_volume(path, volume, AFFINE)
    image = nibabel.Nifti1Image.from_filename(path)
    assert image.get_data_dtype() == np.dtype(stored)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), volume)


def test_writing_refuses_wrong_arrays(tmp_path: Path, disp: NDArray[np.float32]) -> None:
    path = tmp_path / "disp.nii.gz"
    for wrong, affine in ((disp[:2], AFFINE), (disp * np.nan, AFFINE), (disp, AFFINE * 0), (disp, AFFINE[:3])):
        with pytest.raises(ValueError, match=r"must be|holds NaN"):
            save_disp(path, wrong, affine)
    with pytest.raises(ValueError, match="X, Y, Z"):
        save_volume(path, disp, AFFINE)
    with pytest.raises(ValueError, match="int32"):
        save_volume(path, np.full(SHAPE, 2**40), AFFINE)
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_old_file_and_no_rest(
    tmp_path: Path, disp: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disp.nii.gz"
    save_disp(path, disp, AFFINE)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left") as caught:
        save_disp(path, 2 * disp, AFFINE)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_unusable_folder_is_an_input_error(tmp_path: Path, disp: NDArray[np.float32]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_disp(tmp_path / "file" / "disp.nii.gz", disp, AFFINE)


def test_reading_refuses_what_is_no_field(tmp_path: Path, disp: NDArray[np.float32]) -> None:
    path = tmp_path / "disp.nii.gz"
    on_disk = np.moveaxis(disp, 0, -1)

    def refuse(match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            load_disp(path, shape=SHAPE)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    refuse("no such file")
    save_disp(path, disp, AFFINE)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refuse("truncated")
    path.write_bytes(gzip.compress(gzip.decompress(content)[:-100]))
    refuse("truncated")
    path.write_bytes(b"nothing")
    refuse("no NIfTI")
    nan = on_disk.copy()
    nan[0, 0, 0, 0] = np.nan
    for array, match in (
        (on_disk[..., 0], "the shape"),
        (on_disk[:, :, :, None], "the shape"),
        (on_disk[:-1], "the grid"),
        (on_disk.astype(np.int16), "int16"),
        (nan, "NaN"),
    ):
        nibabel.Nifti1Image(array, AFFINE).to_filename(path)
        refuse(match)
