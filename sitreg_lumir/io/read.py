"""Any NIfTI volume for registration: its voxels, and where they lie in the world, or one line on what is wrong."""

import gzip
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from sitreg_lumir.data.volumes import UNREADABLE, unreadable
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.orientation import check_options, choose_affine, spacing_of

LABEL_INTENT = 1002


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume, and what results on the same grid need.

    Args:
        path: the file.
        data: ``(X, Y, Z)``, or ``(X, Y, Z, T)`` if frames were allowed and there are several; the stored integers, or
            float32 where the file holds floats or a scaling.
        affine: ``(4, 4)`` voxel-to-world matrix, RAS, mm, axes orthogonal.
        source: what the affine comes from: ``sform``, ``qform`` or ``assumed RAS`` (or other letters).
        header: as stored.
    """

    path: Path
    data: NDArray[Any]
    affine: NDArray[np.float64]
    source: str
    header: nibabel.Nifti1Header

    @property
    def shape(self) -> tuple[int, int, int]:
        return grid_shape(self.data)

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Voxel size along each array axis, mm."""
        return spacing_of(self.affine)

    @property
    def orientation(self) -> str:
        """Where each array axis points to, as ``RAS``."""
        return "".join(nibabel.aff2axcodes(self.affine))

    @property
    def says_labels(self) -> bool:
        """Whether the header's intent is LABEL; most label maps do not say so."""
        return int(self.header["intent_code"]) == LABEL_INTENT


def grid_shape(data: NDArray[Any]) -> tuple[int, int, int]:
    """``(X, Y, Z)`` of a volume or of several frames."""
    x, y, z = data.shape[:3]
    return x, y, z


def read_image(
    path: str | Path,
    header: str | None = None,
    assume_orientation: str | None = None,
    *,
    frames: bool = False,
    allow_constant: bool = False,
) -> Scan:
    """A scan, mask or label map of any orientation, voxel size, field of view, type, scaling and unit.

    Args:
        path: ``.nii`` or ``.nii.gz``, NIfTI-1 or -2; a gzip checksum is verified.
        header: ``sform`` or ``qform``: the one to use, whatever the other says.
        assume_orientation: where the array axes point to, as ``RAS``, if the header does not say; the world's origin
            is then the middle of the volume.
        frames: whether several frames (4-D) are allowed.
        allow_constant: whether all voxels may hold the same value.

    Raises:
        InputError: the file is missing, empty, truncated or no NIfTI image; it is no single volume of finite, not
            all equal numbers; or where its voxels lie is contradictory, unknown or not orthogonal.
    """
    path = Path(path)
    check_options(header, assume_orientation)
    stored, content = _open(path)
    shape = _shape(path, stored, frames)
    affine, source = choose_affine(path, stored, shape[:3], header, assume_orientation)
    data = _values(path, stored, content, shape)
    if not allow_constant and data.min() == data.max():
        raise InputError(f"{path}: all voxels are {data.flat[0]:g}, there is nothing to see; choose another image")
    return Scan(path, data, affine, source, stored)


def read_grid(
    path: str | Path, header: str | None = None, assume_orientation: str | None = None
) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """Only the grid of a file that :func:`read_image` would read (any number of frames); its voxels stay unread.

    Returns:
        ``(X, Y, Z)`` and the ``(4, 4)`` voxel-to-world matrix, RAS, mm.

    Raises:
        InputError: as ``read_image`` for everything but the voxels.
    """
    path = Path(path)
    check_options(header, assume_orientation)
    stored, _ = _open(path, header_only=True)
    x, y, z, *_ = _shape(path, stored, frames=True)
    return (x, y, z), choose_affine(path, stored, (x, y, z), header, assume_orientation)[0]


def read_vectors(path: Path, header: str | None = None) -> tuple[NDArray[np.float32], NDArray[np.float64], int]:
    """A NIfTI volume of vectors as stored: ``(X, Y, Z, 1, C)`` float32, its affine (RAS, mm), its intent code.

    Raises:
        InputError: as ``read_image``, or it holds no vectors.
    """
    check_options(header, None)
    stored, content = _open(path)
    shape = tuple(int(size) for size in stored.get_data_shape())
    if len(shape) != 5 or shape[3] != 1 or min(shape) < 1:
        raise InputError(
            f"{path}: the shape is {shape}, an ITK field is (X, Y, Z, 1, 3) in mm; a field in voxels (disp_*.nii.gz) "
            "is for LUMIR, give the *_xfm.nii.gz"
        )
    affine, _ = choose_affine(path, stored, shape[:3], header, None)
    return _values(path, stored, content, shape).astype(np.float32, copy=False), affine, int(stored["intent_code"])


