"""A NIfTI file as it is stored: the one place where headers and voxels come from disk."""

import gzip
import math
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError

_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, eq=False)
class NiftiFile:
    """A NIfTI-1 or -2 file in memory.

    Attributes:
        path: of the file.
        header: of it.
        content: the whole uncompressed file, or just its start if only the header was asked for.
        compressed: whether it is compressed by gzip, whatever its name says.
        remedy: what errors tell users to do with a damaged file.
    """

    path: Path
    header: nibabel.Nifti1Header
    content: bytes
    compressed: bool
    remedy: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The full shape that the header states."""
        return tuple(int(size) for size in self.header.get_data_shape())

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
        try:
            dtype, offset = self.header.get_data_dtype(), self.header.get_data_offset()
            self.header.get_slope_inter()
        except KeyError:
            code = self.header["datatype"]
            raise InputError(f"{self.path}: unknown type of voxels (code {code}); export it as float32") from None
        except HeaderDataError as error:
            raise InputError(_unreadable(self.path, error, self.remedy)) from None
        if dtype.fields:
            raise InputError(f"{self.path}: the voxels are RGB colours; store one gray value each")
        if dtype.kind == "c":
            raise InputError(f"{self.path}: the voxels are complex numbers; store their magnitude")
        if dtype.kind not in "iuf":
            raise InputError(f"{self.path}: voxels of type {dtype} cannot be used; store plain numbers")
        expected, present = math.prod(shape) * dtype.itemsize, len(self.content) - offset
        if offset < self.header.sizeof_hdr or present < expected:
            reason = ValueError(f"{expected} bytes of voxels expected, {max(present, 0)} found")
            raise InputError(_unreadable(self.path, reason, self.remedy))
        return np.frombuffer(self.content, dtype, math.prod(shape), offset).reshape(shape, order="F")


def open_nifti(
    path: str | Path, *, strict: bool, header_only: bool = False, remedy: str = "copy or export it again"
) -> NiftiFile:
    """Reads a NIfTI file, ``.nii`` or ``.nii.gz``, of any byte order.

    Args:
        path: of the file; a gzip checksum is verified unless only the header is read.
        strict: take the header as it is stored; else it is corrected as nibabel does, zero spacing becoming one.
        header_only: leave the voxels unread.
        remedy: what errors tell users to do with a damaged file.

    Raises:
        InputError: the file is missing, empty, truncated or no NIfTI image.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == _GZIP
            raw.seek(0)
            if header_only:
                with gzip.open(raw) if compressed else nullcontext(raw) as stream:
                    content = stream.read(nibabel.Nifti2Header.sizeof_hdr)
            else:
                content = raw.read()
                if compressed:
                    content = gzip.decompress(content)  # to the end, which verifies the checksum
        if not content:
            raise InputError(f"{path}: the file is empty; {remedy}")
        return NiftiFile(path, _header(content, strict), content, compressed, remedy)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(_unreadable(path, error, remedy)) from None


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
    return f"{path}: not a readable NIfTI image, or truncated or corrupt ({reason}); {remedy}"
