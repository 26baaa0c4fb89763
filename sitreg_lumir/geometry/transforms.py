"""Maps from the fixed world to the moving world: alignments and deformation composed, fields, affines.

Everything here is in world coordinates, RAS, mm, float64. Matrices that map worlds take points of the fixed world to
the moving world, as a transform on disk does: it tells each fixed point where to look in the moving image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sitreg_lumir.deform.ops import interpolate

Matrix: TypeAlias = NDArray[np.float64]
Points: TypeAlias = NDArray[np.float64]

_POINTS_AT_ONCE = 1 << 19  # bounds the temporary arrays to some 50 MB
_ON_THE_EDGE = 1e-6  # voxels: rounding must not push a position out of a volume


@dataclass(frozen=True, eq=False)
class AlignedMap:
    """``T(w) = A_m^-1 M phi(M^-1 A_f w)``: what all maps of a registered pair have in common.

    Each image is aligned independently to the model's world; ``phi`` is the deformation on the model's grid, voxels.

    Args:
        fixed_to_model: ``A_f`` ``(4, 4)``, fixed world -> model world, RAS, mm.
        moving_to_model: ``A_m`` ``(4, 4)``, moving world -> model world, RAS, mm.
        model_affine: ``M`` ``(4, 4)``, model voxels -> model world, RAS, mm.

    Raises:
        ValueError: a matrix cannot be inverted.
    """

    fixed_to_model: Matrix
    moving_to_model: Matrix
    model_affine: Matrix

    def __post_init__(self) -> None:
        for name in ("fixed_to_model", "moving_to_model", "model_affine"):
            object.__setattr__(self, name, checked_matrix(getattr(self, name), name))

    @property
    def to_voxels(self) -> Matrix:
        """``(4, 4)``, fixed world -> voxels of the model's grid."""
        return _inverse(self.model_affine) @ self.fixed_to_model

    @property
    def to_moving(self) -> Matrix:
        """``(4, 4)``, voxels of the model's grid -> moving world."""
        return _inverse(self.moving_to_model) @ self.model_affine

    def deform(self, at: Points) -> Points:
        """``phi`` at positions ``(3, ...)``, voxels of the model's grid."""
        raise NotImplementedError

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """``(X, Y, Z)`` of the model's grid."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class CompositeTransform(AlignedMap):
    """Alignments, and a deformation that is sampled on the model's grid: ``phi(y) = y + u(clamp y)``.

    ``swap`` gives the transform of the other direction.

    Args:
        disp: ``u`` ``(3, X, Y, Z)`` float32, voxels, model grid, on which the fixed image lies. Outside the grid the
            border's displacement holds.

    Raises:
        ValueError: a matrix cannot be inverted, or ``disp`` has another form or holds NaN.
    """

    disp: NDArray[np.float32]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "disp", checked_disp(self.disp))

    def deform(self, at: Points) -> Points:
        """``y + u(clamp y)`` at positions ``(3, ...)``, voxels."""
        return at + look_up(self.disp, at)

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """``(X, Y, Z)`` of the model's grid."""
        x, y, z = self.disp.shape[1:]
        return x, y, z


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """A displacement field in world coordinates, as ITK has them: ``T(w) = w + u(w)``, and ``w`` outside its grid.

    Args:
        disp: ``(3, X, Y, Z)`` float32, mm, RAS.
        affine: ``(4, 4)`` voxel-to-world matrix of its grid, RAS, mm.

    Raises:
        ValueError: as ``CompositeTransform``.
    """

    disp: NDArray[np.float32]
    affine: Matrix

    def __post_init__(self) -> None:
        object.__setattr__(self, "affine", checked_matrix(self.affine, "affine"))
        object.__setattr__(self, "disp", checked_disp(self.disp))


Transform: TypeAlias = AlignedMap | DisplacementField | Matrix  # a Matrix: (4, 4), fixed world -> moving world, RAS, mm


def swap(transform: CompositeTransform, disp_inv: NDArray[np.float32]) -> CompositeTransform:
    """The transform from the moving world to the fixed world.

    Args:
        transform: from the fixed to the moving world.
        disp_inv: the inverse field ``(3, X, Y, Z)``, voxels, model grid.
    """
    return CompositeTransform(transform.moving_to_model, transform.fixed_to_model, transform.model_affine, disp_inv)


def map_points(
    transforms: Transform | Sequence[Transform],
    points: NDArray[Any],
    *,
    outside: Literal["identity", "nan"] = "identity",
) -> Points:
    """Points of the fixed world in the moving world.

    Args:
        transforms: one, or several of which the first is applied first (the order of ``antsApplyTransforms -t``).
        points: ``(N, 3)``, RAS, mm.
        outside: what a ``DisplacementField`` does to points outside its grid: nothing, or make them NaN. Grids
            reach half a voxel beyond the outermost voxel centres.

    Returns:
        ``(N, 3)`` float64, RAS, mm.

    Examples:
        >>> shift = np.eye(4)
        >>> shift[0, 3] = 5.0  # an affine: 5 mm to the right
        >>> sitreg_lumir.map_points(shift, [[10.0, -20.0, 5.0]])
        array([[ 15., -20.,   5.]])
    """
    positions_in = np.asarray(points, dtype=np.float64)
    if positions_in.ndim != 2 or positions_in.shape[1] != 3:
        raise ValueError(f"points must be (N, 3), got {positions_in.shape}")
    if outside not in ("identity", "nan"):
        raise ValueError(f"outside must be identity or nan, got {outside!r}")
    return np.ascontiguousarray(_map(as_list(transforms), np.ascontiguousarray(positions_in.T), outside == "nan").T)


