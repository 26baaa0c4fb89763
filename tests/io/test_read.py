"""Reading volumes: types, and one clear line for each kind of bad file."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from data_samples import AFFINE, SHAPE, head, save

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.read import read_labels, read_stated_grid, read_volume


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_integers_come_as_uint8_whatever_type_is_stored(tmp_path: Path, dtype: type) -> None:
    path = save(tmp_path / "a.nii.gz", head(0).astype(dtype))
    values, affine = read_volume(path, shape=SHAPE)
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, head(0))
    np.testing.assert_array_equal(affine, AFFINE)
    assert read_stated_grid(path)[0] == SHAPE


def test_fractions_come_as_float32(tmp_path: Path) -> None:
    values, _ = read_volume(save(tmp_path / "a.nii", head(0).astype(np.float32) / 2))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, head(0).astype(np.float32) / 2)


def test_the_scaling_of_the_header_is_applied(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image((head(0) // 2).astype(np.int16), AFFINE)
    image.header.set_slope_inter(2, 0)
    nibabel.save(image, tmp_path / "a.nii.gz")
    values, _ = read_volume(tmp_path / "a.nii.gz")
    assert values.dtype == np.uint8
    assert values.max() <= 254


def _bad(kind: str) -> np.ndarray:
    values = head(0).astype(np.float32)
    if kind == "NaN":
        values[3, 3, 3] = np.nan
    changed = {
        "empty": values * 0,
        "0..255": values * 3,
        "0..1": values / 255,
        "3-D": np.stack([values, values], -1),
        "expected": values[1:],
    }
    return np.asarray(changed.get(kind, values))


@pytest.mark.parametrize("kind", ["NaN", "empty", "0..255", "0..1", "3-D", "expected"])
def test_unusable_voxels_end_in_one_line(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "a.nii.gz", _bad(kind))
    with pytest.raises(InputError, match=kind) as error:
        read_volume(path, shape=SHAPE)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files_end_in_one_line(tmp_path: Path) -> None:
    good = save(tmp_path / "good.nii.gz", head(0)).read_bytes()
    flipped = bytearray(good)
    flipped[-6] ^= 1  # the checksum
    plain = gzip.decompress(good)
    for name, data in {
        "truncated.nii.gz": good[: len(good) // 2],
        "no_end.nii.gz": good[:-8],
        "flipped.nii.gz": bytes(flipped),
        "text.nii.gz": b"hello",
        "short.nii": plain[:400],
        "empty.nii.gz": b"",
        "packed_text.nii.gz": gzip.compress(b"hello" * 200),
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name) as error:
            read_volume(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        read_volume(tmp_path / "missing.nii.gz")
    with pytest.raises(InputError, match="missing"):
        read_stated_grid(tmp_path / "missing.nii.gz")


def test_labels_are_integers(tmp_path: Path) -> None:
    labels = read_labels(save(tmp_path / "a.nii.gz", head(0).astype(np.float32)), shape=SHAPE)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, head(0))
    with pytest.raises(InputError, match="integers"):
        read_labels(save(tmp_path / "b.nii.gz", head(0) / 2))
