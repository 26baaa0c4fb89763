"""A registered pair: the maps both ways, images moved by them, and what was measured."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sitreg_lumir.deform.jacobian import jacobian_determinant
from sitreg_lumir.files.chain import Chain, Matrix, map_points
from sitreg_lumir.files.resample import resample, resample_labels
from sitreg_lumir.registration.model import Model
from sitreg_lumir.registration.sides import Side

if TYPE_CHECKING:
    from sitreg_lumir.report.pictures import Volumes

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Registration:
    """Two registered scans. In Jupyter it shows a picture and the numbers by itself.

    Attributes:
        fixed: the fixed scan and its place in the model's world.
        moving: the moving scan and its place.
        model: what registered them.
        forward: fixed world -> moving world; brings the moving image onto the fixed grid.
        backward: moving world -> fixed world.
        disagreement_voxels: ``(X, Y, Z)``, voxels, model grid, on which the fixed image lies; None for one network.
        summary: what was measured, plain values; see ``summary.json``.

    Examples:
        >>> registration = sitreg_lumir.register("EXAMPLE-T1", "EXAMPLE-T2")
        >>> registration.warped.shape == registration.fixed.shape
        True
        >>> there = registration.transform_points([[10.0, -20.0, 5.0]], to="moving")
        >>> back = registration.transform_points(there, to="fixed")
        >>> bool(abs(back - [10.0, -20.0, 5.0]).max() < 0.5)
        True
    """

    fixed: Side
    moving: Side
    model: Model
    forward: Chain
    backward: Chain
    disagreement_voxels: Floats | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``ok``, ``check`` or ``failed``; the reasons are in the summary."""
        return str(self.summary.get("verdict", "check"))

    @property
    def disp(self) -> Floats:
        """``(3, X, Y, Z)``, voxels, model grid: the deformation alone, in LUMIR's convention."""
        return self.forward.disp

    @property
    def disp_inv(self) -> Floats:
        """The same with the roles swapped."""
        return self.backward.disp

    @cached_property
    def warped(self) -> Floats:
        """The moving image on the fixed grid, sampled once from the original; 0 where it does not reach."""
        return resample(self.moving.data, self.moving.affine, self.forward, self.fixed.shape, self.fixed.affine)

    @cached_property
    def warped_fixed(self) -> Floats:
        """The fixed image on the moving grid, sampled once from the original; 0 where it does not reach."""
        return resample(self.fixed.data, self.fixed.affine, self.backward, self.moving.shape, self.moving.affine)

    def warp(self, image: NDArray[Any], affine: Matrix, *, to: str = "fixed", labels: bool = False) -> NDArray[Any]:
        """Another image or label map of the same scans on the grid of the fixed or the moving scan.

        Args:
            image: ``(X, Y, Z)`` or ``(X, Y, Z, T)``, in the world of the scan that it goes with.
            affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm.
            to: ``fixed`` for what belongs to the moving scan, ``moving`` for what belongs to the fixed one.
            labels: take the nearest voxel instead of interpolating.
        """
        chain, side = (self.forward, self.fixed) if self._is_fixed(to) else (self.backward, self.moving)
        if labels:
            return resample_labels(image, affine, chain, side.shape, side.affine)
        return resample(image, affine, chain, side.shape, side.affine)

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

        Args:
            with_alignment: of the whole map; else of the deformation alone.

        Returns:
            ``(X, Y, Z)`` float32; NaN outside the model's grid.
        """
        inner = jacobian_determinant(torch.from_numpy(self.disp)[None])[0].numpy()
        whole = np.pad(inner, 1, mode="edge")
        found = self._from_model_grid(whole, outside=np.nan)
        if with_alignment:
            found *= np.linalg.det(self.forward.fixed_to_model) / np.linalg.det(self.forward.moving_to_model)
        return found

    def disagreement(self) -> Floats | None:
        """How far the members' updates differ, mm, on the fixed grid ``(X, Y, Z)``; 0 outside the model's grid."""
        if self.disagreement_voxels is None:
            return None
        return self._from_model_grid(self.disagreement_voxels) * np.float32(self.model.spacing)

    def _from_model_grid(self, volume: NDArray[Any], outside: float = 0.0) -> Floats:
        """A volume of the model's grid on the fixed grid."""
        affine = self.forward.model_affine
        return resample(
            volume, affine, self.forward.fixed_to_model, self.fixed.shape, self.fixed.affine, outside=outside
        )

    def save(
        self, folder: str | Path, *, padding_mm: float = 0.0, report: bool = True, overwrite: bool = False
    ) -> Path:
        """Writes all results, as the verb `register` does.

        Args:
            folder: made if it is not there.
            padding_mm: border of the transforms beyond their image, mm.
            report: also write ``report.html``.
            overwrite: replace an earlier registration in the folder.

        Returns:
            the folder.

        Raises:
            InputError: the folder holds other things, or cannot be written.
        """
        from sitreg_lumir.registration.outputs import save_registration

        return save_registration(self, Path(folder), padding_mm=padding_mm, report=report, overwrite=overwrite)

    def volumes(self) -> "Volumes":
        """What a report shows, on a 1 mm grid along the fixed scan's axes."""
        from sitreg_lumir.registration.pictures import picture_volumes

        return picture_volumes(self)

    def __repr__(self) -> str:
        return f"Registration({self.moving.name} onto {self.fixed.name}: {self.verdict})"

    def _repr_html_(self) -> str:
        from sitreg_lumir.registration.pictures import as_html

        return as_html(self)
