"""Fields and volumes as NIfTI files.

Files say mm, and sform = qform with code 1 (scanner space): readers agree on that code, whatever the space is.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.io.atomic import writing

FIELD_LEVEL = 1  # gzip: a field's digits are noise, level 6 takes longer and saves half a percent more


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
    values = np.moveaxis(field, 0, -1).astype(np.float32, copy=False)
    write_array(path, values, plain_header(values.shape, _checked_affine(affine), np.float32), compresslevel)


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
        write_array(temporary, array, plain_header(array.shape, _checked_affine(affine), array.dtype), compresslevel)


def of_type(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """What an interpolated image is stored as: float32 as it is; integers of the original's type, rounded."""
    if dtype.kind == "f":
        return values
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values, dtype=np.float64), limits.min, limits.max).astype(dtype)


def plain_header(
    shape: Sequence[int], affine: NDArray[np.float64], dtype: Any, *, intent: int = 0
) -> nibabel.Nifti1Header:
    """The header of a single file in mm, with sform = qform and code 1.

    Args:
        shape: of the whole array, its first three axes in space.
        affine: ``(4, 4)`` voxel-to-world matrix, RAS, mm.
        dtype: of the values.
        intent: NIfTI's code.
    """
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(tuple(shape))
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    header.set_xyzt_units("mm")
    header.set_intent(intent)
    header.set_slope_inter(1, 0)
    header["vox_offset"] = header.sizeof_hdr + 4  # no extensions
    return header


def write_array(path: Path, values: NDArray[Any], header: nibabel.Nifti1Header, compresslevel: int) -> None:
    """Writes an array with its header straight to ``path``, compressed if it ends in ``.gz``."""
    with path.open("wb") as raw:
        if path.name.endswith(".gz"):
            with gzip.GzipFile("", "wb", compresslevel, raw, mtime=0) as stream:  # no name and time: same bytes
                _write_to(stream, values, header)
        else:
            _write_to(raw, values, header)


def _write_to(stream: IO[bytes] | gzip.GzipFile, values: NDArray[Any], header: nibabel.Nifti1Header) -> None:
    stream.write(header.binaryblock + bytes(header.get_data_offset() - header.sizeof_hdr))
    for part in np.moveaxis(np.asarray(values, header.get_data_dtype()), -1, 0):  # the first axis is fastest on disk
        stream.write(part.tobytes(order="F"))


def _checked_affine(affine: NDArray[Any]) -> NDArray[np.float64]:
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or np.linalg.det(matrix) == 0:
        raise ValueError(f"affine must be an invertible (4, 4) matrix, got {matrix.tolist()}")
    return matrix
