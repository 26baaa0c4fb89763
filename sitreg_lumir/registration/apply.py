"""Images, label maps and points moved by transforms on disk, several of them composed and sampled once.

A transform maps the points of the grid it lies on to the other image. So an image is resampled by the transform on the
grid it goes to, while points, which move with it, take the transform on the grid they come from: the inverse.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import nibabel
import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.resampling import resample, resample_labels
from sitreg_lumir.geometry.transforms import (
    DisplacementField,
    Matrix,
    Transform,
    inside,
    map_points,
    positions,
    transform_by,
)
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.io.composite import SUFFIXES, load_composite
from sitreg_lumir.io.foreign_affines import Grid
from sitreg_lumir.io.itk import load_transform
from sitreg_lumir.io.maps import MAP, SUFFIX, read_map
from sitreg_lumir.io.nifti_stream import writing_planes
from sitreg_lumir.io.points import read_points, save_points
from sitreg_lumir.io.read import LABEL_INTENT, Scan, read_grid, read_image
from sitreg_lumir.io.write import of_type, plain_header
from sitreg_lumir.registration.outputs import COMPOSITES_TO, IMAGES_TO

Target: TypeAlias = Literal["fixed", "moving"]
Sampling: TypeAlias = Literal["linear", "nearest labels", "linear labels"]

_VALUES_AT_ONCE = 1 << 25  # of the result, bounds it to some 128 MB
_PROBES = 16  # points along each axis that stand for a grid
_MM, _TIME_UNIT = 2, 0x38  # of NIfTI's xyzt_units: the code, the bits


@dataclass(frozen=True)
class _Grid:
    """``(X, Y, Z)``, the ``(4, 4)`` voxel-to-world matrix, RAS, mm, and what to call it in messages."""

    shape: tuple[int, int, int]
    affine: Matrix
    name: str


def apply(
    transforms: Sequence[str | Path],
    out: str | Path,
    *,
    image: str | Path | None = None,
    labels: str | Path | None = None,
    points: str | Path | None = None,
    to: Target | None = None,
    reference: str | Path | None = None,
    linear_labels: bool = False,
    lps: bool = False,
    outside: float | None = None,
    header: str | None = None,
    assume_orientation: str | None = None,
) -> None:
    """Moves one image, label map or table of points; prints what it wrote.

    Args:
        transforms: ITK fields and affines, ``[FILE,1]`` for an affine's inverse, and folders of registrations or exact
            maps' files (``map_<pair>.safetensors`` of ``predict``), which stand for a folder. The first is applied
            first, to the points of the reference grid (the order of ``antsApplyTransforms -t``) or, if all are files
            of ITK, to the given points. With a folder among them the list says how images move, and points take its
            inverse: the other field of a folder, the inverse of an affine, the last first.
        out: ``.nii.gz`` or ``.nii``, or ``.csv`` for points; replaced if it exists.
        image: 3-D or 4-D, sampled linearly: float32, or the integers' own type, rounded; as ``labels`` if its header
            says LABEL.
        labels: 3-D or 4-D, sampled without interpolation.
        points: CSV with the columns x, y, z: RAS, mm; those outside a field become NaN.
        to: where things go; needed with a folder, refused without.
        reference: NIfTI image of which the grid is used; by default that of the first transform, a field.
        linear_labels: let the label with the largest linearly interpolated share win.
        lps: whether the points are in LPS, read and written.
        outside: value where the image does not reach, 0 by default.
        header: ``sform`` or ``qform``: the one to use in every NIfTI file.
        assume_orientation: for images whose header does not say where the axes point to.

    Raises:
        InputError: a file is missing or another thing than it must be, options do not go together, nothing of the
            image would be seen, or the output cannot be written.

    Examples:
        >>> labels = sitreg_lumir.labels_of("EXAMPLE-T2")
        >>> sitreg_lumir.apply(["registration"], "labels_on_fixed.nii.gz", labels=labels, to="fixed")
        labels_on_fixed.nii.gz: 160 x 208 x 176, labels, nearest voxels, uint8
    """
    out, reference = Path(out), None if reference is None else Path(reference)
    moved = [Path(path) for path in (image, labels, points) if path is not None]
    if len(moved) != 1:
        raise InputError(f"one of --image, --labels and --points is needed, {len(moved)} are given")
    if not transforms:
        raise InputError("-t is needed: a transform, or the folder of a registration")
    if to not in (None, *IMAGES_TO):
        raise ValueError(f"to must be fixed or moving, got {to!r}")
    if lps and points is None:
        raise InputError("--lps: is for --points; an image's header says where it lies")
    only_images = {"reference": reference, "outside": outside, "assume-orientation": assume_orientation,
                   "linear-labels": linear_labels or None}  # fmt: skip
    for name, value in only_images.items():
        if points is not None and value is not None:
            raise InputError(f"--{name}: is for images and labels; leave it out with --points")
    grids = None
    if points is None and reference is not None and len(transforms) == 1:  # those that a FLIRT matrix belongs to
        fixed, moving = (read_grid(path, header, assume_orientation) for path in (reference, moved[0]))
        grids = (fixed, moving)
    maps, files, own_grid = _read_transforms(transforms, to, header, points is not None, grids)
    _check_output(out, [*moved, *files, *([reference] if reference else [])], points is not None)
    if points is not None:
        _move_points(moved[0], maps, out, lps)
        return
    scan = read_image(moved[0], header, assume_orientation, frames=True, allow_constant=labels is not None)
    grid = own_grid if own_grid and not reference else _grid(maps, files, reference, header, assume_orientation)
    _move_image(scan, maps, grid, out, _sampling(scan, labels is not None, linear_labels), outside or 0.0)


def _read_transforms(
    transforms: Sequence[str | Path],
    to: Target | None,
    header: str | None,
    of_points: bool,
    grids: tuple[Grid, Grid] | None,
) -> tuple[list[Transform], list[Path], _Grid | None]:
    """The transforms in the order of application, their files, and the scan's grid if the first is an exact map."""
    named = [_named(transform) for transform in transforms]
    both_ways = next((path for path, _ in named if _leads_both_ways(path)), None)
    if both_ways is not None and to is None:
        kind = "folder" if both_ways.is_dir() else "map"
        raise InputError(f"{both_ways}: a {kind} has transforms for both ways; add --to fixed or --to moving")
    if both_ways is None and to is not None:
        raise InputError(f"--to {to}: chooses a field of a registration's folder; leave it out, files lead one way")
    inverse = of_points and both_ways is not None
    maps: list[Transform] = []
    files: list[Path] = []
    own_grid = None
    for path, inverted in reversed(named) if inverse else named:
        if _leads_both_ways(path) and to is not None:
            if inverted:
                kind = "folder" if path.is_dir() else "map"
                raise InputError(f"[{path},1]: --to chooses the direction of a {kind}; give the {kind} alone")
            if not path.is_dir() or (path / MAP).is_file():
                saved, path = read_map(path), path / MAP if path.is_dir() else path
                forward = saved.forward if (to == "fixed") != of_points else saved.forward.inverse
                maps.append(forward if of_points else forward.on_grids)
                own_grid = own_grid if files else _Grid(*saved.grids[to], f"the {to} scan's grid")
            else:
                path = _field_in(path, to, of_points)
                maps += _load(path, header)
        else:
            loaded = _load(path, header, grids[::-1] if grids and inverted else grids)
            if inverted != inverse:
                loaded = [_inverse(path, transform, inverse) for transform in reversed(loaded)]
            maps += loaded
        files.append(path)
    return maps, files, own_grid