def _open(path: Path, *, header_only: bool = False) -> tuple[nibabel.Nifti1Header, bytes]:
    """The header as stored, and the whole uncompressed file (with ``header_only`` just its start).

    nibabel mends headers when it loads them, zero spacing for one; here nothing is mended.
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if header_only:
                with gzip.open(raw) if compressed else nullcontext(raw) as stream:
                    content = stream.read(nibabel.Nifti2Header.sizeof_hdr)
            else:
                content = raw.read()
                if compressed:
                    content = gzip.decompress(content)  # to the end, which verifies the checksum
        if not content:
            raise InputError(f"{path}: the file is empty; copy or export it again")
        return _header(content), content
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(unreadable(path, error)) from None


def _header(content: bytes) -> nibabel.Nifti1Header:
    """NIfTI-1 or -2, of any byte order; what is no single-file NIfTI raises ValueError."""
    size = {int.from_bytes(content[:4], order) for order in ("little", "big")}
    kinds: tuple[Any, ...] = (nibabel.Nifti1Header, nibabel.Nifti2Header)
    for kind in kinds:
        if kind.sizeof_hdr in size:
            stored: nibabel.Nifti1Header = kind(content[: kind.sizeof_hdr], check=False)
            magic = bytes(stored["magic"].item())
            if magic.startswith((b"ni1", b"ni2")):
                raise ValueError("header and voxels in two files, convert them to one .nii")
            if magic.startswith((b"n+1", b"n+2")):
                return stored
    raise ValueError("no NIfTI header")


def _shape(path: Path, stored: nibabel.Nifti1Header, frames: bool) -> tuple[int, ...]:
    """``(X, Y, Z)`` or, with several frames, ``(X, Y, Z, T)``."""
    full = tuple(int(size) for size in stored.get_data_shape())
    shape = full
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if not full or min(full) < 1:
        raise InputError(f"{path}: the shape is {full}, there are no voxels; export it again")
    if len(shape) < 3 or min(shape[:3]) == 1:
        raise InputError(f"{path}: the shape is {full}, a single slice (2-D); give a 3-D volume")
    if len(shape) > 4:
        raise InputError(f"{path}: the shape is {full}, vectors such as a transform's; give an image")
    if len(shape) == 4 and not frames:
        raise InputError(f"{path}: 4-D with {shape[3]} frames, one is needed; store their mean, or one of them, alone")
    return shape


def _values(path: Path, stored: nibabel.Nifti1Header, content: bytes, shape: tuple[int, ...]) -> NDArray[Any]:
    """The voxels with the scaling applied: integers of the stored type, or float32."""
    try:
        dtype, offset, scaling = stored.get_data_dtype(), stored.get_data_offset(), stored.get_slope_inter()
    except KeyError:
        raise InputError(f"{path}: unknown type of voxels (code {stored['datatype']}); export it as float32") from None
    except HeaderDataError as error:
        raise InputError(unreadable(path, error)) from None
    if dtype.fields:
        raise InputError(f"{path}: the voxels are RGB colours; store one gray value each")
    if dtype.kind == "c":
        raise InputError(f"{path}: the voxels are complex numbers; store their magnitude")
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels of type {dtype} cannot be used; store plain numbers")
    expected, found = math.prod(shape) * dtype.itemsize, len(content) - offset
    if offset < stored.sizeof_hdr or found < expected:
        raise InputError(unreadable(path, ValueError(f"{expected} bytes of voxels expected, {max(found, 0)} found")))
    voxels = np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape, order="F")
    values: NDArray[Any]
    with np.errstate(over="ignore"):  # what exceeds float32 is found as infinite below
        if scaling not in ((None, None), (1.0, 0.0)):
            values = np.empty(shape, np.float32)
            slope, intercept = np.float64(scaling[0]), np.float64(scaling[1])
            for index in range(shape[2]):  # slice by slice: the products are float64
                values[:, :, index] = voxels[:, :, index] * slope + intercept
        else:
            values = voxels.astype(np.float32 if dtype.kind == "f" else dtype.newbyteorder("="), order="C")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        count = values.size - np.count_nonzero(np.isfinite(values))
        raise InputError(
            f"{path}: {count} of {values.size} voxels are NaN or infinite; replace them (0 for background)"
        )
    return values
