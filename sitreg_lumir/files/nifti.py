"""Fields and volumes as NIfTI files.

Files say mm, and sform = qform with code 1 (scanner space): readers agree on that code, whatever the space is.
"""

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
from sitreg_lumir.writing import writing

FIELD_LEVEL = 1  # gzip: a field's digits are noise, level 6 takes longer and saves half a percent more
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)


def save_disp(path: str | Path, disp: NDArray[Any], affine: NDArray[Any], *, compresslevel: int = FIELD_LEVEL) -> None:
    """Writes a field as LUMIR expects it: float32, voxels, ``(X, Y, Z, 3)``; equal input gives equal bytes.

    Args:
        path: ends in ``.nii.gz`` or ``.nii``; replaced if it exists.
        disp: ``(3, X, Y, Z)``, voxels, fixed grid.
        affine: ``(4, 4)`` voxel-to-world matrix of the fixed image, RAS, mm.
        compresslevel: of gzip, 0..9.

    Raises:
        ValueError: ``disp`` or ``affine`` has another form or holds NaN.
        InputError: the file cannot be written.

    Examples:
        >>> sitreg_lumir.save_disp("disp_0100_0101.nii.gz", np.zeros((3, 8, 10, 6)), np.eye(4))
    """
    with writing(Path(path)) as temporary:
        write_disp(temporary, disp, affine, compresslevel=compresslevel)


def write_disp(path: Path, disp: NDArray[Any], affine: NDArray[Any], *, compresslevel: int = FIELD_LEVEL) -> None:
    """As :func:`save_disp`, but straight to ``path``: for use inside :func:`writing`."""
    field = np.asarray(disp)
    if field.ndim != 4 or field.shape[0] != 3:
        raise ValueError(f"disp must be (3, X, Y, Z), got {field.shape}")
    if not np.isfinite(field).all():
        raise ValueError(f"disp for {path.name} holds NaN or infinite values")
    _write(path, np.moveaxis(field, 0, -1).astype(np.float32, copy=False), affine, compresslevel)


def save_volume(path: Path, volume: NDArray[Any], affine: NDArray[Any], *, compresslevel: int = 6) -> None:
    """Writes a volume ``(X, Y, Z)``; bool becomes uint8, wide integers int32, wide floats float32.

    Args:
        path: ends in ``.nii.gz`` or ``.nii``; replaced if it exists.
        volume: values.
        affine: ``(4, 4)`` voxel-to-world matrix, RAS, mm.
        compresslevel: of gzip, 0..9.

    Raises:
        ValueError: ``volume`` or ``affine`` has another form, or an integer is beyond int32.
        InputError: the file cannot be written.
    """
    array = np.asarray(volume)
    if array.ndim != 3:
        raise ValueError(f"volume must be (X, Y, Z), got {array.shape}")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    elif array.dtype.kind in "iu" and array.dtype.itemsize > 2:
        if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
            raise ValueError(f"volume holds {array.min()}..{array.max()}, int32 is the widest type written")
        array = array.astype(np.int32)
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
    with writing(path) as temporary:
        _write(temporary, array, affine, compresslevel)


def load_disp(
    path: str | Path, *, shape: tuple[int, ...] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Reads a field in LUMIR's form.

    Args:
        path: NIfTI file of ``(X, Y, Z, 3)`` floats, voxels, fixed grid.
        shape: ``(X, Y, Z)`` that the field must have.

    Returns:
        ``(3, X, Y, Z)`` float32, voxels, and the ``(4, 4)`` voxel-to-world matrix, RAS, mm.

    Raises:
        InputError: the file is missing, truncated or no NIfTI image, its shape or type is another, or it holds
            NaN.

    Examples:
        >>> sitreg_lumir.save_disp("disp_0100_0101.nii.gz", np.ones((3, 8, 10, 6)), np.eye(4))
        >>> disp, affine = sitreg_lumir.load_disp("disp_0100_0101.nii.gz")
        >>> disp.shape
        (3, 8, 10, 6)
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)  # to the end, which verifies the checksum
        image = nibabel.Nifti1Image.from_bytes(content)
        values = np.asanyarray(image.dataobj)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; predict this pair first") from None
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path}: truncated, corrupt or no NIfTI file ({reason}); predict this pair again") from None
    if values.ndim != 4 or values.shape[-1] != 3:
        raise InputError(f"{path}: the shape is {values.shape}, a field is (X, Y, Z, 3) in voxels; convert it")
    if shape is not None and values.shape[:3] != tuple(shape):
        raise InputError(f"{path}: the grid is {values.shape[:3]}, the images' is {tuple(shape)}; predict on that grid")
    if values.dtype.kind != "f":
        raise InputError(f"{path}: values of type {values.dtype}, a field holds floats; write it as float32")
    if not np.isfinite(values).all():
        raise InputError(f"{path}: the field holds NaN or infinite values; predict this pair again")
    disp = np.ascontiguousarray(np.moveaxis(values, -1, 0), dtype=np.float32)
    return disp, np.asarray(image.affine, dtype=np.float64)


def of_type(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """What an interpolated image is stored as: float32 as it is; integers of the original's type, rounded."""
    if dtype.kind == "f":
        return values
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values, dtype=np.float64), limits.min, limits.max).astype(dtype)


def _write(path: Path, array: NDArray[Any], affine: NDArray[Any], compresslevel: int) -> None:
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or np.linalg.det(matrix) == 0:
        raise ValueError(f"affine must be an invertible (4, 4) matrix, got {matrix.tolist()}")
    image = nibabel.Nifti1Image(array, matrix)
    image.set_sform(matrix, code=1)
    image.set_qform(matrix, code=1, strip_shears=True)
    image.header.set_xyzt_units("mm")
    with path.open("wb") as raw:
        if path.name.endswith(".gz"):
            with gzip.GzipFile("", "wb", compresslevel, raw, mtime=0) as stream:  # no name and time: same bytes
                image.to_stream(stream)
        else:
            image.to_stream(raw)