def composite_field(
    transforms: Transform | Sequence[Transform], shape: Sequence[int], affine: Matrix
) -> NDArray[np.float32]:
    """What the transforms do at each voxel of a grid, as one field.

    Args:
        transforms: as in :func:`map_points`.
        shape: ``(X, Y, Z)`` of the grid, in the fixed world.
        affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm.

    Returns:
        ``(3, X, Y, Z)`` float32: displacements in mm, RAS.
    """
    composition = as_list(transforms)
    disp = np.empty((3, *shape), np.float32)
    for part, points in slabs(shape, affine):
        disp[:, part] = _map(composition, points) - points
    return disp


def positions(
    transforms: Sequence[Transform], shape: Sequence[int], affine: Matrix, into: Matrix, values: int = 1
) -> Iterator[tuple[slice, Points]]:
    """Slab by slab, where the voxels of a grid look in the moving image.

    Args:
        transforms: the first is applied first.
        shape: ``(X, Y, Z)`` of the grid, in the fixed world.
        affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm.
        into: ``(4, 4)`` voxel-to-world matrix of the moving image, RAS, mm.
        values: how many values per voxel the caller computes; slabs are the thinner, the more there are.

    Yields:
        planes of the first axis, and ``(3, planes, Y, Z)`` positions in voxels of the moving image.
    """
    to_voxels = _inverse(checked_matrix(into, "affine"))
    for part, points in slabs(shape, affine, values):
        yield part, transform_by(to_voxels, _map(transforms, points))


def slabs(shape: Sequence[int], affine: Matrix, values: int = 1) -> Iterator[tuple[slice, Points]]:
    """Slab by slab, planes of a grid's first axis and the world ``(3, planes, Y, Z)`` of their voxels, RAS, mm."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (X, Y, Z), got {tuple(shape)}")
    matrix = checked_matrix(affine, "affine")
    planes = max(1, _POINTS_AT_ONCE // (shape[1] * shape[2] * values))
    for first in range(0, shape[0], planes):
        part = slice(first, min(first + planes, shape[0]))
        axes = (np.arange(part.start, part.stop), np.arange(shape[1]), np.arange(shape[2]))
        yield part, transform_by(matrix, np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float64))


def look_up(values: NDArray[np.float32], at: Points) -> NDArray[np.float32]:
    """Trilinear, positions beyond the border at the border: ``(C, X, Y, Z)`` at ``(3, ...)`` voxels -> ``(C, ...)``."""
    grid = at.shape[1:] if at.ndim == 4 else (at[0].size, 1, 1)
    looked_up = interpolate(torch.from_numpy(values)[None], torch.from_numpy(at.reshape(1, 3, *grid)))
    return np.asarray(looked_up[0].numpy()).reshape(len(values), *at.shape[1:])


def inside(at: Points, shape: Sequence[int]) -> NDArray[np.bool_]:
    """Which positions ``(3, ...)``, voxels, lie in a volume: up to half a voxel beyond the outermost centres."""
    within = np.ones(at.shape[1:], dtype=np.bool_)
    for along, size in zip(at, shape, strict=True):
        within &= (along >= -0.5 - _ON_THE_EDGE) & (along < size - 0.5 + _ON_THE_EDGE)
    return within


def transform_by(matrix: Matrix, points: Points) -> Points:
    """Points ``(3, ...)`` by a ``(4, 4)`` matrix."""
    mapped = matrix[:3, :3] @ points.reshape(3, -1) + matrix[:3, 3:]
    return np.asarray(mapped.reshape(points.shape), dtype=np.float64)


def as_list(transforms: Transform | Sequence[Transform]) -> list[Transform]:
    """One or several transforms as a list, affines checked."""
    listed = [transforms] if isinstance(transforms, AlignedMap | DisplacementField | np.ndarray) else list(transforms)
    return [
        checked_matrix(transform, "affine") if isinstance(transform, np.ndarray) else transform for transform in listed
    ]


def checked_matrix(matrix: Any, name: str) -> Matrix:
    """A ``(4, 4)`` float64 matrix that can be inverted, with a last row of 0 0 0 1; else ValueError."""
    array = np.asarray(matrix, dtype=np.float64)
    affine = array.shape == (4, 4) and np.isfinite(array).all() and np.allclose(array[3], (0, 0, 0, 1))
    if not affine or np.linalg.det(array) == 0:
        raise ValueError(f"{name} must be an invertible (4, 4) affine matrix, got {array.tolist()}")
    return array


def checked_disp(disp: Any) -> NDArray[np.float32]:
    """A field ``(3, X, Y, Z)`` as float32 in one piece, free of NaN; else ValueError."""
    array = np.require(disp, np.float32, ["C", "W"])
    if array.ndim != 4 or array.shape[0] != 3 or array.size == 0:
        raise ValueError(f"disp must be (3, X, Y, Z), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("disp holds NaN or infinite values")
    return array


def _inverse(matrix: Matrix) -> Matrix:
    return np.asarray(np.linalg.inv(matrix), dtype=np.float64)


def _map(transforms: Sequence[Transform], points: Points, nan_outside: bool = False) -> Points:
    """Points ``(3, ...)`` through transforms, the first one first."""
    for transform in transforms:
        if isinstance(transform, AlignedMap):
            at = transform_by(transform.to_voxels, points)
            points = transform_by(transform.to_moving, transform.deform(at))
        elif isinstance(transform, DisplacementField):
            at = transform_by(_inverse(transform.affine), points)
            within = inside(at, transform.disp.shape[1:])
            points = points + np.where(within, look_up(transform.disp, at), np.nan if nan_outside else 0)
        else:
            points = transform_by(transform, points)
    return points