def _leads_both_ways(path: Path) -> bool:
    """Whether it is a registration's folder or an exact map's file."""
    return path.is_dir() or path.suffix == SUFFIX


def _field_in(folder: Path, to: Target, of_points: bool) -> Path:
    """The transform in a registration's folder without an exact map: the field on the scan's grid, or the composite."""
    role: Target = to if not of_points else "moving" if to == "fixed" else "fixed"
    field, composite = folder / IMAGES_TO[role], folder / COMPOSITES_TO[role]
    if not field.is_file() and not composite.is_file():
        raise InputError(f"{field}: no such file; give the folder that a registration made, or transforms")
    return field if field.is_file() else composite


def _load(path: Path, header: str | None, grids: tuple[Grid, Grid] | None = None) -> list[Transform]:
    """A file's transforms, the first one applied first; several if it is a composite one."""
    return load_composite(path) if path.name.endswith(SUFFIXES) else [load_transform(path, header, grids)]


def _named(transform: str | Path) -> tuple[Path, bool]:
    """A path, and whether it is in ANTs' form for the inverse, ``[path,1]``."""
    text = str(transform)
    if not (text.startswith("[") and text.endswith("]")) or Path(text).exists():
        return Path(text), False
    name, _, flag = text[1:-1].rpartition(",")
    if not name.strip() or flag.strip() not in ("0", "1"):
        raise InputError(f"-t {text}: give a file, or [FILE,1] for the inverse of an affine")
    return Path(name.strip()), flag.strip() == "1"


