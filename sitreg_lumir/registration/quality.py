"""Measures of a registration's quality: similarity, inverse error, coverage, displacement, uncertainty."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sitreg_lumir.deform.ops import warp
from sitreg_lumir.deform.sums import exact_mean
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import AlignedMap, Matrix, inside, map_points, transform_by
from sitreg_lumir.losses import warped_lncc
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.preprocessing.intensity import Mask, inverse

_MIND = Mind()
_APART_MM = 12.0  # brains shifted by as much do not match anywhere
_POINTS = 50_000  # of the brain, at most


def similarities(
    fixed: Tensor, moving: Tensor, fixed_brain: Tensor, moving_brain: Tensor, disp: Tensor | None, spacing: float
) -> dict[str, float]:
    """Measures how similar the fixed and the warped moving image are, on the model's grid.

    Args:
        fixed: ``(1, 1, X, Y, Z)``, intensity in [0, 1].
        moving: ``(1, 1, X, Y, Z)``, intensity in [0, 1].
        fixed_brain: ``(1, 1, X, Y, Z)``, bool.
        moving_brain: ``(1, 1, X, Y, Z)``, bool.
        disp: ``(1, 3, X, Y, Z)``, voxels; None for no deformation.
        spacing: voxel size, mm.

    Returns:
        ``mind``: mean absolute difference of the MIND descriptors within both brains, lower is better, any contrast;
        ``mind_by_chance``: this difference with the images shifted by 12 mm, mean over six directions: the value of
        unmatched brains;
        ``lncc``: mean squared local correlation, higher is better; ``brain_overlap``: Dice coefficient of the brains.
    """
    with torch.inference_mode():
        if disp is None:
            disp = torch.zeros(1, 3, *fixed.shape[2:])
        warped = warp(moving, disp)
        brain = warp(moving_brain.float(), disp) >= 0.5
        both = brain & fixed_brain
        size = int(both.sum())
        of_fixed, of_warped = _MIND(fixed), _MIND(warped)
        step = max(1, round(_APART_MM / spacing))
        chance = [
            _difference(of_fixed, of_warped.roll(sign * step, axis), fixed_brain & brain.roll(sign * step, axis))
            for axis in (2, 3, 4)
            for sign in (1, -1)
        ]
        return {
            "mind": _difference(of_fixed, of_warped, both),
            "mind_by_chance": float(np.mean(chance)),
            "lncc": -float(warped_lncc(disp, fixed, moving, fixed_brain, moving_brain)),
            "brain_overlap": 2 * size / max(1, int(brain.sum()) + int(fixed_brain.sum())),
        }


def _difference(first: Tensor, second: Tensor, mask: Tensor) -> float:
    """Mean absolute difference of descriptors ``(1, 6, X, Y, Z)`` within a mask; NaN if it is empty."""
    apart = (first - second).abs().mean(dim=1, keepdim=True)[mask]
    return float(exact_mean(apart)) if apart.numel() else math.nan


def brain_points(brain: Mask, affine: Matrix) -> NDArray[np.float64]:
    """World positions ``(N, 3)``, RAS, mm, of brain voxels on a regular grid."""
    step = max(1, math.ceil((brain.sum() / _POINTS) ** (1 / 3)))
    where = np.argwhere(brain[::step, ::step, ::step]) * step
    return transform_by(affine, where.T.astype(np.float64)).T


def inverse_error(forward: AlignedMap, backward: AlignedMap, points: NDArray[np.float64]) -> dict[str, float]:
    """Distances, mm, between points of the fixed world ``(N, 3)`` and where both maps in turn bring them."""
    mapped = map_points(forward, points)
    apart = np.linalg.norm(map_points(backward, mapped) - points, axis=1)
    return {
        "median": float(np.median(apart)),
        "p99": float(np.percentile(apart, 99)),
        "largest": float(apart.max()),
    }


def folded_percent(exact: SplineMap, brain: Mask) -> float:
    """Volume that the map itself folds, by its own derivative at the brain's voxels, percent of the brain.

    Differences of samples on the model's grid tell more where the map is steep between them: that is no folding.

    Args:
        exact: the map.
        brain: ``(X, Y, Z)`` bool, on the model's grid.
    """
    voxels = np.argwhere(brain).T.astype(np.float64)
    determinant = exact.jacobian_determinant(transform_by(inverse(exact.to_voxels), voxels))
    return float(100 * np.maximum(-determinant, 0).mean()) if determinant.size else math.nan


def coverage(
    forward: AlignedMap, points: NDArray[np.float64], shape: tuple[int, int, int], moving_affine: Matrix
) -> dict[str, float]:
    """Shares (0..1) of the fixed brain's points ``(N, 3)`` in the model's grid, and in the moving scan's field of view.

    Args:
        forward: fixed world -> moving world.
        points: ``(N, 3)`` of the fixed brain, RAS, mm.
        shape: ``(X, Y, Z)`` of the moving scan.
        moving_affine: ``(4, 4)`` voxel-to-world matrix of the moving scan, RAS, mm.
    """
    to_model = inverse(forward.model_affine) @ forward.fixed_to_model
    to_moving = inverse(moving_affine)
    return {
        "in_model_grid": float(inside(transform_by(to_model, points.T), forward.grid_shape).mean()),
        "seen_by_other": float(inside(transform_by(to_moving, map_points(forward, points).T), shape).mean()),
    }


def displacement(forward: AlignedMap, points: NDArray[np.float64]) -> dict[str, float]:
    """Distances, mm of the model's world, by which the deformation alone moves points ``(N, 3)`` of the fixed brain."""
    start = transform_by(forward.to_voxels, points.T)
    moved = np.linalg.norm(forward.model_affine[:3, :3] @ (forward.deform(start) - start), axis=0)
    return {"median": float(np.median(moved)), "p95": float(np.percentile(moved, 95)), "largest": float(moved.max())}


def uncertainty_in_brain(values: NDArray[np.float32], brain: Mask, spacing: float) -> dict[str, float]:
    """Median and 95th percentile, mm, of how far members' own fields differ, ``(X, Y, Z)``, voxels, in the brain."""
    inside_brain = values[brain] * spacing
    return {"median": float(np.median(inside_brain)), "p95": float(np.percentile(inside_brain, 95))}
