"""Pictures of a registered pair: the volumes of its report, and the picture for notebooks."""

import base64
from html import escape

import nibabel
import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.geometry.transforms import (
    CompositeTransform,
    DisplacementField,
    Matrix,
    composite_field,
    transform_by,
)
from sitreg_lumir.registration.result import Registration
from sitreg_lumir.report.pictures import Volumes

_SPACING_MM = 1.0


def picture_volumes(registration: Registration) -> Volumes:
    """Fixed, aligned moving and warped image, deformation, Jacobian and uncertainty on one 1 mm grid.

    The grid runs along the fixed scan's axes, in the order and direction closest to RAS, around its brain.
    """
    fixed, moving, forward = registration.fixed, registration.moving, registration.forward
    shape, affine = picture_grid(registration)
    aligned = np.linalg.inv(forward.moving_to_model) @ forward.fixed_to_model
    deformation = CompositeTransform(forward.fixed_to_model, forward.fixed_to_model, forward.model_affine, forward.disp)
    disp = composite_field(deformation, shape, affine)
    to_voxels = np.linalg.inv(affine[:3, :3]).astype(np.float32)
    moving_brain = np.where(moving.brain, moving.data, 0)

    def on_grid(volume: NDArray[np.float32], outside: float = 0.0) -> NDArray[np.float32]:
        return resample(volume, fixed.affine, np.eye(4), shape, affine, outside=outside)

    def from_model(volume: NDArray[np.float32]) -> NDArray[np.float32]:
        return resample(volume, forward.model_affine, forward.fixed_to_model, shape, affine, outside=np.nan)

    uncertainty = registration.uncertainty()
    return Volumes(
        fixed=on_grid(np.where(fixed.brain, fixed.data, 0)),
        moving=resample(moving_brain, moving.affine, aligned, shape, affine),
        warped=resample(moving_brain, moving.affine, [DisplacementField(disp, affine), aligned], shape, affine),
        disp=np.einsum("ij,jxyz->ixyz", to_voxels, disp),
        jac_det=from_model(registration.jacobian_on_model_grid),
        disagreement=None if uncertainty is None else on_grid(uncertainty),
        voxel_size=(_SPACING_MM,) * 3,
    )


def picture_grid(registration: Registration) -> tuple[tuple[int, int, int], Matrix]:
    """Shape and ``(4, 4)`` voxel-to-world matrix, RAS, mm, of the grid that pictures lie on."""
    fixed = registration.fixed
    where = np.argwhere(fixed.brain)
    margin = np.ceil(8 / fixed.spacing)
    low = np.maximum(where.min(axis=0) - margin, 0)
    high = np.minimum(where.max(axis=0) + margin, np.array(fixed.shape) - 1)
    order = nibabel.io_orientation(fixed.affine)
    affine, size = np.eye(4), [1, 1, 1]
    corner = low.copy()
    for axis, (world, direction) in enumerate(order):
        along = int(world)
        unit = fixed.affine[:3, axis] / fixed.spacing[axis] * direction
        affine[:3, along] = unit * _SPACING_MM
        size[along] = max(3, int((high[axis] - low[axis]) * fixed.spacing[axis] / _SPACING_MM) + 1)
        if direction < 0:
            corner[axis] = high[axis]
    affine[:3, 3] = transform_by(fixed.affine, corner[:, None])[:, 0]
    return (size[0], size[1], size[2]), affine


def as_html(registration: Registration) -> str:
    """A picture and the most telling numbers, for Jupyter."""
    summary = registration.summary
    rows = []
    similarity = summary.get("similarity", {})
    for key, name in (("mind", "MIND difference"), ("lncc", "local correlation"), ("brain_overlap", "brain overlap")):
        values = [similarity.get(stage, {}).get(key) for stage in ("as_placed", "aligned", "registered")]
        rows.append((name, " → ".join("-" if value is None else f"{value:.3f}" for value in values)))
    rows.append(("folded (NDV)", f"{summary.get('ndv_percent', 0):.4f} %"))
    error = summary.get("inverse_error_mm", {})
    rows.append(("inverse error, median / p99", f"{error.get('median', 0):.3f} / {error.get('p99', 0):.3f} mm"))
    rows.append(("verdict", "; ".join([registration.verdict, *summary.get("reasons", [])])))
    table = "".join(f"<tr><th style='text-align:left'>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    picture = base64.b64encode(picture_png(registration)).decode()
    title = f"{escape(registration.moving.name)} onto {escape(registration.fixed.name)}"
    return f"<b>{title}</b><br><img src='data:image/png;base64,{picture}' style='max-width:100%'><table>{table}</table>"


def picture_png(registration: Registration, volumes: Volumes | None = None) -> bytes:
    """Fixed, aligned and warped moving image and the deformed grid in three planes, as a PNG.

    Args:
        registration: the registered pair.
        volumes: of :func:`picture_volumes`, if they were made already.
    """
    from sitreg_lumir.report.sheet import sheet_png

    title = f"{registration.moving.name} onto {registration.fixed.name}"
    return sheet_png(volumes or picture_volumes(registration), title)
