"""Composite transforms for ITK: read by SimpleITK and nitransforms as the map itself, and read back."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
import torch
from transform_samples import by_sitk, distance, matrix

from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import map_points, transform_by
from sitreg_lumir.io.composite import load_composite, reaching_grid, save_composite

SHAPE = (20, 24, 16)
MODEL = matrix("RAS", (2, 2, 2), (0, 0, 0), SHAPE, (3, -5, 7))
FIXED = matrix(degrees=(9, -14, 20), centre=(4, 2, 1))  # an oblique scan's world -> the model's
MOVING = matrix(degrees=(-5, 8, 3), centre=(-3, 1, 2)) @ np.diag([1.1, 0.95, 1.05, 1.0])


@pytest.fixture(scope="module")
def exact() -> SplineMap:
    """A smooth map whose control points are a few mm large."""
    random = torch.Generator().manual_seed(0)
    updates = []
    for level in (2, 1, 0):
        size = [-(-length // 2**level) for length in SHAPE]
        scale = (0.8, 0.2, 0.02)[2 - level] * control_point_bound((2**level,) * 3)
        updates.append(tuple(scale * (2 * torch.rand(3, *size, generator=random) - 1) for _ in range(2)))
    whole = np.ones(SHAPE, np.bool_)
    return SplineMap(FIXED, MOVING, MODEL, SplineUpdates([(a, b) for a, b in updates], SHAPE), whole, whole)


def points_inside(exact: SplineMap) -> np.ndarray:
    voxels = np.random.default_rng(1).uniform(2, np.array(SHAPE) - 3, (400, 3))
    return transform_by(np.linalg.inv(exact.to_voxels), voxels.T).T


def test_clients_and_this_package_read_it_as_the_map(exact: SplineMap, tmp_path: Path) -> None:
    path = tmp_path / "xfm.h5"
    for direction in (exact, exact.inverse):
        save_composite(path, direction)
        points = points_inside(direction)
        expected = map_points(direction, points)
        moved = distance(
            expected, map_points([direction.fixed_to_model, np.linalg.inv(direction.moving_to_model)], points)
        )
        assert np.median(moved) > 0.5  # mm: the deformation counts
        theirs = by_sitk(sitk.ReadTransform(str(path)), points)
        assert np.median(distance(theirs, expected)) < 0.05
        np.testing.assert_allclose(map_points(load_composite(path), points), theirs, atol=1e-4)
        from nitransforms.manip import TransformChain

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            by_nitransforms = TransformChain.from_filename(path, fmt="itk").map(points)
        assert np.median(distance(np.asarray(by_nitransforms), expected)) < 0.1


def test_equal_maps_give_equal_bytes(exact: SplineMap, tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        save_composite(tmp_path / name, exact)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_it_reaches_as_far_as_the_scan(exact: SplineMap, tmp_path: Path) -> None:
    shape, spacing = (70, 40, 40), np.array([1.0, 2.0, 2.0])
    affine = np.linalg.inv(FIXED) @ matrix("LPI", tuple(spacing), (6, 3, 9), shape, (3, -5, 7))
    border = reaching_grid(exact.to_voxels @ affine, shape, spacing, SHAPE, 3.0)
    assert border.min() >= 0 and border.max() > 3
    save_composite(tmp_path / "xfm.h5", exact, border)
    corners = np.array([(x, y, z) for x in (0, 69) for y in (0, 39) for z in (0, 39)], float)
    world = transform_by(affine, corners.T).T
    theirs = by_sitk(sitk.ReadTransform(str(tmp_path / "xfm.h5")), world)
    assert distance(theirs, map_points(exact.on_grids, world)).max() < 0.5  # the border's displacement, not a jump


def test_other_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("nothing")
    for name in ("text.h5", "none.h5"):
        with pytest.raises(InputError, match=name):
            load_composite(tmp_path / name)
    sitk.WriteTransform(sitk.BSplineTransform(3, 3), str(tmp_path / "spline.h5"))
    with pytest.raises(InputError, match="affines and displacement fields"):
        load_composite(tmp_path / "spline.h5")
