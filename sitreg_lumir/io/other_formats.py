"""Volumes of other formats presented as NIfTI: FreeSurfer, NRRD, MetaImage, and pairs of header and voxels.

What a format does not say stays unsaid: a volume without axes in the world becomes one without sform and qform.
"""

import os
import re
import shlex
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from nibabel.freesurfer.mghformat import MGHImage
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import temporary_folder
from sitreg_lumir.io.bounded import Unpacked, check_voxels, record_checksum_of, unpacking
from sitreg_lumir.io.text_headers import TextHeader, check_text_header, read_text_header
from sitreg_lumir.io.volume_files import ITK_SUFFIXES, PAIR_SUFFIXES, has_suffix, pair_files, volume_files

NIFTI_SUFFIXES = (".nii", ".nii.gz")
FREESURFER_SUFFIXES = (".mgz", ".mgh")
IMAGE_SUFFIXES = (*NIFTI_SUFFIXES, *PAIR_SUFFIXES, *FREESURFER_SUFFIXES, *ITK_SUFFIXES)
"""Endings of files that are read as volumes."""

VECTOR_INTENT = 1007
FREESURFER_HEADER = 284
"""Bytes before the voxels of an MGH file."""
_FREESURFER_FOOTER = 20
_FREESURFER_BYTES = {0: 1, 1: 4, 3: 4, 4: 2, 10: 2}  # of a voxel, by the codes of types
_LOOKED_AT = 200  # files of a folder that may be DICOM
_SPACES = {"left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las"}
_UNIT_CODES = {"m": 1, "mm": 2, "um": 3, "µm": 3, "micron": 3}  # NIfTI's
_META_ORIENTATION = ("transformmatrix", "rotation", "orientation")
itk: Any = SimpleITK  # has no type information


def without_suffix(name: str) -> str:
    """A file's name without the ending of a volume."""
    ending = next((suffix for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True) if has_suffix(name, suffix)), "")
    return name[: len(name) - len(ending)]


def refuse_dicom(path: Path) -> None:
    """Refuses a DICOM file, or a folder that holds some, by the line that converts it (InputError)."""
    folder = path if path.is_dir() else path.parent
    try:
        files = islice((file for file in path.iterdir() if file.is_file()), _LOOKED_AT) if path.is_dir() else [path]
        dicom = any(map(_is_dicom, files)) or (path.is_dir() and any(map(_is_dicom, path.glob("*/*"))))
    except OSError:
        return
    if dicom:
        raise InputError(
            f"{path}: is DICOM; convert it to NIfTI by `mkdir nifti && dcm2niix -z y -o nifti "
            f"{shlex.quote(str(folder))}`, and give the file that holds the volume"
        )