def _inverse(path: Path, transform: Transform, for_points: bool) -> Matrix:
    if not isinstance(transform, np.ndarray):
        remedy = "with a folder, points take the inverse of the list: instead, give files that map the points"
        raise InputError(
            f"{path}: a field cannot be inverted; {remedy if for_points else 'give the field of the other direction'}"
        )
    return np.asarray(np.linalg.inv(transform), dtype=np.float64)


def _grid(
    maps: Sequence[Transform],
    files: Sequence[Path],
    reference: Path | None,
    header: str | None,
    assume: str | None,
) -> _Grid:
    if reference is not None:
        return _Grid(*read_grid(reference, header, assume), reference.name)
    if not isinstance(maps[0], DisplacementField) or files[0].name.endswith(SUFFIXES):
        kind = "a composite transform" if files[0].name.endswith(SUFFIXES) else "an affine"
        raise InputError(f"{files[0]}: {kind} has no grid; add --reference with an image that has the wanted one")
    x, y, z = maps[0].disp.shape[1:]
    return _Grid((x, y, z), maps[0].affine, files[0].name)


def _sampling(scan: Scan, labels: bool, linear_labels: bool) -> Sampling:
    if labels or scan.says_labels:
        return "linear labels" if linear_labels else "nearest labels"
    if linear_labels:
        raise InputError(f"{scan.path}: --linear-labels is for label maps; give it as --labels if it is one")
    return "linear"


def _move_image(
    scan: Scan, maps: Sequence[Transform], grid: _Grid, out: Path, sampling: Sampling, outside: float
) -> None:
    values = _storable(scan.path, scan.data)
    _check_outside(outside, values.dtype, sampling)
    if not _reaches(maps, grid, scan):
        raise InputError(f"{scan.path}: the transforms lead past it from all of {grid.name}; check -t, its order, --to")
    header = _output_header(scan, values.dtype, grid, sampling != "linear")
    with writing(out) as temporary, writing_planes(temporary, header, out) as put:
        for first, part in _planes(values, scan.affine, maps, grid, sampling, outside):
            put(first, part.transpose(3, 2, 1, 0))
    size = " x ".join(map(str, header.get_data_shape()))
    how = {"linear": "linear interpolation", "nearest labels": "labels, nearest voxels"}.get(sampling, sampling)
    print(f"{out}: {size}, {how}, {values.dtype}")
    beyond = _share_beyond(maps, grid)
    if beyond:
        print(f"note: about {beyond:.0%} of {grid.name} is led beyond a field, which moves nothing there, as in ITK")


