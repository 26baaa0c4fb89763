"""FreeSurfer, NRRD, MetaImage and pairs of files are read as NIfTI is; what they do not say is not guessed."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from sitreg_lumir.data.cache import _made_from
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import map_points
from sitreg_lumir.io.bounded import recorded_checksums
from sitreg_lumir.io.checksum import sha256_file
from sitreg_lumir.io.itk import load_itk_field, load_transform, save_itk_field
from sitreg_lumir.io.other_formats import IMAGE_SUFFIXES, without_suffix
from sitreg_lumir.io.read import read_grid, read_image, read_labels
from sitreg_lumir.io.volume_files import volume_files

SHAPE = (6, 7, 5)


def affine() -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", (20, -10, 95), degrees=True).as_matrix() * (1.25, 0.9, 2)
    matrix[:3, 3] = (-12.5, 30, 7)
    return matrix


def voxels(dtype: Any = np.int16) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 120, SHAPE).astype(dtype)


def save(path: Path, values: NDArray[Any]) -> Path:
    """The volume in the format that its name says, by another package."""
    kinds: dict[str, Any] = {".mgz": nibabel.MGHImage, ".mgh": nibabel.MGHImage, ".img": nibabel.Nifti1Pair}
    kinds |= {".hdr": nibabel.Nifti1Pair, ".gz": nibabel.Nifti1Image, ".nii": nibabel.Nifti1Image}
    if path.suffix in kinds:
        nibabel.save(kinds[path.suffix](values, affine()), path)  # type: ignore[attr-defined]
        return path
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    lps = np.diag([-1.0, -1, 1, 1]) @ affine()
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), path.suffix in (".mha", ".nhdr"))
    return path


@pytest.mark.parametrize("suffix", [".mgz", ".mgh", ".nrrd", ".nhdr", ".mha", ".mhd", ".img", ".hdr"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_values_and_places_are_those_of_nifti(tmp_path: Path, suffix: str, dtype: Any) -> None:
    scan = read_image(save(tmp_path / f"a b{suffix}", voxels(dtype)))
    expected = read_image(save(tmp_path / "a.nii.gz", voxels(dtype)))
    assert scan.data.dtype == expected.data.dtype and scan.data.flags.c_contiguous
    np.testing.assert_array_equal(scan.data, expected.data)
    np.testing.assert_allclose(scan.affine, expected.affine, atol=1e-5)
    shape, grid = read_grid(tmp_path / f"a b{suffix}")
    assert shape == SHAPE
    np.testing.assert_allclose(grid, expected.affine, atol=1e-5)
    assert without_suffix(f"a b{suffix}") == "a b"


def test_names_that_are_not_utf_8_are_read(tmp_path: Path) -> None:
    """ITK ends the program on such names."""
    for suffix in (".nrrd", ".mha", ".mgz", ".nii.gz"):
        path = save(tmp_path / f"plain{suffix}", voxels())
        odd = path.rename(path.with_name(f"M\udcfcller{suffix}"))
        np.testing.assert_array_equal(read_image(odd).data, voxels())
    sitk.WriteTransform(sitk.AffineTransform(3), str(tmp_path / "plain.tfm"))
    odd = (tmp_path / "plain.tfm").rename(tmp_path / "M\udcfcller.tfm")
    np.testing.assert_array_equal(load_transform(odd), np.eye(4))


def _without_space(path: Path) -> Path:
    path.write_bytes(path.read_bytes().replace(b"space: left-posterior-superior", b"space dimension: 3"))
    return path


def _without(path: Path, *starts: str) -> Path:
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(line for line in lines if not line.startswith(tuple(map(str.encode, starts)))))
    return path


def test_unknown_axes_need_an_assumption(tmp_path: Path) -> None:
    freesurfer = save(tmp_path / "a.mgh", voxels())
    content = bytearray(freesurfer.read_bytes())
    content[28:30] = b"\0\0"  # goodRASFlag
    freesurfer.write_bytes(content)
    analyze: Any = nibabel.AnalyzeImage(voxels(), affine())  # type: ignore[no-untyped-call]
    analyze.to_filename(tmp_path / "d.img")
    for path in (
        freesurfer,
        _without_space(save(tmp_path / "b.nrrd", voxels())),
        _without(save(tmp_path / "c.mhd", voxels()), "TransformMatrix", "AnatomicalOrientation"),
        tmp_path / "d.hdr",
    ):
        with pytest.raises(InputError, match=rf"{path.name}: .*--assume-orientation"):
            read_image(path)
        scan = read_image(path, assume_orientation="LAS")
        assert scan.orientation == "LAS"
        np.testing.assert_array_equal(scan.data, voxels())


def test_units_are_kept_or_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nrrd", voxels())
    content = path.read_bytes()
    for unit, message in (("m", "says metre"), ("inch", "unit of length 'inch"), ("um", "says micrometre")):
        path.write_bytes(content.replace(b"kinds:", f'space units: "{unit}" "{unit}" "{unit}"\nkinds:'.encode()))
        with pytest.raises(InputError, match=message):
            read_image(path)


@pytest.mark.parametrize("suffix", [".mgz", ".mgh", ".nrrd", ".nhdr", ".mha", ".mhd", ".img"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "alone"])
def test_damaged_files_end_in_one_line(
    tmp_path: Path, suffix: str, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / f"a{suffix}", voxels(np.float32))
    parts = [file for file in tmp_path.iterdir() if file != path]
    if damage == "alone" and parts:
        parts[0].unlink()
    elif damage == "cut":
        largest = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-100])
    elif damage != "alone":
        path.write_bytes(b"hello " * 100 if damage == "text" else b"")
    else:
        return
    with pytest.raises(InputError) as error:
        read_image(path)
    assert str(tmp_path / "a") in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr().out == ""


def test_dicom_gets_the_line_that_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "series 1"
    folder.mkdir()
    for name in ("IM0001", "IM0002.dcm"):
        (folder / name).write_bytes(bytes(128) + b"DICM" + bytes(100))
    for path in (folder, folder / "IM0001", folder / "IM0002.dcm", tmp_path):
        with pytest.raises(InputError, match="dcm2niix -z y -o nifti") as error:
            read_image(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert f"'{folder}'" in str(_error(folder / "IM0001"))


def _error(path: Path) -> InputError:
    with pytest.raises(InputError) as error:
        read_image(path)
    return error.value


@pytest.mark.parametrize(
    ("suffix", "of_voxels"), [(".mhd", ".raw"), (".nhdr", ".raw.gz"), (".img", ".img"), (".hdr", ".img")]
)
def test_the_checksum_of_a_volume_in_two_files_is_that_of_both(tmp_path: Path, suffix: str, of_voxels: str) -> None:
    path = save(tmp_path / f"a{suffix}", voxels())
    header, partner = (tmp_path / f"a{'.hdr' if suffix == '.img' else suffix}"), tmp_path / f"a{of_voxels}"
    assert volume_files(path) == [header, partner]
    with recorded_checksums() as read:
        read_image(path)
    before, stamp, text = sha256_file(path), _made_from(path), header.read_bytes()
    assert read[str(path)] == before
    save(path, voxels() + np.int16(1))
    assert header.read_bytes() == text and sha256_file(path) != before and _made_from(path) != stamp
    partner.unlink()
    assert volume_files(path) == [path]


def test_fields_of_itk_in_other_formats(tmp_path: Path) -> None:
    """As elastix and Slicer write them: vectors in mm, LPS."""
    disp = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    save_itk_field(tmp_path / "a.nii.gz", disp, affine())
    field = sitk.ReadImage(str(tmp_path / "a.nii.gz"), sitk.sitkVectorFloat32)
    points = affine() @ [2.2, 3.3, 1.7, 1]
    expected = map_points(load_itk_field(tmp_path / "a.nii.gz"), points[None, :3])
    for name in ("b.mha", "c.nrrd"):
        sitk.WriteImage(field, str(tmp_path / name))
        np.testing.assert_allclose(map_points(load_transform(tmp_path / name), points[None, :3]), expected, atol=1e-4)
        with pytest.raises(InputError, match="vectors"):
            read_image(tmp_path / name)


def test_integers_beyond_float32_keep_all_digits(tmp_path: Path) -> None:
    """Ids of atlases: float64, or integers with a scaling; also in another format."""
    ids = voxels().astype(np.float64) * 5_000_003 + 1
    assert ids.max() > 2**24
    nibabel.Nifti1Image(ids, affine()).to_filename(tmp_path / "a.nii.gz")
    scan = read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(scan.data, ids)
    assert scan.data.dtype == np.int64
    scaled = nibabel.Nifti1Image((ids - 1).astype(np.int32), affine())
    scaled.header.set_slope_inter(1, 1)
    scaled.to_filename(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(read_image(tmp_path / "b.nii.gz").data, ids)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.nii.gz"), ids)
    nibabel.Nifti1Image(ids + 0.25, affine()).to_filename(tmp_path / "c.nii.gz")
    assert read_image(tmp_path / "c.nii.gz").data.dtype == np.float32


def test_every_ending_is_a_volume_s() -> None:
    assert all(without_suffix(f"name{suffix.upper()}") == "name" for suffix in IMAGE_SUFFIXES)


@pytest.mark.parametrize("field", ["type", "sizes", "space directions", "kinds", "of nobody"])
def test_long_fields_do_not_reach_itk(tmp_path: Path, field: str) -> None:
    path = save(tmp_path / "a.nrrd", voxels())
    before, _, after = path.read_bytes().partition(b"encoding:")
    for line, fits in ((f"{field}: {'9' * 2000}", False), (f"mine:={'9' * 2000}", True), (f"#{'9' * 2000}", True)):
        path.write_bytes(before + f"{line}\nencoding:".encode() + after)
        if fits:
            np.testing.assert_array_equal(read_image(path).data, voxels())
        else:
            with pytest.raises(InputError, match=r"a field of 20|two fields"):  # ITK would end the process
                read_image(path)
