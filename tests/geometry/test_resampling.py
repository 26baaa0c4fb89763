"""Images and labels move through the composite transform as SimpleITK and nitransforms move them through its file."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
from nitransforms.nonlinear import DenseFieldTransform
from nitransforms.resampling import apply
from scipy.ndimage import gaussian_filter
from transform_samples import CASES, Array, case, grid_points, matrix, saved, sitk_field, truth

from sitreg_lumir.geometry import transforms
from sitreg_lumir.geometry.resampling import resample, resample_labels
from sitreg_lumir.io.write import save_volume

TOLERANCE = 0.01  # mm
MODES: tuple[Any, Any] = ("linear", "nearest")


@pytest.mark.parametrize("name", CASES)
def test_sitk_and_nitransforms_resample_images_as_the_transform_does(tmp_path: Path, name: str) -> None:
    sample = case(name)
    saved(tmp_path / "xfm.nii.gz", sample)
    world = grid_points(sample.moving_shape, sample.moving).reshape(*sample.moving_shape, 3)
    image = 100 + (10 * np.sin(world / 7)).sum(axis=-1).astype(np.float32)  # at most 10 * sqrt(3) / 7 per mm
    save_volume(tmp_path / "moving.nii.gz", image, sample.moving)
    save_volume(tmp_path / "fixed.nii.gz", np.zeros(sample.fixed_shape, np.float32), sample.fixed)
    own = resample(image, sample.moving, sample.composite, sample.fixed_shape, sample.fixed)
    assert own.shape == sample.fixed_shape and own.dtype == np.float32
    moving, fixed = (sitk.ReadImage(str(tmp_path / f"{role}.nii.gz")) for role in ("moving", "fixed"))
    theirs = sitk.GetArrayFromImage(
        sitk.Resample(moving, fixed, sitk_field(tmp_path / "xfm.nii.gz"), sitk.sitkLinear, 0.0)
    ).T
    both = (own > 0) & (theirs > 0)
    assert both.mean() > 0.3
    assert ((own > 0) == (theirs > 0)).mean() > 0.99  # on the border, rounding decides
    limit = 10 * np.sqrt(3) / 7 * (0.15 if name == "coarse" else TOLERANCE)  # coarse: field samples lie elsewhere
    assert np.abs(own - theirs)[both].max() < limit
    transform = DenseFieldTransform.from_filename(tmp_path / "xfm.nii.gz", fmt="itk")
    reference = nibabel.load(tmp_path / "fixed.nii.gz")  # type: ignore[attr-defined]
    moved = apply(transform, nibabel.load(tmp_path / "moving.nii.gz"), reference=reference, order=1)  # type: ignore[attr-defined]
    place = (
        np.linalg.inv(sample.moving)
        @ np.c_[truth(sample.composite, grid_points(sample.fixed_shape, sample.fixed)), np.ones(own.size)].T
    )
    last = np.array(sample.moving_shape) - 1
    inner = (np.abs(place[:3].T - last / 2) < last / 2 - 0.05).all(axis=1)
    inner &= np.pad(np.ones(np.array(own.shape) - 2, bool), 1).ravel()  # nor what lies on a field's last samples
    difference = np.abs(own - np.asarray(moved.dataobj)).ravel()[inner]  # nitransforms knows no outer half voxel
    assert inner.mean() > 0.2 and difference.max() < limit


def test_resampling_onto_the_own_grid_changes_nothing() -> None:
    image = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    affine = matrix("PIR", (1, 2, 0.5), (10, 5, 3), (5, 6, 7))
    np.testing.assert_allclose(resample(image, affine, [], image.shape, affine), image, atol=1e-5)
    np.testing.assert_array_equal(resample(image, affine, [], image.shape, affine, interpolation="nearest"), image)
    reordered = np.ascontiguousarray(image.transpose(2, 0, 1)[::-1])  # the same volume, other axes
    permuted = affine @ np.array([[0, 1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 6], [0, 0, 0, 1]])
    np.testing.assert_allclose(resample(reordered, permuted, [], image.shape, affine), image, atol=1e-5)


def test_a_volume_reaches_half_a_voxel_beyond_its_centres_as_in_itk() -> None:
    image = (np.arange(60, dtype=np.float32) + 1).reshape(3, 4, 5)
    shape, affine = (15, 8, 9), matrix("RAS", (0.4, 1, 1), (0, 0, 0), (15, 8, 9), (1, 1.5, 2))
    own = {mode: resample(image, np.eye(4), [], shape, affine, interpolation=mode, outside=-5) for mode in MODES}
    moving = sitk.GetImageFromArray(image.T)
    moving.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # LPS of the RAS identity
    reference = sitk.Image(shape, sitk.sitkFloat32)
    reference.SetSpacing((0.4, 1, 1))
    reference.SetOrigin((affine[:3, 3] * (-1, -1, 1)).tolist())
    reference.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    for mode, kind in zip(MODES, (sitk.sitkLinear, sitk.sitkNearestNeighbor), strict=True):
        theirs = sitk.GetArrayFromImage(sitk.Resample(moving, reference, sitk.Transform(), kind, -5.0)).T
        np.testing.assert_allclose(own[mode], theirs, atol=1e-4)
        assert (own[mode] == -5).any() and (own[mode] > 0).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slab", [1 << 19, 500])
def test_frames_move_alike(monkeypatch: pytest.MonkeyPatch, mode: Any, slab: int) -> None:
    sample = case("anisotropic")
    monkeypatch.setattr(transforms, "_POINTS_AT_ONCE", slab)
    frames = np.random.default_rng(0).integers(0, 4000, (*sample.moving_shape, 3)).astype(np.int16)
    args = (sample.moving, sample.composite, sample.fixed_shape, sample.fixed)
    together = resample(frames, *args, interpolation=mode)
    assert together.dtype == (np.int16 if mode == "nearest" else np.float32)
    for index in range(3):
        np.testing.assert_array_equal(together[..., index], resample(frames[..., index], *args, interpolation=mode))


def label_map(shape: tuple[int, ...]) -> Array:
    """Some compact regions with the labels 0, 3, 17 and 2035."""
    noise = [gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2) for seed in range(4)]
    return np.array([0, 3, 17, 2035], np.int32)[np.argmax(noise, axis=0)]


def test_labels_by_nearest_neighbour_equal_sitk(tmp_path: Path) -> None:
    sample = case("oblique")
    saved(tmp_path / "xfm.nii.gz", sample)
    labels = label_map(sample.moving_shape)
    save_volume(tmp_path / "labels.nii.gz", labels, sample.moving)
    own = resample_labels(labels, sample.moving, sample.composite, sample.fixed_shape, sample.fixed)
    assert own.dtype == np.int32 and set(np.unique(own)) == {0, 3, 17, 2035}
    save_volume(tmp_path / "fixed.nii.gz", np.zeros(sample.fixed_shape, np.uint8), sample.fixed)
    reference = sitk.ReadImage(str(tmp_path / "fixed.nii.gz"))
    theirs = sitk.Resample(
        sitk.ReadImage(str(tmp_path / "labels.nii.gz")),
        reference,
        sitk_field(tmp_path / "xfm.nii.gz"),
        sitk.sitkNearestNeighbor,
    )
    assert (own == sitk.GetArrayFromImage(theirs).T).mean() > 0.999  # where two voxels are equally near, either


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_linear_labels_are_the_arg_max_of_each_labels_own_map(dtype: Any) -> None:
    sample = case("turned")
    labels = (label_map(sample.moving_shape) % 251).astype(dtype)
    args = (sample.moving, sample.composite, sample.fixed_shape, sample.fixed)
    own = resample_labels(labels, *args, interpolation="linear")
    assert own.dtype == dtype
    values = np.unique(labels)
    shares = np.stack([resample((labels == value).astype(np.float32), *args) for value in values])
    ordered = np.sort(shares, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-4
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(own[clear], values[shares.argmax(axis=0)][clear])
    np.testing.assert_array_equal(own[ordered[-1] == 0], 0)  # where the map does not reach


def test_of_equal_shares_the_smallest_label_wins() -> None:
    labels = np.array([7, 5, 5, 9], np.uint8).reshape(4, 1, 1) * np.ones((1, 3, 3), np.uint8)
    affine = np.diag([0.5, 1, 1, 1])
    own = resample_labels(labels, np.eye(4), [], (7, 3, 3), affine, interpolation="linear")
    np.testing.assert_array_equal(own[:, 1, 1], [7, 5, 5, 5, 5, 5, 9])


def test_resampling_refuses_wrong_arguments() -> None:
    image = np.zeros((3, 3, 3))
    for wrong, match in ((image[0], "X, Y, Z"), (np.zeros((3, 3, 3, 2, 2)), "X, Y, Z")):
        with pytest.raises(ValueError, match=match):
            resample(wrong, np.eye(4), [], (2, 2, 2), np.eye(4))
    with pytest.raises(ValueError, match="interpolation"):
        resample(image, np.eye(4), [], (2, 2, 2), np.eye(4), interpolation="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        resample(image, np.eye(4), [], (2, 2), np.eye(4))
    with pytest.raises(ValueError, match="labels"):
        resample_labels(image[..., None], np.eye(4), [], (2, 2, 2), np.eye(4))
