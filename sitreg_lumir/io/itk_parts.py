"""ITK's transform files, read here: text, MATLAB 4 and HDF5. ITK itself gets only what was understood and measured.

ITK takes memory for whatever a file claims, and ends the whole program on some. A file holds parts, each with a kind,
parameters and fixed parameters (a centre, or a grid).
"""

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.bounded import DEFLATE_RATIO, check_regular, check_voxels, read_bytes, record_checksum_of

HDF5_SUFFIXES = (".h5", ".hdf5")
"""Ends of the names of ITK's HDF5 files."""

COMPOSITE = "CompositeTransform"
_LARGEST_TEXT = 1 << 24  # bytes
_MOST_PARTS, _MOST_PARAMETERS = 100, 64
_KIND = re.compile(r"(?P<name>[A-Za-z0-9]{1,80}?)(?:_(?P<type>double|float))?_(?P<sizes>\d{1,2}_\d{1,2})")
_FIELD = re.compile(r"(GaussianSmoothingOnUpdate|BSplineSmoothingOnUpdate)?DisplacementFieldTransform")
_LINEAR = {  # numbers of parameters, 3-D
    "IdentityTransform": (0,), "TranslationTransform": (3,), "ScaleTransform": (3,), "ScaleLogarithmicTransform": (3,),
    "AffineTransform": (12,), "MatrixOffsetTransformBase": (12,), "CenteredAffineTransform": (15,),
    "ScalableAffineTransform": (12,), "FixedCenterOfRotationAffineTransform": (12,), "Rigid3DTransform": (12,),
    "Euler3DTransform": (6,), "CenteredEuler3DTransform": (9,), "VersorTransform": (3,), "VersorRigid3DTransform": (6,),
    "QuaternionRigidTransform": (7,), "Similarity3DTransform": (7,), "ScaleVersor3DTransform": (9,),
    "ScaleSkewVersor3DTransform": (15,),
}  # fmt: skip
_GRID = 18  # size, origin, spacing and directions
_HDF5_FILTERS = {1, 2, 3}  # deflate, shuffle, fletcher32: others load code
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TransformPart:
    """A transform of a file.

    Attributes:
        name: of its class in ITK, without types and dimensions.
        dimensions: of the points it takes.
        parameters: as stored.
        fixed: its centre, or its grid.
    """

    name: str
    dimensions: int
    parameters: NDArray[Any]
    fixed: Floats

    @property
    def is_field(self) -> bool:
        """Whether it is a displacement field."""
        return _FIELD.fullmatch(self.name) is not None

    @property
    def is_linear(self) -> bool:
        """Whether it is of a kind that matrices stand for."""
        return self.name in _LINEAR

    @property
    def kind(self) -> str:
        """What to call it in messages."""
        return f"{self.dimensions}-D {self.name}"


def read_parts(path: Path) -> list[TransformPart]:
    """The transforms of a file, in the order they are stored; of a composite one, its parts without itself.

    Parameters of kinds that are neither linear nor fields stay unread.

    Args:
        path: of the file; ``.h5`` and ``.hdf5`` are HDF5, all else is text or MATLAB 4.

    Raises:
        InputError: the file is missing or no ITK transform, or it claims more than it holds or than is read.
    """
    try:
        check_regular(path)
        if path.name.lower().endswith(HDF5_SUFFIXES):
            parts = _read_hdf5(path)
        else:
            content = read_bytes(path, _LARGEST_TEXT, "an ITK transform in text")
            parts = _read_text(content) if content.lstrip()[:1] == b"#" else _read_matlab(content)
        if not parts:
            raise ValueError("holds no transform")
        composite = parts[0].name == COMPOSITE
        parts = [part for part in parts if part.name != COMPOSITE]
        if composite and not parts:
            raise ValueError("a composite transform without parts")
        if len(parts) > 1 and not composite:
            raise ValueError(f"holds {len(parts)} transforms that are not one composite transform")
        for part in parts:
            _check(path, part)
        return parts
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, struct.error) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path}: not a readable ITK transform ({reason}); give a .tfm, .txt or .mat of ITK") from None


