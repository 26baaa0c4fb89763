"""The exact map of a registered pair: alignments and spline updates, evaluated at any point, nothing sampled."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, distance_transform_edt

from sitreg_lumir.deform.splines import TOLERANCE, SplineUpdates
from sitreg_lumir.geometry.transforms import AlignedMap, Points, look_up, transform_by

NEAR_MM = 10.0
"""Around the brain, where every voxel of a grid gets the exact map."""

Mask: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class SplineMap(AlignedMap):
    """``T(w) = A_m^-1 M phi(M^-1 A_f w)`` where ``phi`` is the composition of the continuous updates.

    It is inverse to :attr:`inverse` up to what the inversions of single updates leave, some 1e-5 voxel at the default
    tolerance, whatever grid or points it is evaluated on.

    Args:
        updates: of the pair.
        brain: ``(X, Y, Z)`` bool, the fixed brain on the model's grid.
        other_brain: ``(X, Y, Z)`` bool, the moving brain on the model's grid.
        inverted: whether ``phi`` is the updates' map of the moving grid into the fixed image.
        tolerance: of the inversions, voxels of the model's grid: a Newton step below it is the last; what is left after
            it is far smaller.

    Raises:
        NotInvertedError: where it is evaluated, an inversion did not converge; within their bound, it always does.
        ValueError: a matrix cannot be inverted, or a brain has another shape.

    Examples:
        >>> exact = sitreg_lumir.register("EXAMPLE-T1", "EXAMPLE-T2").forward
        >>> points = np.array([[10.0, -20.0, 5.0]])
        >>> back = sitreg_lumir.map_points(exact.inverse, sitreg_lumir.map_points(exact, points))
        >>> bool(abs(back - points).max() < 1e-3)
        True
    """

    updates: SplineUpdates
    brain: Mask
    other_brain: Mask
    inverted: bool = False
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, mask in (("brain", self.brain), ("other_brain", self.other_brain)):
            if mask.dtype != np.bool_ or mask.shape != self.grid_shape:
                raise ValueError(f"{name} must be bool {self.grid_shape}, got {mask.dtype} {mask.shape}")

    @property
    def inverse(self) -> "SplineMap":
        """The map from the moving world to the fixed world."""
        matrices = self.moving_to_model, self.fixed_to_model, self.model_affine
        return SplineMap(*matrices, self.updates, self.other_brain, self.brain, not self.inverted, self.tolerance)

    @cached_property
    def on_grids(self) -> "GridMap":
        """This map for whole grids: exact within 10 mm of the brain, and quick further out."""
        spacing = np.linalg.norm(self.model_affine[:3, :3], axis=0)
        near = distance_transform_edt(~self.brain, sampling=spacing) <= NEAR_MM if self.brain.any() else self.brain
        return GridMap(self.fixed_to_model, self.moving_to_model, self.model_affine, self, near)

    def deform(self, at: Points) -> Points:
        """The composed updates at positions ``(3, ...)``, voxels."""
        points = torch.from_numpy(np.ascontiguousarray(at.reshape(3, -1), dtype=np.float64))
        moved = self.updates.move(points, inverse=self.inverted, tolerance=self.tolerance).points
        return np.asarray(moved.numpy().reshape(at.shape))

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """``(X, Y, Z)`` of the model's grid."""
        return self.updates.shape

    @cached_property
    def disp(self) -> NDArray[np.float32]:
        """``(3, X, Y, Z)`` float32, voxels: samples of the deformation on the model's grid, in LUMIR's convention."""
        samples: NDArray[np.float32] = self.updates.sample(inverse=self.inverted).numpy()
        return samples

    def jacobian_determinant(self, world: Points) -> NDArray[np.float32]:
        """Local volume change of the deformation alone at points ``(3, ...)`` of the fixed world, RAS, mm.

        It is the derivative of the map itself, not of samples. NaN outside the model's grid.
        """
        at = transform_by(self.to_voxels, world)
        flat = torch.from_numpy(np.ascontiguousarray(at.reshape(3, -1)))
        size = torch.tensor(self.grid_shape)[:, None]
        within = ((flat >= -0.5) & (flat <= size - 0.5)).all(dim=0)
        result = torch.full((flat.shape[1],), torch.nan)
        jacobians = self.updates.move(
            flat[:, within], inverse=self.inverted, jacobians=True, tolerance=self.tolerance
        ).jacobians
        assert jacobians is not None
        result[within] = torch.linalg.det(jacobians.movedim(-1, 0)).float()
        return np.asarray(result.numpy().reshape(world.shape[1:]))


@dataclass(frozen=True, eq=False)
class GridMap(AlignedMap):
    """An exact map for the voxels of whole grids: itself near the brain, elsewhere its samples, interpolated.

    Which of them holds at a point depends on the point alone, so results do not depend on the grid.

    Args:
        exact: the map.
        near: ``(X, Y, Z)`` bool, where it is exact, on the model's grid.
    """

    exact: SplineMap
    near: Mask

    def deform(self, at: Points) -> Points:
        """The exact map near the brain, its interpolated samples elsewhere, at positions ``(3, ...)``, voxels."""
        flat = at.reshape(3, -1)
        close = self.is_near(flat)
        deformed = np.empty_like(flat)
        deformed[:, close] = self.exact.deform(flat[:, close])
        far = flat[:, ~close]
        deformed[:, ~close] = far + look_up(self.far_samples, far)
        return deformed.reshape(at.shape)

    @cached_property
    def far_samples(self) -> NDArray[np.float32]:
        """``(3, X, Y, Z)`` float32, voxels: of ``exact.disp`` those that positions further out look at, else 0."""
        needed = binary_dilation(~self.near, np.ones((3, 3, 3)), border_value=1)
        voxels = np.argwhere(needed).T.astype(np.float64)
        samples = np.zeros((3, *self.grid_shape), np.float32)
        samples[:, needed] = self.exact.deform(voxels) - voxels
        return samples

    def is_near(self, at: Points) -> Mask:
        """Which positions ``(3, N)``, voxels of the model's grid, lie near the brain."""
        last = np.array(self.near.shape)[:, None] - 1
        index = np.rint(at)
        within = ((index >= 0) & (index <= last)).all(axis=0)
        close: Mask = within & self.near[tuple(np.clip(index, 0, last).astype(np.intp))]
        return close

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """``(X, Y, Z)`` of the model's grid."""
        return self.exact.grid_shape
