"""A registered pair's map as one file for ITK, ANTs and fMRIPrep's tools: affine, deformation, affine (HDF5).

The deformation lies on the model's grid, to which the two affines lead: for a model of 2 mm that is a tenth of a field
on a scan's own grid. ITK interpolates linearly between its samples, which are chosen for that.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.orientation import spacing_of
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import DisplacementField, Matrix, Transform, checked_matrix, transform_by
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.itk import LPS, matrix_of_parts
from sitreg_lumir.io.itk_parts import HDF5_SUFFIXES, TransformPart, field_of, read_parts

SUFFIXES = HDF5_SUFFIXES
"""Ends of the names of ITK's HDF5 files."""

Border = NDArray[np.int64]
"""``(3, 2)``: voxels of the model's grid added before and behind each axis."""

_MOST_BORDER_MM = 128.0
_COMPRESSION = 1  # of gzip: higher levels save a percent


def reaching_grid(
    to_voxels: Matrix, shape: Sequence[int], spacing: NDArray[np.float64], grid_shape: Sequence[int], padding_mm: float
) -> Border:
    """How far the deformation's grid must reach beyond the model's for all of a scan: beyond it ITK moves nothing.

    Args:
        to_voxels: ``(4, 4)``, voxels of the scan -> voxels of the model's grid.
        shape: ``(X, Y, Z)`` of the scan.
        spacing: voxel size of the scan, mm.
        grid_shape: ``(X, Y, Z)`` of the model's grid.
        padding_mm: border around the scan that is to be covered, too, mm.

    Returns:
        the border, at most 128 mm of the scan's world beyond the model's grid.
    """
    pad = padding_mm / spacing
    ends = np.stack([-0.5 - pad, np.array(shape) - 0.5 + pad])
    corners = np.array(list(product(*ends.T))).T
    places = transform_by(to_voxels, corners)
    step = np.linalg.norm((to_voxels[:3, :3] / spacing), axis=1)  # voxels of the model in a mm
    most = np.floor(_MOST_BORDER_MM * step)
    before = np.ceil(-places.min(axis=1) - 1e-6)
    behind = np.ceil(places.max(axis=1) - (np.array(grid_shape) - 1) - 1e-6)
    border: Border = np.clip(np.stack([before, behind], axis=1), 0, most[:, None]).astype(np.int64)
    return border


def save_composite(path: Path, exact: SplineMap, border: Border | None = None) -> None:
    """Writes a map as ITK's composite transform; equal input gives equal bytes.

    Applied to a point of the fixed world, LPS, mm: the fixed scan's affine to the model's world, the deformation, the
    inverse of the moving scan's affine. The displacements are float32, compressed; where the grid is extended they are
    those of its border, as in the map itself.

    Args:
        path: ends in ``.h5``; replaced if it exists, and only by a whole file.
        exact: fixed world -> moving world.
        border: ``(3, 2)`` voxels, of :func:`reaching_grid`; None for the model's grid alone.

    Raises:
        InputError: the file cannot be written.
    """
    if not any(points.any() for pair in exact.updates.updates for points in pair):  # alignments alone
        matrix = np.asarray(np.linalg.inv(exact.moving_to_model) @ exact.fixed_to_model, np.float64)
        with writing(path) as temporary:
            _write(temporary, [("AffineTransform_double_3_3", *_affine_parameters(matrix))])
        return
    border = np.zeros((3, 2), np.int64) if border is None else border
    linear = exact.model_affine[:3, :3].astype(np.float32)
    disp = np.einsum("ij,jxyz->xyzi", linear, _for_linear_interpolation(exact.disp))  # mm, RAS
    disp = np.pad(disp * np.array([-1, -1, 1], np.float32), (*map(tuple, border), (0, 0)), mode="edge")
    affine = exact.model_affine.copy()
    affine[:3, 3] = transform_by(affine, -border[:, :1].astype(np.float64))[:, 0]
    parts = [
        (
            "AffineTransform_double_3_3",
            *_affine_parameters(np.asarray(np.linalg.inv(exact.moving_to_model), np.float64)),
        ),
        ("DisplacementFieldTransform_double_3_3", disp.transpose(2, 1, 0, 3).ravel(), _grid_parameters(disp, affine)),
        ("AffineTransform_double_3_3", *_affine_parameters(exact.fixed_to_model)),
    ]  # ITK applies the last one first
    with writing(path) as temporary:
        _write(temporary, parts)


