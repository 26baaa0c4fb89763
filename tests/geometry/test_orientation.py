"""Any NIfTI volume is read where its header puts it; what is contradictory or no volume is refused in one line."""

import gzip
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.read import Scan, read_grid, read_image

SHAPE = (6, 7, 5)
PIXDIM, INTENT, DATATYPE, VOX_OFFSET, UNITS, QFORM_CODE, SFORM_CODE, QUATERN, SROW, MAGIC, DIM = (
    76,
    68,
    70,
    108,
    123,
    252,
    254,
    256,
    280,
    344,
    40,
)  # fmt: skip (byte offsets in a NIfTI-1 header)


def rotation(degrees: float, axis: int) -> NDArray[np.float64]:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(3)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix[first, first] = matrix[second, second] = c
    matrix[first, second], matrix[second, first] = -s, s
    return matrix


def oblique(spacing: tuple[float, ...] = (1.3, 0.9, 2.0)) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = rotation(15, 0) @ rotation(-8, 2) @ np.diag(spacing)
    affine[:3, 3] = (-12.5, 30, 7)
    return affine


def voxels(dtype: Any = np.int16) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 120, SHAPE).astype(dtype)


def save(path: Path, data: NDArray[Any], affine: NDArray[np.float64], **codes: int) -> Path:
    image = nibabel.Nifti1Image(data, affine)
    image.set_sform(affine, code=codes.get("sform", 1))
    image.set_qform(affine, code=codes.get("qform", 1))
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    return path


def patch(path: Path, offset: int, kind: str, *values: Any) -> Path:
    """Overwrites bytes of an uncompressed file, past all checks of nibabel."""
    content = bytearray(path.read_bytes())
    struct.pack_into(f"<{kind}", content, offset, *values)
    path.write_bytes(content)
    return path


