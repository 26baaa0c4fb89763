"""Reads volumes and fields, NIfTI and other formats, and refuses in one line what cannot be used.

Scans for registration are taken as strictly as their headers allow: where voxels lie is never guessed
(:func:`read_image`). Files of a LUMIR data set lie on one known grid (:func:`read_volume`, :func:`read_labels`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.orientation import HEADERS, check_options, check_placement, choose_affine, spacing_of
from sitreg_lumir.io.nifti_file import NiftiFile, open_nifti

LABEL_INTENT = 1002
_FLOAT32_INTEGERS = 2**24  # float32 holds all integers up to this one


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume, and what results on the same grid need.

    Args:
        path: the file.
        data: ``(X, Y, Z)``, or ``(X, Y, Z, T)`` if frames were allowed and there are several; the stored integers, or
            float32 where the file holds floats or a scaling (int64 where these are integers beyond those of float32).
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
        """``(X, Y, Z)``."""
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
        path: NIfTI-1 or -2, ``.nii``, ``.nii.gz`` or ``.hdr`` with ``.img``; ``.mgz``, ``.nrrd`` or ``.mha``. A gzip
            checksum is verified.
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
    file = open_nifti(path, strict=True)
    shape = _image_shape(file, frames)
    affine, source = choose_affine(path, file.header, shape[:3], header, assume_orientation)
    data = np.ascontiguousarray(_all_digits(file, shape))
    if not allow_constant and data.min() == data.max():
        raise InputError(f"{path}: all voxels are {data.flat[0]:g}, there is nothing to see; choose another image")
    return Scan(path, data, affine, source, file.header)


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
    file = open_nifti(path, strict=True, header_only=True)
    x, y, z, *_ = _image_shape(file, frames=True)
    return (x, y, z), choose_affine(path, file.header, (x, y, z), header, assume_orientation)[0]


def read_vectors(path: Path, header: str | None = None) -> tuple[NDArray[np.float32], NDArray[np.float64], int]:
    """A NIfTI volume of vectors as stored: ``(X, Y, Z, 1, C)`` float32, its affine (RAS, mm), its intent code.

    Raises:
        InputError: as ``read_image``, or it holds no vectors.
    """
    check_options(header, None)
    file = open_nifti(path, strict=True)
    shape = file.shape
    if len(shape) != 5 or shape[3] != 1 or min(shape) < 1:
        raise InputError(
            f"{path}: the shape is {shape}, an ITK field is (X, Y, Z, 1, 3) in mm; a field in voxels (disp_*.nii.gz) "
            "is for LUMIR, give the *_xfm.nii.gz"
        )
    affine, _ = choose_affine(path, file.header, shape[:3], header, None)
    vectors = np.ascontiguousarray(_finite(file, file.voxels()), dtype=np.float32)
    return vectors, affine, int(file.header["intent_code"])


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
    values, affine = _lumir_voxels(path, shape)
    low, high = values.min(), values.max()
    if low < 0 or high > 255:
        raise InputError(f"{path}: intensities must lie in 0..255, found {low:g}..{high:g}; rescale the image")
    if high == 0:
        raise InputError(f"{path}: the image is empty (all voxels are 0); replace it or leave it out")
    if values.dtype.kind == "f" and high <= 1:
        raise InputError(f"{path}: the largest intensity is {high:g}, it looks scaled to 0..1; store 0..255")
    if values.dtype.kind != "f" or np.array_equal(values, np.rint(values)):
        return np.array(values, dtype=np.uint8, order="C"), affine
    return np.array(values, dtype=np.float32, order="C"), affine


def read_labels(path: str | Path, *, shape: tuple[int, ...] | None = None) -> NDArray[np.int32]:
    """A label map or landmark volume: ``(X, Y, Z)`` int32, 0 is background.

    Raises:
        InputError: as ``read_volume`` for the file and its shape, and for values that are not integers >= 0.
    """
    values, _ = _lumir_voxels(path, shape)
    if values.min() < 0 or values.max() > np.iinfo(np.int32).max or not np.array_equal(values, np.rint(values)):
        raise InputError(f"{path}: labels must be integers from 0 on; is this an image instead of a label map?")
    return np.array(values, dtype=np.int32, order="C")


def read_stated_grid(path: str | Path) -> tuple[tuple[int, ...], NDArray[np.float64] | None]:
    """The shape that a header states, and where it places the voxels; these are not read.

    Returns:
        shape; ``(4, 4)`` voxel-to-world matrix, RAS, mm, or None where the header has neither sform nor qform.

    Raises:
        InputError: the file is missing or has no readable header.
    """
    file = open_nifti(path, strict=False, header_only=True)
    placed = any(int(file.header[f"{name}_code"]) > 0 for name in HEADERS)
    return _without_single_frame(file.shape), _stated_affine(file) if placed else None


def read_affine(path: str | Path) -> NDArray[np.float64]:
    """The ``(4, 4)`` voxel-to-world matrix that a NIfTI file's header states, RAS, mm; the voxels are not read.

    Raises:
        InputError: the file is missing or has no readable NIfTI header.
    """
    return _stated_affine(open_nifti(path, strict=False, header_only=True))


def load_disp(
    path: str | Path, *, shape: tuple[int, ...] | None = None, plain: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Reads a field in LUMIR's form.

    Args:
        path: NIfTI file of ``(X, Y, Z, 3)`` floats, voxels, fixed grid.
        shape: ``(X, Y, Z)`` that the field must have.
        plain: refuse fields that are not stored as the challenge takes them: float32 without scaling, and compressed
            if the name says so.

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
    file = open_nifti(path, strict=False, remedy="predict this pair again")
    values = file.voxels()
    if values.ndim != 4 or values.shape[-1] != 3:
        raise InputError(f"{path}: the shape is {values.shape}, a field is (X, Y, Z, 3) in voxels; convert it")
    if shape is not None and values.shape[:3] != tuple(shape):
        raise InputError(f"{path}: the grid is {values.shape[:3]}, the images' is {tuple(shape)}; predict on that grid")
    if values.dtype.kind != "f":
        raise InputError(f"{path}: values of type {values.dtype}, a field holds floats; write it as float32")
    if not np.isfinite(values).all():
        raise InputError(f"{path}: the field holds NaN or infinite values; predict this pair again")
    if plain:
        _refuse_unusual_storage(file)
    disp = np.ascontiguousarray(np.moveaxis(values, -1, 0), dtype=np.float32)
    return disp, _stated_affine(file)


def _all_digits(file: NiftiFile, shape: tuple[int, ...]) -> NDArray[Any]:
    """The voxels as :class:`Scan` holds them, but integers beyond those of float32 as integers, as label maps have."""
    values = _finite(file, file.voxels(shape))
    if values.dtype.kind != "f" or np.abs(values).max() < _FLOAT32_INTEGERS:
        return values
    precise = file.voxels(shape, precise=True)
    if np.abs(precise).max() < 2**53 and np.array_equal(precise, np.rint(precise)):
        return precise.astype(np.int64)
    return values


def _image_shape(file: NiftiFile, frames: bool) -> tuple[int, ...]:
    """``(X, Y, Z)`` or, with several frames, ``(X, Y, Z, T)``."""
    path, full = file.path, file.shape
    shape = _without_single_frame(full)
    if not full or min(full) < 1:
        raise InputError(f"{path}: the shape is {full}, there are no voxels; export it again")
    if len(shape) < 3 or min(shape[:3]) == 1:
        raise InputError(f"{path}: the shape is {full}, a single slice (2-D); give a 3-D volume")
    if len(shape) > 4:
        raise InputError(f"{path}: the shape is {full}, vectors such as a transform's; give an image")
    if len(shape) == 4 and not frames:
        raise InputError(f"{path}: 4-D with {shape[3]} frames, one is needed; store their mean, or one of them, alone")
    return shape


def _refuse_unusual_storage(file: NiftiFile) -> None:
    if file.path.name.endswith(".gz") and not file.compressed:
        raise InputError(f"{file.path}: no gzipped NIfTI file, as its name says; predict it again")
    dtype = file.header.get_data_dtype().newbyteorder("=")
    if dtype != np.float32 or file.scaling is not None:
        scaling = f" with the scaling {file.scaling}" if dtype == np.float32 else ""
        raise InputError(f"{file.path}: stored as {dtype.name}{scaling}; write it as plain float32")


def _lumir_voxels(path: str | Path, shape: tuple[int, ...] | None) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """All voxels of a file of a data set, finite and 3-D, with all digits, and the affine."""
    file = open_nifti(path, strict=False)
    own = _without_single_frame(file.shape)
    if len(own) != 3:
        raise InputError(f"{path}: the image must be 3-D, its shape is {own}; store a single volume")
    if shape is not None and own != tuple(shape):
        raise InputError(f"{path}: the shape is {own}, expected {tuple(shape)}; resample it to that grid")
    if 0 in own:
        raise InputError(f"{path}: the shape is {own}, there are no voxels; export it again")
    return _finite(file, file.voxels(own, precise=True)), _stated_affine(file)


def _without_single_frame(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape whose fourth and further axes are dropped from the end on while they have length 1."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _stated_affine(file: NiftiFile) -> NDArray[np.float64]:
    """The ``(4, 4)`` voxel-to-world matrix of a header, RAS, mm: its sform, else its qform, else its voxel size."""
    with np.errstate(all="ignore"):
        affine = np.asarray(file.header.get_best_affine(), dtype=np.float64)
    return check_placement(file.path, affine)


def _finite(file: NiftiFile, values: NDArray[Any]) -> NDArray[Any]:
    """The values, if none of them is NaN or infinite."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        count = values.size - np.count_nonzero(np.isfinite(values))
        raise InputError(
            f"{file.path}: {count} of {values.size} voxels are NaN or infinite; replace them (0 for background)"
        )
    return values
