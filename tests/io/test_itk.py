"""Files of transforms: SimpleITK and nitransforms map as the transform itself does, and foreign ones are read."""

import errno
import os
import struct
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
from nitransforms.linear import Affine
from nitransforms.nonlinear import DenseFieldTransform
from transform_samples import (
    CASES,
    bumps,
    by_sitk,
    case,
    distance,
    grid_points,
    matrix,
    random_points,
    saved,
    sitk_field,
    truth,
)

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import map_points
from sitreg_lumir.io.itk import (
    field_grid,
    load_affine,
    load_itk_field,
    load_transform,
    save_affine_tfm,
    save_itk_field,
)

TOLERANCE = 0.01  # mm


@pytest.mark.parametrize("name", CASES)
def test_other_readers_map_field_samples_as_the_transform_does(tmp_path: Path, name: str) -> None:
    sample = case(name)
    path = tmp_path / "from-moving_to-fixed_xfm.nii.gz"
    shape, affine = saved(path, sample)
    samples = grid_points(shape, affine)
    samples = samples[np.random.default_rng(5).permutation(len(samples))[:2000]]
    expected = truth(sample.composite, samples)
    assert distance(by_sitk(sitk_field(path), samples), expected).max() < TOLERANCE
    nitransforms = DenseFieldTransform.from_filename(path, fmt="itk")
    assert distance(nitransforms.map(samples), expected).max() < TOLERANCE
    assert distance(map_points(load_itk_field(path), samples), expected).max() < TOLERANCE
    assert distance(map_points(sample.composite, samples), expected).max() < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_between_samples_a_file_is_near_the_transform_and_read_as_sitk_does(tmp_path: Path, name: str) -> None:
    sample = case(name)
    path = tmp_path / "xfm.nii.gz"
    shape, affine = saved(path, sample)
    points = random_points(sample.fixed_shape, sample.fixed, 2000, border=0.01)
    by_file = map_points(load_itk_field(path), points)
    assert distance(by_file, by_sitk(sitk_field(path), points)).max() < 1e-4
    last = np.array(shape) - 1
    place = (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    between = ((place >= 0) & (place <= last)).all(axis=1)
    error = distance(by_file, map_points(sample.composite, points))
    assert np.median(error[between]) < 0.02 and error[between].max() < 0.15  # bends of 3 mm within some 10 mm
    assert error.max() < 1  # in the outer half voxel, ITK takes the border's displacement


def test_outside_an_unpadded_field_itk_stands_still_and_padding_helps(tmp_path: Path) -> None:
    sample = case("flipped")
    beyond = random_points(sample.fixed_shape, sample.fixed, 3000, border=-4)
    place = (beyond - sample.fixed[:3, 3]) @ np.linalg.inv(sample.fixed[:3, :3]).T
    away = (np.abs(place - (np.array(sample.fixed_shape) - 1) / 2) - np.array(sample.fixed_shape) / 2).max(axis=1)
    outside, within = away > 0.01, away < -0.01  # voxels from the outer faces
    assert min(outside.sum(), within.sum()) > 500
    expected = map_points(sample.composite, beyond)
    saved(tmp_path / "tight.nii.gz", sample)
    saved(tmp_path / "padded.nii.gz", sample, padding=5)
    tight, padded = sitk_field(tmp_path / "tight.nii.gz"), sitk_field(tmp_path / "padded.nii.gz")
    assert distance(by_sitk(tight, beyond[outside]), beyond[outside]).max() < 1e-9  # the identity
    assert distance(by_sitk(tight, beyond), expected)[outside].min() > 1
    assert distance(by_sitk(tight, beyond), expected)[within].max() < 1
    error = distance(by_sitk(padded, beyond), expected)
    assert np.median(error) < 0.02 and error.max() < 0.5  # most at the model's border, where the transform has an edge
    own = map_points(load_itk_field(tmp_path / "tight.nii.gz"), beyond)
    assert distance(own, by_sitk(tight, beyond)).max() < 1e-4
    assert np.isnan(map_points(load_itk_field(tmp_path / "tight.nii.gz"), beyond, outside="nan")[outside]).all()


@pytest.mark.parametrize("padding", [0, 2.5])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (1.0000001, 0.99999, 1), (0.7, 0.8, 1), (1.3, 0.9, 2.0), (5, 3, 1.5)])
def test_field_grid_covers_the_image_with_samples_at_most_a_millimetre_apart(
    spacing: tuple[float, ...], padding: float
) -> None:
    shape = (9, 10, 7)
    image = matrix("PIR", spacing, (10, 20, -5), shape, (3, 2, 1))
    count, grid = field_grid(shape, image, padding)
    apart = np.linalg.norm(grid[:3, :3], axis=0)
    np.testing.assert_allclose(apart, np.minimum(spacing, 1), rtol=1e-5)
    np.testing.assert_allclose(grid @ (*((np.array(count) - 1) / 2), 1), (3, 2, 1, 1), atol=1e-9)
    excess = np.array(count) * apart - np.array(shape) * spacing - 2 * padding  # of the whole width
    assert (excess > -1e-3).all() and (excess < 3 * apart).all()
    if max(spacing) <= 1 and padding == 0:
        assert count == shape
        np.testing.assert_allclose(grid, image, atol=1e-12)


