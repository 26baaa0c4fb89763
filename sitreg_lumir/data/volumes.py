"""Reads single NIfTI volumes and refuses what the method cannot use."""

import gzip
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError

UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)


def read_volume(
    path: str | Path, *, shape: tuple[int, ...] | None = None
) -> tuple[NDArray[np.uint8] | NDArray[np.float32], NDArray[np.float64]]:
    """The stored intensities of one image, 0..255, and its affine.

    Args:
        path: a NIfTI file, ``.nii`` or ``.nii.gz``; its checksum is verified.
        shape: the grid shape it must have.

    Returns:
        ``(X, Y, Z)`` array, uint8 if all values (after the header's scaling) are integers, else float32; and
        the ``(4, 4)`` voxel-to-world matrix, RAS, mm.

    Raises:
        InputError: the file is missing, truncated or no NIfTI image, is not 3-D, has another shape, holds NaN
            or infinite values or values outside 0..255, is scaled to 0..1, or is empty.

    Examples:
        >>> volume, affine = sitreg_lumir.read_volume("LUMIR/imagesTr/LUMIRMRI_0000_0000.nii.gz")
        >>> volume.shape, volume.dtype
        ((8, 10, 6), dtype('uint8'))
    """
    values, affine = _read_array(Path(path), shape)
    low, high = values.min(), values.max()
    if low < 0 or high > 255:
        raise InputError(f"{path}: intensities must lie in 0..255, found {low:g}..{high:g}; rescale the image")
    if high == 0:
        raise InputError(f"{path}: the image is empty (all voxels are 0); replace it or leave it out")
    if values.dtype.kind == "f" and high <= 1:
        raise InputError(f"{path}: the largest intensity is {high:g}, it looks scaled to 0..1; store 0..255")
    if values.dtype.kind != "f" or np.array_equal(values, np.rint(values)):
        return np.ascontiguousarray(values, dtype=np.uint8), affine
    return np.ascontiguousarray(values, dtype=np.float32), affine


def read_labels(path: str | Path, *, shape: tuple[int, ...] | None = None) -> NDArray[np.int32]:
    """A label map or landmark volume: ``(X, Y, Z)`` int32, 0 is background.

    Raises:
        InputError: as ``read_volume`` for the file and its shape, and for values that are not integers >= 0.
    """
    values, _ = _read_array(Path(path), shape)
    if values.min() < 0 or values.max() > np.iinfo(np.int32).max or not np.array_equal(values, np.rint(values)):
        raise InputError(f"{path}: labels must be integers from 0 on; is this an image instead of a label map?")
    return np.ascontiguousarray(values, dtype=np.int32)


def read_shape(path: str | Path) -> tuple[int, ...]:
    """The shape that a NIfTI file's header states; the voxels are not read.

    Raises:
        InputError: the file is missing or has no readable NIfTI header.
    """
    return tuple(int(n) for n in _read_header(path).shape)


def read_affine(path: str | Path) -> NDArray[np.float64]:
    """The ``(4, 4)`` voxel-to-world matrix that a NIfTI file's header states, RAS, mm; the voxels are not read.

    Raises:
        InputError: the file is missing or has no readable NIfTI header.
    """
    return np.asarray(_read_header(path).affine, dtype=np.float64)


def _read_header(path: str | Path) -> Any:
    try:
        return nibabel.load(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UNREADABLE as error:
        raise InputError(unreadable(path, error)) from None


def _read_array(path: Path, shape: tuple[int, ...] | None) -> tuple[np.ndarray, NDArray[np.float64]]:
    """All voxels, finite and 3-D, with the header's scaling applied, and the affine."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)  # to the end, which verifies the checksum
        second = int.from_bytes(content[:4], "little") == 540 or int.from_bytes(content[:4], "big") == 540
        image = (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_bytes(content)
        values = np.asanyarray(image.dataobj)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UNREADABLE as error:
        raise InputError(unreadable(path, error)) from None
    if values.ndim != 3:
        raise InputError(f"{path}: the image must be 3-D, its shape is {values.shape}; store a single volume")
    if shape is not None and values.shape != tuple(shape):
        raise InputError(f"{path}: the shape is {values.shape}, expected {tuple(shape)}; resample it to that grid")
    if values.dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels of type {values.dtype} cannot be used; store single numbers")
    if values.size == 0 or not np.isfinite(values).all():
        raise InputError(f"{path}: some voxels are NaN or infinite; replace them (0 for background)")
    return values, np.asarray(image.affine, dtype=np.float64)


def unreadable(path: str | Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return f"{path}: not a readable NIfTI image, or truncated or corrupt ({reason}); copy or export it again"