def _reaches(maps: Sequence[Transform], grid: _Grid, scan: Scan) -> bool:
    """Whether any voxel of a grid looks into a scan; most do, so that every fourth one usually tells."""
    for step in (4, 1):
        shape = [-(-size // step) for size in grid.shape]
        reached = positions(maps, shape, grid.affine @ np.diag([step, step, step, 1.0]), scan.affine)
        if any(inside(at, scan.shape).any() for _, at in reached):
            return True
    return False


def _planes(
    values: NDArray[Any],
    affine: Matrix,
    maps: Sequence[Transform],
    grid: _Grid,
    sampling: Sampling,
    outside: float,
) -> Iterator[tuple[int, NDArray[Any]]]:
    """First plane of the third axis, and ``(X, Y, planes, T)`` of the type of ``values``."""
    frames = values.reshape(*values.shape[:3], -1)
    if sampling == "linear":  # frame by frame in memory, as `resample` wants it: else it copies for each slab
        frames = np.moveaxis(np.ascontiguousarray(np.moveaxis(frames, 3, 0), np.float32), 0, 3)
    x, y, z = grid.shape
    count = max(1, _VALUES_AT_ONCE // (x * y * frames.shape[3]))
    for first in range(0, z, count):
        shape, slab_affine = (x, y, min(count, z - first)), grid.affine.copy()
        slab_affine[:3, 3] += first * slab_affine[:3, 2]
        if sampling == "linear labels":
            series = np.moveaxis(frames, 3, 0)
            args = (affine, maps, shape, slab_affine)
            yield first, np.stack([resample_labels(frame, *args, interpolation="linear") for frame in series], axis=-1)
        elif sampling == "nearest labels":
            yield first, resample(frames, affine, maps, shape, slab_affine, interpolation="nearest", outside=outside)
        else:
            yield first, of_type(resample(frames, affine, maps, shape, slab_affine, outside=outside), values.dtype)


def _storable(path: Path, values: NDArray[Any]) -> NDArray[Any]:
    """Integers of more than 16 bits as int32, as all of this package's files have them."""
    if values.dtype.kind == "f" or values.dtype.itemsize <= 2:
        return values
    if values.min() < -(2**31) or values.max() >= 2**31:
        raise InputError(f"{path}: holds {values.min()}..{values.max()}, beyond int32; scale or number it again")
    return values.astype(np.int32, copy=False)


def _output_header(scan: Scan, dtype: np.dtype[Any], grid: _Grid, labels: bool) -> nibabel.Nifti1Header:
    shape = (*grid.shape, *scan.data.shape[3:])
    header = plain_header(shape, grid.affine, dtype, intent=LABEL_INTENT if labels else 0)
    if scan.data.ndim == 4:  # the time between frames
        header["pixdim"][4] = scan.header["pixdim"][4]
        header["xyzt_units"] = _MM | (int(scan.header["xyzt_units"]) & _TIME_UNIT)
    return header


def _share_beyond(maps: Sequence[Transform], grid: _Grid) -> float:
    """Share of a grid that some field of the maps does not cover."""
    axes = [(np.arange(_PROBES) + 0.5) / _PROBES * size - 0.5 for size in grid.shape]
    world = transform_by(grid.affine, np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1))
    return float(np.isnan(map_points(maps, world.T, outside="nan")).any(axis=1).mean())


def _move_points(path: Path, maps: Sequence[Transform], out: Path, lps: bool) -> None:
    table = read_points(path, lps=lps)
    moved = map_points(maps, table.points, outside="nan")
    save_points(out, table, moved)
    known = ~np.isnan(table.points).any(axis=1)
    lost = int((known & np.isnan(moved).any(axis=1)).sum())
    world = "LPS" if lps else "RAS"
    print(f"{out}: {len(moved)} points, mm, {world}")
    if lost:
        why = "" if lost < known.sum() else f"; are they really in {world}, on the side they are moved from?"
        print(f"note: {lost} of {len(moved)} points lie outside a field and are NaN now{why}")
    if not known.all():
        print(f"note: {(~known).sum()} of {len(moved)} points are NaN in {path.name} already")


def _check_output(out: Path, inputs: Sequence[Path], points: bool) -> None:
    if not out.name.endswith(".csv" if points else (".nii", ".nii.gz")):
        raise InputError(f"{out}: the name must end in {'.csv' if points else '.nii.gz or .nii'}")
    if os.path.realpath(out) in map(os.path.realpath, inputs):
        raise InputError(f"{out}: is an input, too; give the result a name of its own")


def _check_outside(outside: float, dtype: np.dtype[Any], sampling: Sampling) -> None:
    if sampling == "linear labels":
        if outside != 0:
            raise InputError(f"--outside {outside:g}: it is 0 with --linear-labels; leave one of the two out")
        return
    if dtype.kind == "f":
        fits = math.isnan(outside) or abs(outside) <= float(np.finfo(np.float32).max)
    else:
        limits = np.iinfo(dtype)
        fits = limits.min <= outside <= limits.max and outside == int(outside)
    if not fits:
        raise InputError(f"--outside {outside:g}: cannot be stored as {dtype}, the image's type; give another value")
