"""The composite transform is its formula whatever the grids look like, swaps, and follows on other transforms."""

import numpy as np
import pytest
import torch
from transform_samples import CASES, case, distance, grid_points, matrix, random_points, truth

from sitreg_lumir.deform.backends import use_backend
from sitreg_lumir.deform.backends.cpu import backend as cpu_backend
from sitreg_lumir.deform.ops import invert
from sitreg_lumir.geometry import transforms
from sitreg_lumir.geometry.transforms import CompositeTransform, DisplacementField, composite_field, map_points, swap
from sitreg_lumir.io.itk import field_grid


@pytest.mark.parametrize("name", CASES)
def test_the_composite_transform_is_its_formula(name: str) -> None:
    sample = case(name)
    points = random_points(sample.fixed_shape, sample.fixed, 500, border=-8)  # far beyond the model's grid, too
    mapped = map_points(sample.composite, points)
    assert mapped.dtype == np.float64
    assert distance(mapped, truth(sample.composite, points)).max() < 1e-5
    assert distance(mapped, points).max() > 5  # it does something


def test_a_forced_backend_computes_composite_transforms_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = case("oblique")
    points = random_points(sample.fixed_shape, sample.fixed, 50, border=-8)
    expected = map_points(sample.composite, points)

    def refuse(*_: object) -> None:
        raise AssertionError("the compiled loops were called")

    monkeypatch.setattr(cpu_backend, "interpolate", refuse)
    with pytest.raises(AssertionError, match="compiled loops"):
        map_points(sample.composite, points)
    with use_backend("torch"):
        assert distance(map_points(sample.composite, points), expected).max() < 1e-5


def test_swapped_transform_and_inverse_field_lead_back() -> None:
    sample = case("oblique")
    disp_inv = invert(torch.from_numpy(sample.composite.disp)[None], tolerance=1e-5)[0].numpy()
    points = random_points(sample.fixed_shape, sample.fixed, 500)
    mapped = map_points(sample.composite, points)
    back = map_points(swap(sample.composite, disp_inv), mapped)
    error = distance(back, points)
    assert np.median(error) < 0.05 and error.max() < 0.5  # a field's inverse on its grid is not exact between voxels
    assert distance(map_points([sample.composite, swap(sample.composite, disp_inv)], points), back).max() == 0


def test_without_deformation_the_transform_is_an_affine() -> None:
    sample = case("turned")
    still = CompositeTransform(
        sample.composite.fixed_to_model,
        sample.composite.moving_to_model,
        sample.composite.model_affine,
        0 * sample.composite.disp,
    )
    affine = np.linalg.inv(sample.composite.moving_to_model) @ sample.composite.fixed_to_model
    points = random_points(sample.fixed_shape, sample.fixed, 50)
    assert distance(map_points(still, points), map_points(affine, points)).max() < 1e-9


def test_composite_field_is_the_transform_at_each_voxel_in_any_number_of_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = case("anisotropic")
    whole = composite_field(sample.composite, sample.fixed_shape, sample.fixed)
    assert whole.dtype == np.float32 and whole.shape == (3, *sample.fixed_shape)
    points = grid_points(sample.fixed_shape, sample.fixed)
    assert distance(points + whole.reshape(3, -1).T, truth(sample.composite, points)).max() < 1e-5
    monkeypatch.setattr(transforms, "_POINTS_AT_ONCE", 700)  # two planes and a rest
    np.testing.assert_array_equal(composite_field(sample.composite, sample.fixed_shape, sample.fixed), whole)
    monkeypatch.setattr(transforms, "_POINTS_AT_ONCE", 1)
    np.testing.assert_array_equal(composite_field(sample.composite, sample.fixed_shape, sample.fixed), whole)


def test_several_transforms_are_applied_from_the_first_to_the_last() -> None:
    sample = case("oblique")
    field = DisplacementField(composite_field(sample.composite, sample.fixed_shape, sample.fixed), sample.fixed)
    affine = matrix(spacing=(1.1, 0.9, 1), degrees=(10, 0, 0), centre=(3, 4, 5))
    points = random_points(sample.fixed_shape, sample.fixed, 100)
    expected = map_points(affine, map_points(field, points))
    assert distance(map_points([field, affine], points), expected).max() == 0
    assert distance(map_points([affine, field], points), expected).max() > 0.1
    assert distance(map_points([], points), points).max() == 0


def test_outside_a_field_points_stay_or_become_nan() -> None:
    field = DisplacementField(np.ones((3, 4, 5, 6), np.float32), np.diag([2.0, 2, 2, 1]))
    points = np.array([[0, 0, 0], [-0.9, 0, 0], [-1.1, 0, 0], [6.9, 8.9, 10.9], [7.1, 0, 0], [np.nan, 0, 0]])
    moved = np.array([True, True, False, True, False, False])
    identity = map_points(field, points)
    np.testing.assert_allclose(identity[moved], points[moved] + 1)
    np.testing.assert_array_equal(identity[[2, 4]], points[[2, 4]])
    gone = map_points(field, points, outside="nan")
    np.testing.assert_array_equal(np.isnan(gone).all(axis=1), ~moved)
    np.testing.assert_allclose(gone[moved], points[moved] + 1)


def test_wrong_arrays_are_programmers_mistakes() -> None:
    disp = np.zeros((3, 4, 4, 4), np.float32)
    with pytest.raises(ValueError, match="fixed_to_model"):
        CompositeTransform(np.zeros((4, 4)), np.eye(4), np.eye(4), disp)
    with pytest.raises(ValueError, match=r"\(3, X, Y, Z\)"):
        DisplacementField(disp[:2], np.eye(4))
    with pytest.raises(ValueError, match="NaN"):
        DisplacementField(disp + np.nan, np.eye(4))
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        map_points(np.eye(4), np.zeros(3))
    with pytest.raises(ValueError, match="outside"):
        map_points(np.eye(4), np.zeros((1, 3)), outside="border")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="affine"):
        map_points([np.eye(3)], np.zeros((1, 3)))
    with pytest.raises(ValueError, match="padding_mm"):
        field_grid((2, 2, 2), np.eye(4), -1)
