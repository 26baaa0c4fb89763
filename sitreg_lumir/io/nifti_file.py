"""A volume as it is stored, NIfTI or presented as NIfTI: the one place where headers and voxels come from disk."""

import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.bounded import check_regular, check_voxels, unpacking
from sitreg_lumir.io.checksum import record_volume
from sitreg_lumir.io.other_formats import (
    FREESURFER_HEADER,
    FREESURFER_SUFFIXES,
    NIFTI_SUFFIXES,
    read_freesurfer,
    read_itk,
    read_pair,
    refuse_dicom,
)
from sitreg_lumir.io.volume_files import ITK_SUFFIXES, PAIR_SUFFIXES, has_suffix

_UNREADABLE = (
    OSError, EOFError, ValueError, OverflowError, zlib.error, ImageFileError, HeaderDataError, WrapStructError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class NiftiFile:
    """A NIfTI-1 or -2 file in memory, or another volume in its form.

    Attributes:
        path: of the file.
        header: of it.
        content: the uncompressed file up to the end of its voxels, or just its start if only the header was asked for.
        compressed: whether it is compressed by gzip, whatever its name says.
        remedy: what errors tell users to do with a damaged file.
        apart: whether ``content`` holds the voxels without the header.
    """

    path: Path
    header: nibabel.Nifti1Header
    content: bytes | bytearray
    compressed: bool
    remedy: str
    apart: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The full shape that the header states; beyond the third axis 0 counts as 1, as other readers have it."""
        sizes = (int(size) for size in self.header.get_data_shape())
        return tuple(max(1, size) if axis > 2 else size for axis, size in enumerate(sizes))

    @property
    def scaling(self) -> tuple[float, float] | None:
        """Slope and intercept of the stored numbers; None where they stand for themselves."""
        slope, intercept = self.header.get_slope_inter()
        return None if (slope, intercept) in ((None, None), (1.0, 0.0)) else (slope, intercept)

    def voxels(self, shape: tuple[int, ...] | None = None, *, precise: bool = False) -> NDArray[Any]:
        """The voxels with the header's scaling applied.

        Args:
            shape: by default the full one; the number of voxels must be the same.
            precise: keep the digits of float64 and of scaled numbers, instead of float32 for all that is no integer.

        Returns:
            integers of the stored type or floats, first axis fastest, perhaps read-only.

        Raises:
            InputError: the file is truncated, or its voxels are no plain numbers.
        """
        shape = self.shape if shape is None else shape
        voxels = self._stored(shape)
        scaling = self.scaling
        with np.errstate(over="ignore"):  # what exceeds float32 becomes infinite, which callers refuse
            if scaling is None:
                if voxels.dtype.kind == "f" and not precise:
                    return voxels.astype(np.float32, copy=False)
                return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
            values: NDArray[Any] = np.empty(shape, np.float64 if precise else np.float32, order="F")
            slope, intercept = np.float64(scaling[0]), np.float64(scaling[1])
            for index in range(shape[2]):  # slice by slice: the products are float64
                values[:, :, index] = voxels[:, :, index] * slope + intercept
            return values

    def _stored(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """The numbers as they are on disk."""
        dtype, offset = _layout(self.path, self.header, self.remedy)
        least, expected = 0 if self.apart else int(self.header.sizeof_hdr), math.prod(shape) * dtype.itemsize
        if offset == 0 and not self.apart:  # not said: behind the header and its four bytes on extensions, if there
            offset = least + 4 if len(self.content) >= least + 4 + expected else least
        present = len(self.content) - offset
        if offset < least or present < expected:
            reason = ValueError(f"{expected} bytes of voxels expected, {max(present, 0)} found")
            raise InputError(_unreadable(self.path, reason, self.remedy))
        return np.frombuffer(self.content, dtype, math.prod(shape), offset).reshape(shape, order="F")


def open_nifti(
    path: str | Path, *, strict: bool, header_only: bool = False, remedy: str = "copy or export it again"
) -> NiftiFile:
    """Reads a NIfTI file of any byte order, or a volume of :data:`~sitreg_lumir.io.other_formats.IMAGE_SUFFIXES`.

    Args:
        path: of the file; a gzip checksum is verified unless only the header is read.
        strict: take the header as it is stored; else it is corrected as nibabel does, zero spacing becoming one.
        header_only: leave the voxels unread.
        remedy: what errors tell users to do with a damaged file.

    Raises:
        InputError: the file is missing, empty, truncated or no volume.
    """
    path = Path(path)
    try:
        check_regular(path)
        if has_suffix(path.name, *ITK_SUFFIXES):
            file = NiftiFile(path, *read_itk(path, header_only), False, remedy, apart=True)
            record_volume(path)
            return file
        if has_suffix(path.name, *PAIR_SUFFIXES):
            header, voxels = read_pair(path)
            pair = NiftiFile(path, header, b"", False, remedy, apart=True)
            count = check_voxels(path, pair.shape)
            if not header_only:
                pair = replace(pair, content=_voxels_apart(voxels, pair, count))
                record_volume(path)
            return pair
        with unpacking(path) as unpacked:
            freesurfer = has_suffix(path.name, *FREESURFER_SUFFIXES)
            start = unpacked.start(FREESURFER_HEADER if freesurfer else nibabel.Nifti2Header.sizeof_hdr)
            if not start:
                raise InputError(f"{path}: the file is empty; {remedy}")
            if freesurfer:
                return NiftiFile(path, *read_freesurfer(path, unpacked, start), unpacked.compressed, remedy, apart=True)
            header = _header(start, strict)
            file = NiftiFile(path, header, start, unpacked.compressed, remedy)
            count = check_voxels(path, file.shape)
            if header_only:
                return file
            dtype, offset = _layout(path, header, remedy)
            least = int(header.sizeof_hdr)
            unstated = 0 if offset else 4  # bytes on extensions, which may lie before voxels of an unstated offset
            offset = max(offset, least)
            content = unpacked.up_to(offset + count * dtype.itemsize, unstated, begin=offset)
            return replace(file, content=content)
    except FileNotFoundError as error:
        missing = Path(error.filename or path)
        beside = f", which belongs to {path.name}" if missing.name != path.name else ""
        raise InputError(f"{missing}: no such file{beside}") from None
    except InputError:
        raise
    except _UNREADABLE as error:
        if not has_suffix(path.name, *NIFTI_SUFFIXES):
            refuse_dicom(path)
        raise InputError(_unreadable(path, error, remedy)) from None


def _voxels_apart(path: Path, file: NiftiFile, count: int) -> bytearray:
    """The content of the file that holds the voxels of a pair."""
    dtype, offset = _layout(file.path, file.header, file.remedy)
    with unpacking(path) as unpacked:
        return unpacked.up_to(max(offset, 0) + count * dtype.itemsize, begin=max(offset, 0))


def _layout(path: Path, header: nibabel.Nifti1Header, remedy: str) -> tuple[np.dtype[Any], int]:
    """The type of the voxels as stored, and where they begin, bytes; a type that cannot be used is refused."""
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
        offset = int(header.get_data_offset())
        header.get_slope_inter()
    except KeyError:
        code = header["datatype"]
        raise InputError(f"{path}: unknown type of voxels (code {code}); export it as float32") from None
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise InputError(_unreadable(path, error, remedy)) from None
    if dtype.fields:
        raise InputError(f"{path}: the voxels are RGB colours; store one gray value each")
    if dtype.kind == "c":
        raise InputError(f"{path}: the voxels are complex numbers; store their magnitude")
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels of type {dtype} cannot be used; store plain numbers")
    return dtype, offset


def _header(content: bytes, strict: bool) -> nibabel.Nifti1Header:
    """The header of a single-file NIfTI-1 or -2; anything else raises ValueError."""
    size = {int.from_bytes(content[:4], order) for order in ("little", "big")}
    kinds: tuple[Any, ...] = (nibabel.Nifti1Header, nibabel.Nifti2Header)
    for kind in kinds:
        if kind.sizeof_hdr in size:
            header: nibabel.Nifti1Header = kind(content[: kind.sizeof_hdr], check=not strict)
            magic = bytes(header["magic"].item())
            if magic.startswith((b"ni1", b"ni2")):
                raise ValueError("header and voxels in two files, convert them to one .nii")
            if magic.startswith((b"n+1", b"n+2")):
                return header
    raise ValueError("no NIfTI header")


def _unreadable(path: Path, error: Exception, remedy: str) -> str:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    kind = "image" if has_suffix(path.name, *FREESURFER_SUFFIXES, *ITK_SUFFIXES) else "NIfTI image"
    return f"{path}: not a readable {kind}, or truncated or corrupt ({reason}); {remedy}"
