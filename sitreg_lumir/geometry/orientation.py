"""Where the voxels of a NIfTI header lie in the world, RAS, mm, or one line on why that is unknown.

Nothing is guessed. Two matrices that disagree, none at all, or axes that are not orthogonal are refused; an option of
the caller decides.
"""

import logging
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError

HEADERS = ("sform", "qform")

_AGREE_MM = 0.1  # sform and qform count as one if no corner differs more
_KEPT_SHEAR = 1e-5  # cosine between axes; rounding of stored numbers, a few micrometres at a corner
_CORRECTED_SHEAR = 1e-3
_SIZES_MM = (1e-5, 1e3)  # voxel sizes that any volume has
_FARTHEST_MM = 1e6  # of the first voxel from the world's origin
_SPACINGS_MM = (0.01, 30.0)  # voxel sizes that a unit other than mm may mean
_UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # codes of xyzt_units -> mm; unknown (0) means mm everywhere
_UNIT_NAMES = {1: "metre", 3: "micrometre"}
_log = logging.getLogger(__name__)


def check_options(header: str | None, assume_orientation: str | None) -> None:
    """Refuses values that ``header`` and ``assume_orientation`` cannot have (InputError)."""
    if header not in (None, *HEADERS):
        raise InputError(f"--header {header}: must be sform or qform")
    if assume_orientation is not None and sorted(map(_axis_of, assume_orientation)) != [0, 1, 2]:
        raise InputError(f"--assume-orientation {assume_orientation}: must be three letters such as RAS, LPS or PIR")


def choose_affine(
    path: Path, stored: nibabel.Nifti1Header, shape: tuple[int, ...], header: str | None, assume: str | None
) -> tuple[NDArray[np.float64], str]:
    """The voxel-to-world matrix of a grid, and what it comes from.

    Args:
        path: named in errors.
        stored: the header as it is on disk, nothing corrected by nibabel.
        shape: ``(X, Y, Z)``.
        header: ``sform`` or ``qform``, if the caller decides.
        assume: letters such as ``RAS``, used only where the header has neither.

    Returns:
        ``(4, 4)``, RAS, mm, axes orthogonal; and ``sform``, ``qform`` or ``assumed RAS``.

    Raises:
        InputError: the grid's place is contradictory, unknown or not orthogonal, or the voxel size not positive.
    """
    unit = int(stored["xyzt_units"]) & 7
    if unit not in _UNITS:
        raise InputError(f"{path}: unknown unit of length (code {unit}); set xyzt_units to 2, mm")
    coded = [name for name in HEADERS if int(stored[f"{name}_code"]) > 0]
    if header is not None and header not in coded:
        raise InputError(f"{path}: --header {header}, but no {header} is set in this file; leave the option out")
    to_mm = np.diag([_UNITS[unit]] * 3 + [1.0])
    _check_unit(path, stored, coded, unit)
    if not coded:
        if assume is None:
            raise InputError(
                f"{path}: the header does not say where the axes point to (no sform, no qform); "
                "if you know it, add --assume-orientation RAS (or other letters)"
            )
        assumed = _assumed(_positive(path, stored["pixdim"][1:4] * _UNITS[unit]), shape, assume)
        return check_placement(path, assumed), f"assumed {assume}"
    if header is None and len(coded) == 2 and (stored["pixdim"][1:4] < 0).any():
        coded = ["sform"]  # negative voxel sizes leave a qform without meaning, and an sform needs none
    affines = {name: to_mm @ _stored_affine(path, stored, name) for name in ([header] if header else coded)}
    if len(affines) == 2:
        corners = np.array([(*corner, 1) for corner in product(*((0, size - 1) for size in shape))], dtype=float).T
        apart = np.linalg.norm(((affines["sform"] - affines["qform"]) @ corners)[:3], axis=0).max()
        if not apart <= _AGREE_MM:
            both = "; ".join(f"{name} {_text(matrix)}" for name, matrix in affines.items())
            raise InputError(
                f"{path}: sform and qform differ by {apart:.4g} mm at a corner ({both}); add --header "
                "sform or --header qform"
            )
    source, affine = next(iter(affines.items()))
    _positive(path, spacing_of(affine))
    return _orthogonal(path, check_placement(path, affine), shape), source