def test_form_of_a_field_on_disk(tmp_path: Path) -> None:
    disp = bumps((4, 5, 6), 1, 2, 0)
    affine = matrix("LAS", (1, 0.5, 0.8), (3, 2, 1))
    path = tmp_path / "new" / "xfm.nii.gz"
    save_itk_field(path, disp, affine)
    header = nibabel.load(path).header  # type: ignore[attr-defined]
    assert header.get_data_shape() == (4, 5, 6, 1, 3)
    assert header.get_data_dtype() == np.float32
    assert (int(header["intent_code"]), int(header["sform_code"]), int(header["qform_code"])) == (1007, 1, 1)
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_qform(), affine, atol=1e-6)
    np.testing.assert_allclose(header.get_sform(), affine, atol=1e-6)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    before = path.read_bytes()
    loaded = load_itk_field(path)
    np.testing.assert_array_equal(loaded.disp, disp)
    save_itk_field(path, disp, affine)
    assert path.read_bytes() == before
    save_itk_field(tmp_path / "plain.nii", disp, affine)
    np.testing.assert_array_equal(load_itk_field(tmp_path / "plain.nii").disp, disp)
    with pytest.raises(ValueError, match="disp"):
        save_itk_field(path, disp[:2], affine)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", [sitk.sitkVectorFloat32, sitk.sitkVectorFloat64])
@pytest.mark.parametrize("suffix", ["1Warp.nii.gz", ".nii"])
def test_fields_that_itk_wrote_are_read(tmp_path: Path, kind: int, suffix: str) -> None:
    vectors = np.moveaxis(bumps((7, 8, 9), 2, 4, 1), 0, -1)
    image = sitk.Cast(sitk.GetImageFromArray(vectors.transpose(2, 1, 0, 3), isVector=True), kind)
    image.SetSpacing((1.5, 0.8, 1.1))
    image.SetOrigin((4, -5, 6))
    turn = sitk.Euler3DTransform((0, 0, 0), 0.2, -0.1, 0.3)
    image.SetDirection(turn.GetMatrix())
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(image, str(path))
    corners = [image.TransformContinuousIndexToPhysicalPoint(c) for c in product((-0.4, 6.4), (0, 7), (0, 8.4))]
    points = np.array(corners) * (-1, -1, 1)
    assert distance(map_points(load_transform(path), points), by_sitk(sitk_field(path), points)).max() < 1e-4


def test_intent_dispvect_is_ras_as_itk_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "xfm.nii"
    save_itk_field(path, bumps((7, 8, 9), 2, 4, 1), np.eye(4))
    content = bytearray(path.read_bytes())
    struct.pack_into("<h", content, 68, 1006)
    path.write_bytes(content)
    points = random_points((7, 8, 9), np.eye(4), 50, border=0.1)
    mapped = map_points(load_itk_field(path), points)
    assert distance(mapped, by_sitk(sitk_field(path), points)).max() < 1e-4
    struct.pack_into("<h", content, 68, 0)
    path.write_bytes(content)
    with pytest.raises(InputError, match="intent 0"):
        load_itk_field(path)


def test_what_is_no_field_is_refused_in_one_line(tmp_path: Path) -> None:
    def refuse(path: Path, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            load_transform(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    path = tmp_path / "xfm.nii"
    refuse(path, "no such file")
    save_itk_field(path, bumps((7, 8, 9), 2, 4, 1), np.eye(4))
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    refuse(path, "truncated")
    for data, match in (
        (np.zeros((7, 8, 9, 3), np.float32), "in voxels"),
        (np.zeros((7, 8, 9), np.float32), "the shape is"),
        (np.zeros((7, 8, 9, 1, 2), np.float32), "2 components"),
        (np.full((7, 8, 9, 1, 3), np.nan, np.float32), "NaN"),
    ):
        save_path = tmp_path / "other.nii"
        image = nibabel.Nifti1Image(data, np.eye(4))
        image.header.set_intent(1007)
        image.to_filename(save_path)
        refuse(save_path, match)


@pytest.mark.parametrize("save", [save_itk_field, save_affine_tfm])
def test_a_full_disk_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., None]
) -> None:
    path = tmp_path / ("xfm.nii.gz" if save is save_itk_field else "affine.tfm")
    fields = [(np.full((3, 4, 5, 6), value), np.eye(4)) for value in (1, 2)]
    args, replaced = fields if save is save_itk_field else [(np.eye(4),), (np.diag([2, 2, 2, 1]),)]
    save(path, *args)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        save(path, *replaced)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save(tmp_path / "file" / path.name, *args)


