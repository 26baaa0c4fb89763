"""A registered pair: the maps both ways, images warped by them, and the measures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sitreg_lumir.deform.jacobian import jacobian_determinant
from sitreg_lumir.geometry.resampling import resample, resample_labels
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import DisplacementField, Matrix, composite_field, map_points, slabs, transform_by
from sitreg_lumir.preprocessing.intensity import inverse
from sitreg_lumir.registration.model import Model
from sitreg_lumir.registration.scan import PlacedScan

if TYPE_CHECKING:
    from sitreg_lumir.report.pictures import Volumes

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Registration:
    """Two registered scans. In Jupyter it is shown as a picture with its numbers.

    Attributes:
        fixed: the fixed scan and its place in the model's world.
        moving: the moving scan and its place in the model's world.
        model: the members that registered them.
        forward: fixed world -> moving world, exact; brings the moving image onto the fixed grid.
        uncertainty_voxels: ``(X, Y, Z)``, voxels, model grid, on which the fixed image lies; None if not asked for.
        summary: the measures and the verdict, plain values; see ``summary.json``.

    Examples:
        >>> registration = sitreg_lumir.register("EXAMPLE-T1", "EXAMPLE-T2")
        >>> registration.warped.shape == registration.fixed.shape
        True
        >>> there = registration.transform_points([[10.0, -20.0, 5.0]], to="moving")
        >>> back = registration.transform_points(there, to="fixed")
        >>> bool(abs(back - [10.0, -20.0, 5.0]).max() < 1e-3)
        True
    """

    fixed: PlacedScan
    moving: PlacedScan
    model: Model
    forward: SplineMap
    uncertainty_voxels: Floats | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``ok``, ``check`` or ``failed``; the reasons are in the summary."""
        return str(self.summary.get("verdict", "check"))

    @cached_property
    def backward(self) -> SplineMap:
        """Moving world -> fixed world: the inverse of ``forward``."""
        return self.forward.inverse

    @property
    def disp(self) -> Floats:
        """``(3, X, Y, Z)``, voxels, model grid: samples of the deformation alone, in LUMIR's convention."""
        return self.forward.disp

    @property
    def disp_inv(self) -> Floats:
        """``(3, X, Y, Z)``, voxels, model grid: the inverse of ``disp``."""
        return self.backward.disp

    @cached_property
    def warped(self) -> Floats:
        """The moving image on the fixed grid, sampled once from the original; 0 outside its field of view."""
        fixed, moving = self.fixed, self.moving
        return resample(moving.data, moving.affine, self.forward.on_grids, fixed.shape, fixed.affine)

    @cached_property
    def warped_fixed(self) -> Floats:
        """The fixed image on the moving grid, sampled once from the original; 0 outside its field of view."""
        fixed, moving = self.fixed, self.moving
        return resample(fixed.data, fixed.affine, self.backward.on_grids, moving.shape, moving.affine)

    @cached_property
    def _field(self) -> DisplacementField:
        return _sample(self.forward, self.fixed.shape, self.fixed.affine)

    @cached_property
    def _field_inv(self) -> DisplacementField:
        return _sample(self.backward, self.moving.shape, self.moving.affine)

    def field_on(self, shape: tuple[int, int, int], affine: Matrix, *, to: str = "fixed") -> DisplacementField:
        """The map as a displacement field: exact at each voxel within 10 mm of the brain, interpolated further out.

        Args:
            shape: ``(X, Y, Z)`` of its grid.
            affine: ``(4, 4)`` the grid's voxel-to-world matrix, RAS, mm.
            to: ``fixed`` for a grid of the fixed world, ``moving`` for one of the moving world.
        """
        exact, scan = (self.forward, self.fixed) if self._is_fixed(to) else (self.backward, self.moving)
        if shape == scan.shape and np.array_equal(affine, scan.affine):
            return self._field if self._is_fixed(to) else self._field_inv
        return _sample(exact, shape, affine)

    def warp(self, image: NDArray[Any], affine: Matrix, *, to: str = "fixed", labels: bool = False) -> NDArray[Any]:
        """Warps another image or label map of one scan onto the grid of the other scan.

        Args:
            image: ``(X, Y, Z)`` or ``(X, Y, Z, T)``, in the world of the scan that it belongs to.
            affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm.
            to: ``fixed`` for images of the moving scan, ``moving`` for images of the fixed scan.
            labels: take the nearest voxel instead of interpolating.
        """
        field, scan = (self._field, self.fixed) if self._is_fixed(to) else (self._field_inv, self.moving)
        if labels:
            return resample_labels(image, affine, field, scan.shape, scan.affine)
        return resample(image, affine, field, scan.shape, scan.affine)

    def transform_points(self, points: NDArray[Any], *, to: str = "fixed") -> NDArray[np.float64]:
        """Points ``(N, 3)``, RAS, mm, of the one scan in the world of the other, ``to``."""
        return map_points(self.backward if self._is_fixed(to) else self.forward, points)

    @staticmethod
    def _is_fixed(to: str) -> bool:
        if to not in ("fixed", "moving"):
            raise ValueError(f"to must be fixed or moving, got {to!r}")
        return to == "fixed"

    def jacobian(self, *, with_alignment: bool = True) -> Floats:
        """Local volume change of the map from the fixed to the moving world, mm^3 per mm^3, on the fixed grid.

        Within 10 mm of the brain it is the derivative of the exact map, further out that of its samples.

        Args:
            with_alignment: whether alignments count; else the determinant of the deformation alone.

        Returns:
            ``(X, Y, Z)`` float32; NaN outside the model's grid.
        """
        determinant = self._jacobian_of_deformation.copy()
        if with_alignment:
            determinant *= np.linalg.det(self.forward.fixed_to_model) / np.linalg.det(self.forward.moving_to_model)
        return determinant

    @cached_property
    def _jacobian_of_deformation(self) -> Floats:
        determinant = self._from_model_grid(self._sampled_jacobian, outside=np.nan)
        for part, world in slabs(self.fixed.shape, self.fixed.affine):
            at = transform_by(self.forward.to_voxels, world).reshape(3, -1)
            close = self.forward.on_grids.is_near(at).reshape(world.shape[1:])
            determinant[part][close] = self.forward.jacobian_determinant(world[:, close])
        return determinant

    @cached_property
    def _sampled_jacobian(self) -> Floats:
        """The determinant by differences of the samples on the model's grid."""
        inner = jacobian_determinant(torch.from_numpy(self.disp)[None])[0].numpy()
        return np.pad(inner, 1, mode="edge")

    @cached_property
    def jacobian_on_model_grid(self) -> Floats:
        """The deformation's volume change ``(X, Y, Z)``, model grid; near the brain the exact map's own derivative."""
        determinant = self._sampled_jacobian.copy()
        near = self.forward.on_grids.near
        voxels = np.argwhere(near).T.astype(np.float64)
        determinant[near] = self.forward.jacobian_determinant(transform_by(inverse(self.forward.to_voxels), voxels))
        return determinant

    def uncertainty(self) -> Floats | None:
        """How far the members' own fields differ, mm, on the fixed grid ``(X, Y, Z)``; 0 outside the model's grid."""
        if self.uncertainty_voxels is None:
            return None
        return self._from_model_grid(self.uncertainty_voxels) * np.float32(self.model.spacing)

    def _from_model_grid(self, volume: NDArray[Any], outside: float = 0.0) -> Floats:
        """A volume of the model's grid on the fixed grid."""
        affine = self.forward.model_affine
        return resample(
            volume, affine, self.forward.fixed_to_model, self.fixed.shape, self.fixed.affine, outside=outside
        )

    def save(
        self,
        folder: str | Path,
        *,
        padding_mm: float = 0.0,
        report: bool = True,
        overwrite: bool = False,
        save: str | Sequence[str] | None = None,
    ) -> Path:
        """Writes the results, as the verb `register` does.

        Args:
            folder: made if it does not exist.
            padding_mm: border of the transforms beyond their image, mm.
            report: also write ``report.html``.
            overwrite: replace an earlier registration in the folder.
            save: which outputs, by their names, such as ``["warped", "jacobian"]`` or ``"default,fields"``; None for
                the default ones.

        Returns:
            the folder.

        Raises:
            InputError: the folder holds other files, or cannot be written, or an output's name is unknown.
        """
        from sitreg_lumir.registration.outputs import chosen_outputs
        from sitreg_lumir.registration.save import save_registration

        return save_registration(
            self, Path(folder), padding_mm=padding_mm, report=report, overwrite=overwrite, outputs=chosen_outputs(save)
        )

    def volumes(self) -> "Volumes":
        """The volumes that a report shows, on a 1 mm grid along the fixed scan's axes."""
        from sitreg_lumir.registration.pictures import picture_volumes

        return picture_volumes(self)

    def __repr__(self) -> str:
        return f"Registration({self.moving.name} onto {self.fixed.name}: {self.verdict})"

    def _repr_html_(self) -> str:
        from sitreg_lumir.registration.pictures import as_html

        return as_html(self)


def _sample(exact: SplineMap, shape: tuple[int, int, int], affine: Matrix) -> DisplacementField:
    return DisplacementField(composite_field(exact.on_grids, shape, affine), affine)