def spacing_of(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Voxel size along each array axis, mm, of a ``(4, 4)`` voxel-to-world matrix."""
    return np.asarray(np.linalg.norm(affine[:3, :3], axis=0), dtype=np.float64)


def check_placement(path: Path, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """A voxel-to-world matrix, if it is one of volumes: all numbers finite and of a size that scans have.

    Args:
        path: named in errors.
        affine: ``(4, 4)``, RAS, mm.

    Raises:
        InputError: it is not.
    """
    sizes = spacing_of(affine) if np.isfinite(affine).all() else np.zeros(3)
    with np.errstate(all="ignore"):
        volume = abs(float(np.linalg.det(affine[:3, :3] / sizes))) if sizes.all() else 0.0
    if not (sizes.min() >= _SIZES_MM[0] and sizes.max() <= _SIZES_MM[1] and volume > 1e-6):
        raise InputError(
            f"{path}: the header places its voxels by {_text(affine)}, which is no grid of voxels of {_SIZES_MM[0]:g} "
            f"to {_SIZES_MM[1]:g} mm; fix the header or export it again"
        )
    if np.abs(affine[:3, 3]).max() > _FARTHEST_MM:
        place = " ".join(f"{value:.5g}" for value in affine[:3, 3])
        raise InputError(
            f"{path}: the header places its first voxel at {place} mm, {_FARTHEST_MM / 1000:g} m away or more; fix the "
            "header or export it again"
        )
    return affine


def _check_unit(path: Path, stored: nibabel.Nifti1Header, coded: list[str], unit: int) -> None:
    """Refuses metres and micrometres where the numbers are those of mm."""
    sizes = [spacing_of(np.asarray(stored.get_sform(), np.float64))] if "sform" in coded else []
    sizes += [np.abs(np.asarray(stored["pixdim"][1:4], np.float64))] if coded != ["sform"] else []
    for size in sizes:
        largest = float(size.max()) * _UNITS[unit]
        if _UNITS[unit] != 1 and np.isfinite(largest) and not _SPACINGS_MM[0] <= largest <= _SPACINGS_MM[1]:
            raise InputError(
                f"{path}: the header says {_UNIT_NAMES[unit]} (xyzt_units {unit}), so voxels are {largest:g} mm large; "
                "set xyzt_units to 2 if the numbers are mm"
            )


def _stored_affine(path: Path, stored: nibabel.Nifti1Header, name: str) -> NDArray[np.float64]:
    """The matrix of ``sform`` or ``qform``, in the file's unit of length."""
    if name == "sform":
        affine = np.asarray(stored.get_sform(), dtype=np.float64)
        if not np.isfinite(affine).all():
            raise InputError(f"{path}: the sform holds NaN or infinite numbers; fix the header, or add --header qform")
        return affine
    _positive(path, stored["pixdim"][1:4])
    copy = stored.copy()
    copy["pixdim"][0] = -1 if stored["pixdim"][0] < 0 else 1  # the standard: 0 counts as 1
    try:
        affine = np.asarray(copy.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise InputError(f"{path}: no valid qform ({error}); fix the header, or add --header sform") from None
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: the qform holds NaN or infinite numbers; fix the header, or add --header sform")
    return affine


def _positive(path: Path, spacing: NDArray[Any]) -> NDArray[np.float64]:
    values = np.asarray(spacing, dtype=np.float64)
    if not np.isfinite(values).all() or values.min() <= 0:
        text = " x ".join(f"{value:g}" for value in values)
        raise InputError(f"{path}: the voxel size is {text}, it must be positive; fix the header or export it again")
    return values


def _assumed(spacing: NDArray[np.float64], shape: tuple[int, ...], letters: str) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, letter in enumerate(letters):
        affine[_axis_of(letter), column] = spacing[column] if letter in "RAS" else -spacing[column]
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def _orthogonal(path: Path, affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The affine, if need be with the nearest orthogonal axes of the same lengths, the volume's middle kept."""
    spacing = _positive(path, spacing_of(affine))
    axes = affine[:3, :3] / spacing
    shear = np.abs(axes.T @ axes - np.eye(3)).max()
    if shear <= _KEPT_SHEAR:
        return affine
    if shear >= _CORRECTED_SHEAR:
        raise InputError(
            f"{path}: the axes are not orthogonal (shear {shear:.3g}, {_text(affine)}); resample the image to a plain "
            "grid first"
        )
    left, _, right = np.linalg.svd(axes)
    corrected = affine.copy()
    corrected[:3, :3] = (left @ right) * spacing
    corrected[:3, 3] += (affine - corrected)[:3, :3] @ (np.array(shape) - 1) / 2
    _log.warning(
        "%s: the axes are not quite orthogonal (shear %.2g); the nearest orthogonal ones are used", path, shear
    )
    return corrected


def _text(affine: NDArray[np.float64]) -> str:
    return "[" + "; ".join(" ".join(f"{value:.5g}" for value in row) for row in affine[:3]) + "]"


def _axis_of(letter: str) -> int:
    """World axis of a letter, -1 if it is none."""
    return next((axis for axis, pair in enumerate(("RL", "AP", "SI")) if letter in pair), -1)