@pytest.mark.parametrize("suffix", [".tfm", ".txt"])
def test_affines_survive_and_others_read_them(tmp_path: Path, suffix: str) -> None:
    affine = case("oblique").composite.fixed_to_model
    path = tmp_path / f"from-fixed_to-model{suffix}"
    save_affine_tfm(path, affine)
    np.testing.assert_allclose(load_affine(path), affine, rtol=0, atol=1e-12)
    points = np.random.default_rng(0).uniform(-100, 100, (20, 3))
    assert distance(by_sitk(sitk.ReadTransform(str(path)), points), map_points(affine, points)).max() < 1e-9
    assert distance(Affine.from_filename(path, fmt="itk").map(points), map_points(affine, points)).max() < 1e-4
    save_affine_tfm(path, np.eye(4))
    assert "Parameters: 1.0 0.0 0.0 0.0 1.0 0.0 0.0 0.0 1.0 0.0 0.0 0.0\n" in path.read_text()


def _linear_transforms() -> dict[str, Any]:
    affine = sitk.AffineTransform(3)
    affine.SetMatrix((1.1, 0.1, 0, -0.05, 0.9, 0.02, 0, 0.3, 1))
    affine.SetTranslation((1.5, -20, 3))
    affine.SetCenter((10, 20, -30))
    euler = sitk.Euler3DTransform((1, 2, 3), 0.1, 0.2, 0.3, (4, 5, 6))
    return {
        "affine": affine,
        "euler": euler,
        "versor": sitk.VersorRigid3DTransform((0, 0, 1), 0.4, (5, 6, 7)),
        "similarity": sitk.Similarity3DTransform(1.2, (0, 1, 0), 0.3, (1, 2, 3)),
        "translation": sitk.TranslationTransform(3, (1, 2, 3)),
        "composite": sitk.CompositeTransform([affine, euler]),
    }


@pytest.mark.parametrize(
    ("kind", "suffix"),
    # ITK itself writes no composite transform as .mat
    [pair for pair in product(_linear_transforms(), (".tfm", ".mat", ".h5")) if pair != ("composite", ".mat")],
)
def test_linear_transforms_of_itk_are_read(tmp_path: Path, kind: str, suffix: str) -> None:
    transform = _linear_transforms()[kind]
    path = tmp_path / f"0GenericAffine{suffix}"
    sitk.WriteTransform(transform, str(path))
    points = np.random.default_rng(0).uniform(-100, 100, (20, 3))
    assert distance(map_points(load_transform(path), points), by_sitk(transform, points)).max() < 1e-9


def test_the_older_form_of_ants_is_read(tmp_path: Path) -> None:
    path = tmp_path / "Affine.txt"
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: MatrixOffsetTransformBase_double_3_3\n"
        "Parameters: 1 0.1 0 0 1.1 0 0 0 0.9 1 2 3\nFixedParameters: 4 5 6\n"
    )
    lps = np.array([[1, 0.1, 0], [0, 1.1, 0], [0, 0, 0.9]])
    point = np.array([-7.0, -8, 9])  # LPS: 7, 8, 9
    expected = (lps @ (np.array([7, 8, 9]) - (4, 5, 6)) + (4, 5, 6) + (1, 2, 3)) * (-1, -1, 1)
    np.testing.assert_allclose(map_points(load_affine(path), point[None])[0], expected, atol=1e-9)


def test_what_is_no_affine_is_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refuse(name: str, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            load_affine(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500

    refuse("missing.tfm", "no such file")
    for name in ("text.tfm", "text.mat", "text.h5", "text.xyz"):
        (tmp_path / name).write_text("hello")
        refuse(name, "not a readable ITK transform")
    (tmp_path / "empty.tfm").write_text("")
    refuse("empty.tfm", "not a readable ITK transform")
    sitk.WriteTransform(sitk.AffineTransform(2), str(tmp_path / "flat.tfm"))
    refuse("flat.tfm", "2-D")
    bent = sitk.BSplineTransformInitializer(sitk.Image((9, 9, 9), sitk.sitkUInt8), (2, 2, 2))
    sitk.WriteTransform(bent, str(tmp_path / "bent.tfm"))
    refuse("bent.tfm", "a 3-D affine is needed, this is a 3-D BSplineTransform")
    (tmp_path / "flat3.tfm").write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        "Parameters: 1 0 0 0 1 0 0 0 0 1 2 3\nFixedParameters: 0 0 0\n"
    )
    refuse("flat3.tfm", "cannot be inverted|not a readable")
    with pytest.raises(ValueError, match="matrix"):
        save_affine_tfm(tmp_path / "wrong.tfm", np.zeros((4, 4)))
    assert capfd.readouterr() == ("", "")