def refused(path: Path, match: str, read: Callable[..., Any] = read_image, **options: Any) -> str:
    with pytest.raises(InputError, match=match) as caught:
        read(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PIR", "SLA", "IPL", "ARS"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_orientation_puts_the_same_values_at_the_same_places(tmp_path: Path, codes: str, suffix: str) -> None:
    upright = nibabel.Nifti1Image(voxels(), oblique())
    turn = ornt_transform(io_orientation(upright.affine), axcodes2ornt(codes))
    turned = upright.as_reoriented(turn)
    scan = read_image(save(tmp_path / f"a{suffix}", np.asarray(turned.dataobj), turned.affine))
    assert scan.orientation == codes
    assert scan.shape == turned.shape
    np.testing.assert_allclose(sorted(scan.spacing), (0.9, 1.3, 2.0), rtol=1e-6)
    for index in ((0, 0, 0), (5, 6, 4), (2, 3, 1)):
        world = oblique() @ (*index, 1)
        place = np.linalg.solve(scan.affine, world)[:3]
        np.testing.assert_allclose(place, np.rint(place), atol=1e-4)
        assert scan.data[tuple(np.rint(place).astype(int))] == voxels()[index]


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", ">i2", ">f8"])
@pytest.mark.parametrize("version", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_integers_keep_their_type_and_floats_become_float32(tmp_path: Path, kind: str, version: Any) -> None:
    dtype = np.dtype(kind)
    header = version.header_class(endianness=">" if dtype.byteorder == ">" else "<")
    header.set_data_dtype(dtype)
    image = version(voxels(dtype), oblique(), header)
    image.set_qform(oblique(), code=1)
    image.to_filename(tmp_path / "a.nii.gz")
    scan = read_image(tmp_path / "a.nii.gz")
    assert scan.data.dtype == (np.float32 if dtype.kind == "f" else dtype.newbyteorder("="))
    assert scan.data.flags.c_contiguous and scan.data.flags.writeable
    np.testing.assert_array_equal(scan.data, voxels())
    np.testing.assert_allclose(scan.affine, oblique(), atol=1e-5)


def test_the_scaling_is_applied(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels(), oblique())
    patch(path, 112, "2f", 0.5, -30)
    scan = read_image(path)
    assert scan.data.dtype == np.float32
    np.testing.assert_allclose(scan.data, voxels() * 0.5 - 30)
    patch(path, 112, "2f", 1, 0)
    assert read_image(path).data.dtype == np.int16
    patch(path, 112, "2f", 0, 7)  # the standard: slope 0 means no scaling
    np.testing.assert_array_equal(read_image(path).data, voxels())


@pytest.mark.parametrize(("code", "factor"), [(0, 1), (1, 1000), (2, 1), (3, 0.001)])
@pytest.mark.parametrize("form", ["sform", "qform"])
def test_units_become_mm(tmp_path: Path, code: int, factor: float, form: str) -> None:
    in_unit = oblique()
    in_unit[:3] /= factor
    codes = {"sform": int(form == "sform"), "qform": int(form == "qform")}
    path = patch(save(tmp_path / "a.nii", voxels(), in_unit, **codes), UNITS, "B", code | 8)  # with seconds
    scan = read_image(path)
    assert scan.source == form
    np.testing.assert_allclose(scan.affine, oblique(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(read_image(path, assume_orientation="LPS").affine, scan.affine)  # only where unknown


def test_an_unknown_unit_is_refused(tmp_path: Path) -> None:
    refused(patch(save(tmp_path / "a.nii", voxels(), oblique()), UNITS, "B", 5), "unit")


def test_two_headers_that_disagree_need_a_choice(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels(), oblique())
    turned = oblique()
    turned[:3, :3] = rotation(2, 1) @ turned[:3, :3]  # the same first voxel; only far corners move
    patch(path, SROW, "12f", *turned[:3].ravel())
    apart = np.linalg.norm((turned - oblique()) @ (5, 6, 4, 1))
    assert apart > 0.1
    message = refused(path, "differ")
    for expected in ("sform [", "qform [", "--header sform", "--header qform", f"{apart:.3g}"[:3], "-12.5", "30"):
        assert expected in message
    refused(path, "differ", read_grid)
    np.testing.assert_allclose(read_image(path, header="sform").affine, turned, atol=1e-5)
    chosen = read_image(path, header="qform")
    np.testing.assert_allclose(chosen.affine, oblique(), atol=1e-5)
    assert chosen.source == "qform"
    np.testing.assert_allclose(read_grid(path, header="qform")[1], chosen.affine)


def test_less_than_a_tenth_of_a_millimetre_is_no_disagreement(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels(), oblique())
    for shift, agree in ((0.09, True), (0.11, False)):
        shifted = oblique()
        shifted[0, 3] += shift
        patch(path, SROW, "12f", *shifted[:3].ravel())
        if agree:
            np.testing.assert_allclose(read_image(path).affine, shifted, atol=1e-5)
        else:
            refused(path, "differ")


def test_no_header_needs_an_assumption(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels(), np.diag([1.5, 2, 3, 1]), sform=0, qform=0)
    assert "--assume-orientation RAS" in refused(path, "does not say")
    scan = read_image(path, assume_orientation="PIR")
    assert (scan.orientation, scan.source) == ("PIR", "assumed PIR")
    np.testing.assert_allclose(scan.spacing, (1.5, 2, 3))
    np.testing.assert_allclose(scan.affine @ (2.5, 3, 2, 1), (0, 0, 0, 1), atol=1e-6)  # the middle of the volume
    for wrong in ("RA", "RAL", "ras", "RASA", "XYZ", ""):
        with pytest.raises(InputError, match="three letters"):
            read_image(path, assume_orientation=wrong)
    refused(path, "no sform is set", header="sform")
    with pytest.raises(InputError, match="sform or qform"):
        read_image(path, header="both")


def test_small_shear_is_fixed_with_a_warning_and_large_shear_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def sheared(amount: float) -> Path:
        affine = oblique()
        affine[:3, 0] += amount * affine[:3, 1] * 1.3 / 0.9
        path = save(tmp_path / "a.nii", voxels(), oblique(), qform=0)
        return patch(path, SROW, "12f", *affine[:3].ravel())

    with caplog.at_level(logging.WARNING):
        scan = read_image(sheared(8e-4))
    assert "not quite orthogonal" in caplog.text and "a.nii" in caplog.text
    axes = scan.affine[:3, :3] / scan.spacing
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(scan.spacing, (1.3, 0.9, 2.0), rtol=1e-5)
    stored = nibabel.load(tmp_path / "a.nii").affine  # type: ignore[attr-defined]
    corners = np.array(np.meshgrid([0, 5], [0, 6], [0, 4], [1])).reshape(4, -1)
    assert np.linalg.norm((scan.affine - stored) @ corners, axis=0).max() < 8e-4 * np.linalg.norm((5, 6, 4))
    np.testing.assert_allclose(scan.affine @ (2.5, 3, 2, 1), stored @ (2.5, 3, 2, 1), atol=1e-9)
    caplog.clear()
    assert "resample" in refused(sheared(1.2e-3), "not orthogonal")
    np.testing.assert_allclose(read_image(sheared(5e-6)).affine, oblique(), atol=1e-4)  # rounding: kept, no warning
    assert not caplog.text


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_spacing_must_be_positive(tmp_path: Path, wrong: float) -> None:
    both: list[dict[str, int]] = [{}] if wrong != -1 else []  # with a good sform, see the next test
    for codes in ({"sform": 0}, {"sform": 0, "qform": 0}, *both):
        path = patch(save(tmp_path / "a.nii", voxels(), oblique(), **codes), PIXDIM + 8, "f", wrong)
        refused(path, "voxel size is", assume_orientation="RAS")
    path = save(tmp_path / "a.nii", voxels(), oblique(), qform=0)
    patch(path, PIXDIM + 8, "f", wrong)
    assert read_image(path).source == "sform"  # does not need it
    columns = oblique()
    columns[:3, 1] = 0 if wrong <= 0 else wrong
    refused(patch(path, SROW, "12f", *columns[:3].ravel()), "voxel size is|sform holds NaN")


def test_oddities_that_other_readers_take_are_read(tmp_path: Path) -> None:
    """The same numbers at the same places as SimpleITK reads, or as the plain file has them."""
    plain = save(tmp_path / "plain.nii", voxels(), oblique())
    expected = read_image(plain)
    content = plain.read_bytes()
    (tmp_path / "moved.nii").write_bytes(content)
    moved = patch(tmp_path / "moved.nii", VOX_OFFSET, "f", 0)
    (tmp_path / "short.nii").write_bytes(content[:348] + content[352:])  # no bytes on extensions, as ITK expects there
    short = patch(tmp_path / "short.nii", VOX_OFFSET, "f", 0)
    files = {
        "offset 0": moved,
        "offset 0, no extension bytes": short,
        "negative spacing": patch(save(tmp_path / "a.nii", voxels(), oblique()), PIXDIM + 4, "3f", -0.9, 1.3, -2),
        "dim[4] 0": patch(save(tmp_path / "b.nii", voxels(), oblique()), DIM, "8h", 4, *SHAPE, 0, 1, 1, 1),
        "dim[4..7] 0": patch(save(tmp_path / "c.nii", voxels(), oblique()), DIM, "8h", 5, *SHAPE, 0, 0, 0, 0),
    }
    for kind, path in files.items():
        scan = read_image(path)
        np.testing.assert_array_equal(scan.data, expected.data, err_msg=kind)
        np.testing.assert_array_equal(scan.affine, expected.affine, err_msg=kind)
        assert read_grid(path)[0] == SHAPE
        if path is not moved:  # which ITK reads from byte 348 on, so four bytes too early
            image = sitk.ReadImage(str(path))
            np.testing.assert_array_equal(np.squeeze(sitk.GetArrayFromImage(image)).T, expected.data, err_msg=kind)


@pytest.mark.parametrize(("unit", "name"), [(1, "metre"), (3, "micrometre")])
def test_a_unit_that_the_numbers_contradict_is_refused(tmp_path: Path, unit: int, name: str) -> None:
    for codes in ({}, {"sform": 0}, {"qform": 0}, {"sform": 0, "qform": 0}):
        path = patch(save(tmp_path / "a.nii", voxels(), oblique(), **codes), UNITS, "B", unit)
        message = refused(path, f"says {name}", assume_orientation="RAS")
        assert "set xyzt_units to 2" in message
        refused(path, f"says {name}", read_grid, assume_orientation="RAS")


def test_a_broken_qform_is_refused(tmp_path: Path) -> None:
    path = patch(save(tmp_path / "a.nii", voxels(), oblique()), QUATERN, "3f", 1, 1, 1)
    assert "--header sform" in refused(path, "no valid qform")
    assert read_image(path, header="sform").source == "sform"
    patch(path, QUATERN, "3f", np.nan, 0, 0)
    refused(path, "qform")


def test_qfac_zero_counts_as_one(tmp_path: Path) -> None:
    path = patch(save(tmp_path / "a.nii", voxels(), oblique(), sform=0), PIXDIM, "f", 0)
    np.testing.assert_allclose(read_image(path).affine, oblique(), atol=1e-5)


def _image(data: NDArray[Any]) -> Callable[[Path], None]:
    return lambda path: save(path, data, oblique()) and None


def _patched(offset: int, kind: str, *values: Any) -> Callable[[Path], None]:
    return lambda path: patch(save(path, voxels(), oblique()), offset, kind, *values) and None


def _colours() -> NDArray[Any]:
    return np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


def _with(value: float) -> NDArray[np.float32]:
    data = voxels(np.float32)
    data[1, 2, 3] = value
    return data


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "directory"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("hello" * 200), "no NIfTI header"),
    "short": (lambda path: path.write_bytes(save(path, voxels(), oblique()).read_bytes()[:200]), "truncated"),
    "truncated": (lambda path: path.write_bytes(save(path, voxels(), oblique()).read_bytes()[:-1]), "420 bytes"),
    "cut gzip": (
        lambda path: path.write_bytes(gzip.compress(save(path, voxels(), oblique()).read_bytes())[:-9]),
        "truncated",
    ),
    "damaged gzip": (
        lambda path: path.write_bytes(gzip.compress(save(path, voxels(), oblique()).read_bytes())[:-8] + b"\0" * 8),
        "CRC",
    ),
    "pair": (_patched(MAGIC, "4s", b"ni1"), "two files"),
    "analyze": (_patched(MAGIC, "4s", b""), "no NIfTI header"),
    "offset": (_patched(VOX_OFFSET, "f", 200), "truncated or corrupt"),
    "type": (_patched(DATATYPE, "h", 12345), "code 12345"),
    "bits": (_patched(DATATYPE, "h", 1), "cannot be used"),
    "frames": (_image(np.stack([voxels()] * 3, -1)), "4-D with 3 frames"),
    "vectors": (_image(np.zeros((*SHAPE, 1, 3), np.float32)), "vectors"),
    "2-D": (_image(voxels()[..., 0]), "2-D"),
    "one slice": (_image(voxels()[:, :1]), "2-D"),
    "no voxels": (_patched(DIM, "4h", 3, 6, 0, 5), "no voxels"),
    "colours": (_image(_colours()), "RGB"),
    "complex": (_image(voxels(np.complex64)), "complex"),
    "nan": (_image(_with(np.nan)), "1 of 210 voxels are NaN or infinite"),
    "infinite": (_image(_with(-np.inf)), "NaN or infinite"),
    "too large": (_image(_with(1).astype(np.float64) * 1e300), "NaN or infinite"),
    "zeros": (_image(np.zeros(SHAPE, np.uint8)), "all voxels are 0"),
    "constant": (_image(np.full(SHAPE, 2.5, np.float32)), "all voxels are 2.5"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_volume_is_refused_in_one_line(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, match = BAD[kind]
    path = tmp_path / "a.nii"
    make(path)
    refused(path, match)
    assert capfd.readouterr() == ("", "")


def test_constant_volumes_can_be_allowed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.ones(SHAPE, np.uint8), oblique())
    assert read_image(path, allow_constant=True).data.max() == 1


def test_a_single_frame_is_a_volume_and_several_can_be_allowed(tmp_path: Path) -> None:
    single = save(tmp_path / "one.nii", voxels()[..., None], oblique())
    assert read_image(single).data.shape == read_image(single, frames=True).data.shape == SHAPE
    several = np.stack([voxels(), voxels() + 1], -1)
    scan = read_image(save(tmp_path / "two.nii", several, oblique()), frames=True)
    assert scan.data.shape == (*SHAPE, 2) and scan.shape == SHAPE
    np.testing.assert_array_equal(scan.data, several)
    patch(tmp_path / "two.nii", 112, "2f", 2, 0)
    np.testing.assert_array_equal(read_image(tmp_path / "two.nii", frames=True).data, 2 * several)


def test_the_header_says_labels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels(), oblique())
    assert not read_image(path).says_labels
    scan = read_image(patch(path, INTENT, "h", 1002))
    assert isinstance(scan, Scan) and scan.says_labels
    assert scan.path == path and int(scan.header["sform_code"]) == 1


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_grid_alone_needs_no_voxels(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", np.stack([voxels()] * 3, -1), oblique())
    expected = read_image(path, frames=True)
    content = path.read_bytes()
    if suffix == ".nii":
        path.write_bytes(content[:352])
    shape, affine = read_grid(path)
    assert shape == SHAPE
    np.testing.assert_array_equal(affine, expected.affine)
    refused(tmp_path / "missing.nii", "no such file", read_grid)
