"""Pairs of grids, a composite transform between them, its formula written out, and other readers of its files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 (its usual name)
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

from sitreg_lumir.geometry.transforms import CompositeTransform, composite_field
from sitreg_lumir.io.itk import field_grid, save_itk_field

Array = NDArray[Any]


def matrix(
    axes: str = "RAS",
    spacing: tuple[float, ...] = (1, 1, 1),
    degrees: tuple[float, float, float] = (0, 0, 0),
    shape: tuple[int, ...] = (1, 1, 1),
    centre: tuple[float, float, float] = (0, 0, 0),
) -> Array:
    """Voxel-to-world matrix of a rotated grid with its middle at ``centre``, axes towards the given directions."""
    flips = np.zeros((3, 3))
    for column, letter in enumerate(axes):
        row = next(index for index, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        flips[row, column] = 1 if letter in "RAS" else -1
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        plane_rotation = np.eye(3)
        plane_rotation[first, first] = plane_rotation[second, second] = np.cos(angle)
        plane_rotation[first, second], plane_rotation[second, first] = -np.sin(angle), np.sin(angle)
        turn = plane_rotation @ turn
    result = np.eye(4)
    result[:3, :3] = turn @ flips @ np.diag(spacing)
    result[:3, 3] = centre - result[:3, :3] @ (np.array(shape) - 1) / 2
    return result


@dataclass
class Case:
    fixed_shape: tuple[int, int, int]
    fixed: Array
    moving_shape: tuple[int, int, int]
    moving: Array
    composite: CompositeTransform


def bumps(shape: tuple[int, ...], sigma: float, amplitude: float, seed: int) -> Array:
    noise = np.random.default_rng(seed).normal(size=(3, *shape))
    smooth = np.stack([gaussian_filter(component, sigma, mode="nearest") for component in noise])
    return (amplitude * smooth / np.abs(smooth).max()).astype(np.float32)


def case(name: str) -> Case:
    """A pair of grids some 20 mm wide and a composition of affines (rotation, scale, shear) and a 3 mm deformation."""
    grids = {
        "plain": (("RAS", (1, 1, 1), (0, 0, 0)), ("RAS", (1, 1, 1), (0, 0, 0))),
        "oblique": (("RAS", (1, 1, 1), (15, -8, 20)), ("RAS", (1, 1, 1), (-5, 12, 3))),
        "anisotropic": (("RAS", (0.7, 1, 0.9), (3, 2, 1)), ("LPI", (1.3, 0.9, 2.0), (0, 0, -6))),
        "flipped": (("LAS", (1, 1, 1), (0, 0, 0)), ("PIR", (1, 1, 1.2), (0, 0, 0))),
        "turned": (("PIR", (1, 0.8, 1), (4, 5, 6)), ("ASL", (0.8, 0.8, 0.8), (25, 0, 0))),
        "coarse": (("LPS", (1.3, 0.9, 2.0), (7, 0, 9)), ("RAS", (1, 1, 1), (0, 0, 0))),
    }
    (fixed, moving), model_shape = grids[name], (24, 26, 22)
    fixed_shape, moving_shape = (20, 18, 16), (22, 24, 19)
    affines = []
    for seed in (0, 1):
        affine = matrix(degrees=(6, -4, 3) if seed else (-3, 5, 8), centre=(2, -1, 3) if seed else (-4, 2, 0))
        affine[:3, :3] @= np.eye(3) + np.random.default_rng(seed).uniform(-0.06, 0.06, (3, 3))
        affines.append(affine)
    model = matrix(shape=model_shape, centre=(1, -17, 19))
    home = [np.linalg.solve(affine, (1, -17, 19, 1))[:3] for affine in affines]  # each image around the model's middle
    return Case(
        fixed_shape,
        matrix(*fixed, fixed_shape, tuple(home[0])),
        moving_shape,
        matrix(*moving, moving_shape, tuple(home[1])),
        CompositeTransform(affines[0], affines[1], model, bumps(model_shape, 3, 3, 7)),
    )


CASES = ("plain", "oblique", "anisotropic", "flipped", "turned", "coarse")


def grid_points(shape: tuple[int, ...], affine: Array) -> Array:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    return index @ affine[:3, :3].T + affine[:3, 3]


def random_points(shape: tuple[int, ...], affine: Array, count: int, border: float = 0.0) -> Array:
    """Points within a volume, ``border`` voxels away from its outer faces."""
    place = np.random.default_rng(3).uniform(border - 0.5, np.array(shape) - 0.5 - border, (count, 3))
    return place @ affine[:3, :3].T + affine[:3, 3]


def truth(composite: CompositeTransform, points: Array) -> Array:
    """T(w) = A_m^-1 M phi(M^-1 A_f w), written out once more, with scipy's interpolation."""
    world = np.c_[points, np.ones(len(points))].T
    at = (np.linalg.inv(composite.model_affine) @ composite.fixed_to_model @ world)[:3]
    u = [map_coordinates(component.astype(np.float64), at, order=1, mode="nearest") for component in composite.disp]
    moved = np.r_[at + u, np.ones((1, at.shape[1]))]
    return (np.linalg.inv(composite.moving_to_model) @ composite.model_affine @ moved)[:3].T


def by_sitk(transform: Any, points: Array) -> Array:
    flip = np.array([-1, -1, 1])
    return np.array([transform.TransformPoint(point) for point in (points * flip).tolist()]) * flip


def sitk_field(path: Path) -> Any:
    return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))


def distance(a: Array, b: Array) -> Array:
    return np.linalg.norm(a - b, axis=-1)


def saved(path: Path, sample: Case, padding: float = 0.0) -> tuple[tuple[int, int, int], Array]:
    shape, affine = field_grid(sample.fixed_shape, sample.fixed, padding)
    save_itk_field(path, composite_field(sample.composite, shape, affine), affine)
    return shape, affine