def _is_dicom(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        start = stream.read(132)
    return start[128:] == b"DICM" or (has_suffix(file.name, ".dcm", ".ima") and start[:2] in (b"\x08\0", b"\x02\0"))


def read_pair(path: Path) -> tuple[nibabel.Nifti1Header, Path]:
    """The header of a volume in two files, ``.hdr`` and ``.img``; NIfTI, or Analyze, which has no orientation.

    Args:
        path: one of the two.

    Returns:
        the header; the file that holds the voxels.

    Raises:
        OSError, ValueError: a file is missing or unreadable.
    """
    named, voxels = pair_files(path)
    with unpacking(named) as unpacked:
        header = unpacked.start(nibabel.Nifti2Header.sizeof_hdr)
        unpacked.up_to(0)
    kinds: tuple[Any, ...] = (nibabel.Nifti1Header, nibabel.Nifti2Header)
    for kind in kinds:
        if header[344:348].startswith(b"ni1") or header[4:8].startswith(b"ni2"):
            size = int.from_bytes(header[:4], "little"), int.from_bytes(header[:4], "big")
            if kind.sizeof_hdr in size:
                return kind(header[: kind.sizeof_hdr], check=False), voxels
    analyze = nibabel.AnalyzeHeader(header[:348], check=False)
    if int(analyze["sizeof_hdr"]) != 348:
        raise ValueError("no NIfTI header")
    made = nibabel.Nifti1Header(endianness=analyze.endianness)
    for field in ("dim", "pixdim", "datatype", "bitpix", "vox_offset"):
        made[field] = analyze[field]
    return made, voxels


def read_freesurfer(path: Path, unpacked: Unpacked, start: bytes) -> tuple[nibabel.Nifti1Header, bytes]:
    """Header and voxels of an MGH file.

    Args:
        path: named in errors.
        unpacked: its content.
        start: the first :data:`FREESURFER_HEADER` bytes, which ``unpacked`` has given.

    Raises:
        InputError: it claims more voxels than are read.
        OSError, ValueError: the file is unreadable or truncated.
    """
    if len(start) < FREESURFER_HEADER:
        raise ValueError(f"{FREESURFER_HEADER} bytes of header expected, {len(start)} found")
    version, *shape, kind = struct.unpack(">6i", start[:24])
    if version != 1 or kind not in _FREESURFER_BYTES:
        raise ValueError(f"no MGH header: version {version}, type {kind}")
    voxels = check_voxels(path, shape) * _FREESURFER_BYTES[kind]
    content = bytes(unpacked.up_to(FREESURFER_HEADER + voxels, _FREESURFER_FOOTER, begin=FREESURFER_HEADER))
    image = MGHImage.from_bytes(content)
    known = content[28:30] == b"\0\1"  # nibabel's own header puts in a default
    values = np.asarray(image.dataobj)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return _header(values.shape, values.dtype, image.affine, known), values.tobytes(order="F")


def read_itk(path: Path, header_only: bool) -> tuple[nibabel.Nifti1Header, bytes]:
    """Header and voxels of a NRRD or MetaImage file; of vectors the axes are ``(X, Y, Z, 1, C)``, as ITK stores them.

    Raises:
        InputError: its unit of length is unknown.
        OSError, ValueError: the file is unreadable or truncated.
    """
    text = read_text_header(path)
    known, unit = _orientation_and_unit(path, text)
    check_text_header(path, text, header_only=header_only)
    if not header_only:
        for file in volume_files(path):
            record_checksum_of(file)
    with readable_name(path) as name:
        reader = itk.ImageFileReader()
        reader.SetFileName(name)
        try:
            image = reader.ReadImageInformation() if header_only else reader.Execute()
        except RuntimeError as error:
            raise ValueError(" ".join(str(error).replace(name, path.name).split())[-160:]) from None
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    count = len(size)
    if count < 3:
        return _header(size, np.uint8, np.eye(4), False), b""
    direction = np.reshape(reader.GetDirection(), (count, count))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(reader.GetSpacing()[:3])
    affine[:3, 3] = reader.GetOrigin()[:3]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    shape = tuple(size) if components == 1 else (*size, *[1] * (4 - count), components)
    if header_only:
        return _header(shape, np.uint8, affine, known, unit), b""
    values: NDArray[Any] = itk.GetArrayFromImage(image)
    if components > 1:
        values = np.moveaxis(values, -1, 0)
    header = _header(shape, values.dtype, affine, known, unit)
    if components > 1 and values.dtype.kind == "f":
        header["intent_code"] = VECTOR_INTENT
    return header, values.tobytes()  # the last axis of the array is the first of the volume


@contextmanager
def readable_name(path: Path) -> Iterator[str]:
    """A name for ITK, which ends the whole program on names that are not UTF-8: then a link in a temporary folder."""
    try:
        str(path).encode("utf-8")
        yield str(path)
    except UnicodeEncodeError:
        with temporary_folder() as folder:
            link = folder / f"file{path.suffix}"
            os.symlink(path.absolute(), link)
            yield str(link)


def _header(
    shape: tuple[int, ...], dtype: Any, affine: NDArray[Any], known: bool, unit: int = 2
) -> nibabel.Nifti1Header:
    """A NIfTI-2 header, which keeps all digits of the affine; without sform and qform unless the axes are known."""
    header: nibabel.Nifti1Header = nibabel.Nifti2Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    header.set_sform(affine, code=int(known))
    header["xyzt_units"] = unit
    header["vox_offset"] = 0
    return header


def _orientation_and_unit(path: Path, text: TextHeader) -> tuple[bool, int]:
    """Whether a header says where the axes point to, and NIfTI's code of its unit of length."""
    fields = text.fields
    if has_suffix(path.name, ".mha", ".mhd"):
        units, known = [fields.get("distanceunits", "mm")], any(name in fields for name in _META_ORIENTATION)
    else:
        units = re.findall(r'"([^"]*)"', fields.get("space units", ""))
        known = fields.get("space", "").lower() in _SPACES and "space directions" in fields
    codes = {_UNIT_CODES.get(unit.strip().lower() or "mm") for unit in units if unit != "?"} or {2}
    code = codes.pop()
    if codes or code is None:
        raise InputError(f"{path}: unit of length {' '.join(units)!r}; store it in mm")
    return known, code