def as_text(parts: Sequence[TransformPart]) -> str:
    """Linear parts of three dimensions as a text file of ITK's, with all digits; several are a composite transform."""
    lines = ["#Insight Transform File V1.0"]
    if len(parts) > 1:
        lines += [f"Transform: {COMPOSITE}_double_3_3"]
    for part in parts:
        parameters, fixed = (
            " ".join(repr(float(value)) for value in values) for values in (part.parameters, part.fixed)
        )
        lines += [
            f"Transform: {part.name}_double_3_3", f"Parameters: {parameters}", f"FixedParameters: {fixed}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def field_of(part: TransformPart) -> tuple[NDArray[np.float32], Floats]:
    """The field of a part that :func:`read_parts` has checked.

    Returns:
        ``(3, X, Y, Z)`` float32, mm, LPS; the ``(4, 4)`` voxel-to-world matrix, LPS, mm.
    """
    size, origin, spacing, direction = np.split(part.fixed, [3, 6, 9])
    x, y, z = (int(count) for count in size)
    affine = np.eye(4)
    affine[:3, :3] = direction.reshape(3, 3) * spacing
    affine[:3, 3] = origin
    return part.parameters.reshape(z, y, x, 3).transpose(3, 2, 1, 0).astype(np.float32), affine


def _check(path: Path, part: TransformPart) -> None:
    """Refuses a linear part or a field whose numbers do not fit it."""
    if part.dimensions != 3 or not (part.is_linear or part.is_field):
        return
    if not np.isfinite(part.fixed).all():
        raise ValueError(f"the fixed parameters of its {part.name} are not finite")
    if part.is_field:
        _check_grid(path, part.fixed, part.parameters.size)
    elif part.parameters.size not in _LINEAR[part.name]:
        raise ValueError(f"{part.parameters.size} parameters of a {part.name}")
    elif not np.isfinite(part.parameters).all():
        raise ValueError(f"the parameters of its {part.name} are not finite")


def _check_grid(path: Path, fixed: Floats, parameters: int) -> None:
    """Refuses a field's grid that is none, or that its parameters do not fill."""
    if fixed.size != _GRID:
        raise ValueError(f"{fixed.size} numbers describe the grid of a field, {_GRID} are needed")
    size, origin, spacing, direction = np.split(fixed, [3, 6, 9])
    if not all(float(count).is_integer() and 1 <= count < 2**31 for count in size):
        raise ValueError(f"a field of the size {' x '.join(f'{count:g}' for count in size)}")
    if check_voxels(path, [int(count) for count in size]) * 3 != parameters:
        raise ValueError(f"{parameters} parameters of a field of {' x '.join(f'{count:g}' for count in size)} voxels")
    orthogonal = np.abs(direction.reshape(3, 3) @ direction.reshape(3, 3).T - np.eye(3)).max() < 1e-2
    if not (spacing.min() >= 1e-5 and spacing.max() <= 1e3 and orthogonal and np.abs(origin).max() < 1e6):
        raise ValueError("a field whose grid is none of voxels")


def _part(kind: str, parameters: NDArray[Any], fixed: Floats) -> TransformPart:
    match = _KIND.fullmatch(kind)
    if match is None:
        raise ValueError(f"the kind {kind[:60]!r}")
    if not (parameters.size <= _MOST_PARAMETERS or _FIELD.fullmatch(match["name"])):
        parameters = parameters[:0]
    return TransformPart(match["name"], int(match["sizes"].split("_")[0]), parameters, fixed)


def _read_text(content: bytes) -> list[TransformPart]:
    text = content.decode("latin-1")
    if not text.lstrip().startswith("#Insight Transform File V1"):
        raise ValueError("unknown format")
    parts: list[TransformPart] = []
    kind: str | None = None
    numbers: dict[str, Floats] = {}

    def finish() -> None:
        if kind is not None:
            empty = np.zeros(0)
            parts.append(_part(kind, numbers.get("Parameters", empty), numbers.get("FixedParameters", empty)))
            numbers.clear()

    for line in text.splitlines():
        name, colon, value = line.strip().partition(":")
        if not name or name.startswith("#"):
            continue
        if name == "Transform" and colon:
            finish()
            kind = value.strip()
        elif name in ("Parameters", "FixedParameters") and kind is not None and name not in numbers:
            numbers[name] = np.array([float(number) for number in value.split()], np.float64)
        else:
            raise ValueError(f"the line {line.strip()[:40]!r}")
        if len(parts) > _MOST_PARTS:
            raise ValueError("too many transforms")
    finish()
    return parts


def _read_matlab(content: bytes) -> list[TransformPart]:
    """Pairs of matrices of MATLAB 4: one is called as the kind and holds the parameters, the next is called fixed."""
    matrices: list[tuple[str, Floats]] = []
    place = 0
    while place < len(content):
        if len(content) < place + 20:
            raise ValueError("unknown format")
        order = "<" if content[place + 2 : place + 4] == b"\0\0" else ">"  # the first number is small
        kind, rows, columns, imaginary, length = struct.unpack(f"{order}5i", content[place : place + 20])
        types = {0: "f8", 10: "f4"}  # thousands: byte order; tens: type of the numbers
        if kind not in ((0, 10) if order == "<" else (1000, 1010)) or imaginary or not 1 <= length <= 200:
            raise ValueError("unknown format")
        count = rows * columns
        dtype = np.dtype(order + types[kind % 1000])
        end = place + 20 + length + count * dtype.itemsize
        if rows < 0 or columns < 0 or len(matrices) > 2 * _MOST_PARTS or end > len(content):
            raise ValueError(f"a matrix of {rows} x {columns} numbers in {len(content)} bytes")
        name = content[place + 20 : place + 20 + length].split(b"\0")[0].decode("latin-1")
        numbers = np.frombuffer(content, dtype, count, place + 20 + length)
        matrices.append((name, numbers.astype(np.float64)))
        place = end
    if len(matrices) % 2 or any(name != "fixed" for name, _ in matrices[1::2]):
        raise ValueError("its matrices are no pairs of parameters and fixed parameters")
    return [
        _part(name, parameters, fixed)
        for (name, parameters), (_, fixed) in zip(matrices[::2], matrices[1::2], strict=True)
    ]


def _read_hdf5(path: Path) -> list[TransformPart]:
    import h5py  # slow to import, and not every transform is HDF5

    if path.stat().st_size < 8 or not h5py.is_hdf5(path):
        raise ValueError("no HDF5 file")
    record_checksum_of(path)
    parts = []
    with h5py.File(path, "r", locking=False) as file:
        groups = _group(file, "TransformGroup")
        if len(groups) > _MOST_PARTS:
            raise ValueError("too many transforms")
        for index in range(len(groups)):
            group = _group(groups, str(index))
            kind = _string(group)
            match = _KIND.fullmatch(kind)
            if match is None:
                raise ValueError(f"the kind {kind[:60]!r}")
            parameters, fixed = np.zeros(0), np.zeros(0)
            name = match["name"]
            field = _FIELD.fullmatch(name) is not None
            if name in _LINEAR or field:
                fixed = _numbers(path, group, ("TransformFixedParameters", "TranformFixedParameters"), _MOST_PARAMETERS)
                most = 3 * check_voxels(path, _sizes(fixed)) if field and fixed.size == _GRID else _MOST_PARAMETERS
                parameters = _numbers(path, group, ("TransformParameters", "TranformParameters"), most)
            parts.append(_part(kind, parameters, np.asarray(fixed, np.float64)))
    return parts


def _sizes(fixed: NDArray[Any]) -> Sequence[int]:
    if not np.isfinite(fixed[:3]).all() or np.abs(fixed[:3]).max() >= 2**31:
        raise ValueError("a field without a size")
    return [int(count) for count in fixed[:3]]


def _linked(group: Any, name: str, kind: type) -> Any:
    """A group or dataset that lies in the file itself: links into other files are not followed."""
    import h5py

    if not isinstance(group.get(name, getlink=True), h5py.HardLink) or not isinstance(group[name], kind):
        raise ValueError(f"{name} is missing")
    return group[name]


def _group(parent: Any, name: str) -> Any:
    import h5py

    return _linked(parent, name, h5py.Group)


def _dataset(group: Any, name: str) -> Any:
    """A dataset whose values lie in the file, compressed by known filters if at all."""
    import h5py

    dataset = _linked(group, name, h5py.Dataset)
    settings = dataset.id.get_create_plist()
    filters = {settings.get_filter(index)[0] for index in range(settings.get_nfilters())}
    if settings.get_external_count() or dataset.is_virtual or not filters <= _HDF5_FILTERS:
        raise ValueError(f"{name} lies in another file, or is stored in an unusual form")
    return dataset


def _string(group: Any) -> str:
    """What ``TransformType`` says."""
    dataset = _dataset(group, "TransformType")
    if dataset.size != 1 or dataset.dtype.kind not in "OS" or dataset.dtype.itemsize > 256:
        raise ValueError("TransformType is no name")
    value = np.asarray(dataset[()]).reshape(-1)[0]
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _numbers(path: Path, group: Any, names: Sequence[str], most: int) -> NDArray[Any]:
    """A list of numbers of at most so many, under the first of some names that is there."""
    dataset = _dataset(group, next((name for name in names if name in group), names[0]))
    if dataset.dtype.kind != "f" or dataset.dtype.itemsize not in (4, 8) or math.prod(dataset.shape) > most:
        raise ValueError(f"{names[0]} holds {dataset.shape} numbers of type {dataset.dtype}, {most} are expected")
    bytes_there = min(dataset.id.get_storage_size(), path.stat().st_size)
    if dataset.size * dataset.dtype.itemsize > bytes_there * DEFLATE_RATIO + 1024:
        raise ValueError(f"{names[0]} claims {dataset.size} numbers, {bytes_there} bytes are there")
    return np.asarray(dataset[()]).reshape(-1)