def _for_linear_interpolation(disp: NDArray[np.float32]) -> NDArray[np.float32]:
    """Samples whose linear interpolation comes closer to a smooth field than that of the field's own samples.

    Linear interpolation lies on the hollow side of every bend, by a twelfth of the second difference in the mean, and
    that is what is added: about half of the error stays.

    Source: Condat et al., Beyond interpolation: optimal reconstruction by quasi-interpolation, IEEE ICIP 2005.
    """
    sharpened = disp
    for axis in (1, 2, 3):
        sharpened = ndimage.correlate1d(sharpened, [-1 / 12, 7 / 6, -1 / 12], axis=axis, mode="nearest")
    return np.asarray(sharpened, dtype=np.float32)


def _affine_parameters(matrix: Matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Parameters and fixed parameters (the centre) of an affine in RAS."""
    lps = LPS @ checked_matrix(matrix, "matrix") @ LPS
    return np.concatenate([lps[:3, :3].ravel(), lps[:3, 3]]) + 0.0, np.zeros(3)


def _grid_parameters(disp: NDArray[Any], affine: Matrix) -> NDArray[np.float64]:
    """ITK's description of a field's grid: size, origin, spacing and directions, LPS, mm."""
    spacing = spacing_of(affine)
    lps = LPS @ affine
    return np.concatenate([disp.shape[:3], lps[:3, 3], spacing, (lps[:3, :3] / spacing).ravel()]) + 0.0


def _write(path: Path, parts: Sequence[tuple[str, NDArray[Any], NDArray[np.float64]]]) -> None:
    try:
        _write_hdf5(path, parts)
    except RuntimeError as error:  # how HDF5 says that a disk is full
        raise OSError(" ".join(str(error).split())[:160]) from error


def _write_hdf5(path: Path, parts: Sequence[tuple[str, NDArray[Any], NDArray[np.float64]]]) -> None:
    import h5py  # slow to import, and only writing needs it

    text = h5py.string_dtype("ascii")
    with h5py.File(path, "w", libver=("earliest", "v108"), track_order=False) as file:
        for name, value in (("ITKVersion", "5.4.0"), ("HDFVersion", "1.10"), ("OSName", "any"), ("OSVersion", "any")):
            file.create_dataset(name, data=np.array([value.encode()], object), dtype=text, track_times=False)
        kinds = [("CompositeTransform_double_3_3", None, None), *parts]
        for index, (kind, parameters, fixed) in enumerate(kinds):
            group = file.create_group(f"TransformGroup/{index}")
            group.create_dataset("TransformType", data=np.array([kind.encode()], object), dtype=text, track_times=False)
            if parameters is None or fixed is None:
                continue
            packed = {"compression": "gzip", "compression_opts": _COMPRESSION, "shuffle": True}
            large = packed if parameters.size > 1000 else {}
            group.create_dataset("TransformParameters", data=parameters, track_times=False, **large)
            group.create_dataset("TransformFixedParameters", data=fixed, track_times=False)


def load_composite(path: Path) -> list[Transform]:
    """Reads ITK's HDF5 file, of this package, ANTs or fMRIPrep: affines and displacement fields.

    Returns:
        transforms of points of the fixed world, the first one applied first.

    Raises:
        InputError: the file is missing or no ITK transform, or holds another kind of transform.
    """
    return [_transform(part, path) for part in reversed(read_parts(path))]


def _transform(part: TransformPart, path: Path) -> Transform:
    if not part.is_field or part.dimensions != 3:
        if not part.is_linear:
            raise InputError(
                f"{path}: holds a {part.name}; affines and displacement fields can be used, sample it as a field"
            )
        return matrix_of_parts([part], path)
    disp, affine = field_of(part)
    if not np.isfinite(disp).all():
        raise InputError(f"{path}: the displacement field holds NaN or infinite numbers; make it again")
    disp[:2] *= -1
    return DisplacementField(np.ascontiguousarray(disp), LPS @ affine)
