"""The cubic B-spline: its values, the matrices that upsample control points, and the control point bound."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import ceil
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
Steps: TypeAlias = Sequence[tuple[int, bool]]
"""Which updates move points in which order, by their numbers, and whether it is their inverses."""


class Coefficients(NamedTuple):
    """Control points of all updates, in full-resolution voxels, those of the moving image before the fixed one's.

    Attributes:
        flat: ``(X + 4, Y + 4, Z + 4, 4)`` for each update, one behind the other: the border is repeated twice on every
            side, and a fourth component of 0 lets a control point fill a quarter of a vector.
        sizes: ``(X + 4, Y + 4, Z + 4)`` of each update.
        factors: spacing of each update's control points, full-resolution voxels.
        shape: ``(X, Y, Z)`` of the full-resolution grid.
    """

    flat: Tensor
    sizes: Sequence[tuple[int, int, int]]
    factors: Sequence[int]
    shape: Sequence[int]


def cubic_bspline(t: Array) -> Array:
    """Value of the cubic B-spline with support (-2, 2) at ``t`` (in knot spacings)."""
    t = np.abs(t)
    near = 2 / 3 - t**2 + t**3 / 2
    far = (2 - t) ** 3 / 6
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


@lru_cache(maxsize=256)
def _upsampling_weights(size: int, factor: int) -> Array:
    """``(size, ceil(size / factor))``: full-resolution samples as weighted sums of one axis' control points."""
    level_size = ceil(size / factor)
    t = (np.arange(size) + 0.5) / factor - 0.5
    first = np.floor(t).astype(int) - 1
    weights = np.zeros((size, level_size))
    for offset in range(4):
        index = first + offset
        np.add.at(
            weights, (np.arange(size), np.clip(index, 0, level_size - 1)), cubic_bspline(t - index)
        )  # border control points repeat outside the level grid
    return weights


@lru_cache(maxsize=256)
def upsampling_matrix(size: int, factor: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(size, ceil(size / factor))`` matrix from one axis' control points to full-resolution samples.

    The levels share the start edge of the volume: sample ``x`` lies at ``(x + 1/2) / factor - 1/2``.
    """
    return torch.as_tensor(_upsampling_weights(size, factor), dtype=dtype, device=device)


@lru_cache(maxsize=64)
def control_point_bound(factors: Sequence[int]) -> float:
    """Largest size of control points (level voxels, per component) that keeps every update invertible.

    With all components below it, the upsampled and trilinearly interpolated update is a contraction in
    the maximum norm, so the fixed-point inversion converges.

    Args:
        factors: upsampling factor of each axis, a tuple of positive integers.

    Source: Honkamaa & Marttinen, SITReg, Machine Learning for Biomedical Imaging 2024.
    """
    if not factors or any(factor < 1 for factor in factors):
        raise ValueError(f"factors must be positive integers, got {factors}")
    values, gradients = zip(*(_samples_and_gradients(factor) for factor in factors), strict=True)
    worst = 0.0
    for offsets in product(*(range(ceil((factor + 1) / 2)) for factor in factors)):
        total: Array = np.zeros(())
        for differenced_axis in range(len(factors)):
            term: Array = np.ones(())
            for axis, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
                sequence = gradients[axis] if axis == differenced_axis else values[axis]
                term = np.multiply.outer(term, sequence[offset::factor])
            total = total + term
        worst = max(worst, float(np.abs(total).sum()))
    return 1 / worst


def _samples_and_gradients(factor: int) -> tuple[Array, Array]:
    """One axis' B-spline at the sampling positions, and the gradients between them (per control point spacing)."""
    odd = factor % 2
    positions = -2 + (1 + odd) / (2 * factor) + np.arange(4 * factor - odd) / factor
    padded = np.concatenate([[0.0], cubic_bspline(positions), [0.0]])
    return padded[:-1], factor * np.diff(padded)
