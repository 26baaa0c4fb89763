"""Resamples a predicted field on another grid of the same world, most of all a finer one, in bounded memory.

The map of the world stays the same: ``T(w) = M phi(M^-1 w)`` with ``phi(y) = y + u(clamp y)`` and the field ``u`` in
voxels of its own grid ``M``. Only the points where it is sampled change. Field and moving image are in memory as a
whole, what is made on the new grid never is.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir import __version__
from sitreg_lumir.challenge.provenance import Provenance, is_described, provenance_path, read_provenance
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.resampling import nearest_at
from sitreg_lumir.geometry.transforms import (
    AlignedMap,
    CompositeTransform,
    Matrix,
    Points,
    inside,
    look_up,
    map_points,
    positions,
    transform_by,
)
from sitreg_lumir.io.atomic import writing, writing_together
from sitreg_lumir.io.checksum import file_entry, sha256_file
from sitreg_lumir.io.itk import VECTOR_INTENTS
from sitreg_lumir.io.maps import SUFFIX, read_map
from sitreg_lumir.io.nifti_stream import writing_planes
from sitreg_lumir.io.read import LABEL_INTENT, load_disp, read_grid, read_image
from sitreg_lumir.io.write import plain_header

_PROBES = 32  # points along each axis that stand for a volume when grids are compared
_LPS = np.array([-1.0, -1.0, 1.0])  # signs, RAS <-> LPS


@dataclass(frozen=True, eq=False)
class _Moving:
    """The moving image: ``(X, Y, Z)``, float32 unless ``nearest``; its ``(4, 4)`` voxel-to-world matrix, RAS, mm."""

    values: NDArray[Any]
    affine: Matrix
    nearest: bool
    intent: int


def resample_field(
    field: Path,
    grid: Path,
    out: Path,
    *,
    itk: bool = False,
    image: Path | None = None,
    warped: Path | None = None,
    nearest: bool = False,
    header: str | None = None,
    assume_orientation: str | None = None,
) -> None:
    """Writes the map of a field as a field on another grid, and the moving image moved there; prints what it wrote.

    An exact map is evaluated at each voxel of that grid near the brain, where a field is interpolated. Beyond the grid
    of either, the displacement of its border holds, as everywhere in this package: the map stays continuous. A
    provenance of ``field`` is continued beside ``out``.

    Args:
        field: LUMIR's form: ``(X, Y, Z, 3)``, voxels of its own grid, of which the header gives the place; or an exact
            map, ``map_<pair>.safetensors``.
        grid: NIfTI image of which only shape and affine are read.
        out: ``.nii.gz`` or ``.nii``, replaced if it exists: ``(X, Y, Z, 3)`` in voxels of ``grid``.
        itk: write ITK's form instead: ``(X, Y, Z, 1, 3)``, mm, LPS.
        image: moving image on any grid of the moving world.
        warped: where the image goes, sampled once on ``grid``; 0 where it does not reach.
        nearest: sample the image without interpolation, as an image is whose header says LABEL.
        header: ``sform`` or ``qform``: the one to use in every file.
        assume_orientation: for files whose header does not say where the axes point to.

    Raises:
        InputError: a file is missing or another thing than it must be, the grids have nothing in common, an output
            is also an input, or it cannot be written.
    """
    if (image is None) != (warped is None):
        raise InputError("--image and --warped belong together: the moving image, and where it goes")
    _check_outputs([field, grid, *([image] if image else [])], [out, *([warped] if warped else [])])
    transform, stored = _read_transform(field, header, assume_orientation)
    field_shape, field_affine = transform.grid_shape, np.asarray(np.linalg.inv(transform.to_voxels), np.float64)
    shape, affine = read_grid(grid, header, assume_orientation)
    covered = _share(_probes(shape, affine), field_shape, field_affine)
    if not covered and not _share(_probes(field_shape, field_affine), shape, affine):
        raise InputError(f"{grid}: has nothing in common with the grid of {field}; give a grid in the same world")
    form = "itk" if itk else "voxels"
    sampled_on = {"name": grid.name, "shape": list(shape), "affine": affine.tolist()}
    provenance = _provenance(stored, field, out, sampled_on, form)
    moving = None
    if image is not None:
        moving = _read_moving(image, nearest, header, assume_orientation)
        _check_reached(image, moving, grid, transform, shape, affine)
    _write(transform, shape, affine, out, itk, moving, warped, provenance)
    size = " x ".join(map(str, shape))
    print(f"{out}: {size} displacements, {'mm, LPS (ITK)' if itk else f'voxels of {grid.name}'}")
    if covered < 1:
        print(f"note: about {covered:.0%} of it lies in {field.name}; beyond, its border's displacement holds")
    if warped is not None and moving is not None:
        print(f"{warped}: {size}, {'nearest voxels' if moving.nearest else 'linear interpolation'}")


def _write(
    transform: AlignedMap,
    shape: tuple[int, int, int],
    affine: Matrix,
    out: Path,
    itk: bool,
    moving: _Moving | None,
    warped: Path | None,
    provenance: Provenance | None,
) -> None:
    """Both results in one pass over the grid; neither takes its name before both are whole."""
    vector = (1, 3) if itk else (3,)
    field_header = plain_header((*shape, *vector), affine, np.float32, intent=VECTOR_INTENTS if itk else 0)
    with ExitStack() as field_files, ExitStack() as image_files:
        if provenance is None:
            sidecar, field_file = None, field_files.enter_context(writing(out))
        else:
            sidecar, field_file = field_files.enter_context(writing_together(provenance_path(out), out))
        with ExitStack() as streams:
            put_field = streams.enter_context(writing_planes(field_file, field_header, out))
            put_image, to_moving = None, np.eye(4)
            if moving is not None and warped is not None:
                image_header = plain_header(shape, affine, moving.values.dtype, intent=moving.intent)
                image_file = image_files.enter_context(writing(warped))
                put_image = streams.enter_context(writing_planes(image_file, image_header, warped))
                to_moving = np.linalg.inv(moving.affine) @ affine
            for first, at in _positions_by_planes(transform, shape, affine):
                if moving is not None and put_image is not None:
                    put_image(first, _look_up_image(moving, transform_by(to_moving, at))[None])
                disp = _minus_index(at, first)
                if itk:
                    disp = transform_by(_linear(_LPS[:, None] * affine[:3, :3]), disp)
                put_field(first, disp)
        _write_provenance(out, field_file, provenance, sidecar)


def _positions_by_planes(
    transform: AlignedMap, shape: tuple[int, int, int], affine: Matrix
) -> Iterator[tuple[int, Points]]:
    """Where a grid's voxels are mapped to, in its own voxels: first plane of the third axis, ``(3, planes, Y, X)``."""
    for part, at in positions([transform], shape[::-1], affine[:, [2, 1, 0, 3]], affine):
        yield part.start, at


def _minus_index(at: Points, first: int) -> Points:
    """Positions ``(3, planes, Y, X)`` as displacements from their own voxels, from plane ``first`` on; overwrites."""
    planes, y, x = at.shape[1:]
    at[0] -= np.arange(x)
    at[1] -= np.arange(y)[:, None]
    at[2] -= np.arange(first, first + planes)[:, None, None]
    return at


def _look_up_image(moving: _Moving, at: Points) -> NDArray[Any]:
    """The moving image at ``(3, ...)`` of its voxels, as ``resample`` has it; 0 where it does not reach."""
    if moving.nearest:
        return nearest_at(moving.values, at, 0)
    return np.where(inside(at, moving.values.shape), look_up(moving.values[None], at)[0], np.float32(0))


def _read_moving(path: Path, nearest: bool, header: str | None, assume_orientation: str | None) -> _Moving:
    scan = read_image(path, header, assume_orientation)
    values, nearest = scan.data, nearest or scan.says_labels
    if not nearest:
        values = values.astype(np.float32, copy=False)
    elif values.dtype.kind in "iu" and values.dtype.itemsize > 2:  # as save_volume stores them
        if values.min() < -(2**31) or values.max() >= 2**31:
            raise InputError(f"{path}: holds {values.min()}..{values.max()}, beyond int32; number the labels again")
        values = values.astype(np.int32)
    return _Moving(values, scan.affine, nearest, LABEL_INTENT if scan.says_labels else 0)


def _check_outputs(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
    taken = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if not path.name.endswith((".nii", ".nii.gz")):
            raise InputError(f"{path}: the name must end in .nii.gz or .nii")
        if os.path.realpath(path) in taken:
            raise InputError(f"{path}: is named twice, as input or output; give the result a name of its own")
        taken.add(os.path.realpath(path))


def _check_reached(
    path: Path, moving: _Moving, grid: Path, transform: AlignedMap, shape: tuple[int, int, int], affine: Matrix
) -> None:
    """Refuses a moving image of which nothing would be seen."""
    reached = _share(map_points(transform, _probes(shape, affine).T).T, moving.values.shape, moving.affine)
    if not reached and not _share(_probes(moving.values.shape, moving.affine), shape, affine):
        raise InputError(f"{path}: the map leads past it from everywhere in {grid}; give an image in the same world")


def _probes(shape: Sequence[int], affine: Matrix) -> Points:
    """World points ``(3, N)`` spread evenly over the volume of a grid, RAS, mm."""
    axes = [(np.arange(_PROBES) + 0.5) / _PROBES * size - 0.5 for size in shape]
    return transform_by(affine, np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1))


def _share(points: Points, shape: Sequence[int], affine: Matrix) -> float:
    """Share of world points ``(3, N)`` that lie in the volume of a grid."""
    return float(inside(transform_by(np.asarray(np.linalg.inv(affine)), points), shape).mean())


def _linear(matrix: NDArray[np.float64]) -> Matrix:
    """A ``(3, 3)`` matrix as an affine."""
    result = np.eye(4)
    result[:3, :3] = matrix
    return result


def _read_transform(
    field: Path, header: str | None, assume_orientation: str | None
) -> tuple[AlignedMap, Provenance | None]:
    """The map that a field or an exact map's file holds, and its provenance; None if nothing is known of it."""
    if field.suffix == SUFFIX:
        saved = read_map(field)
        return saved.forward.on_grids, saved.made_from
    disp, _ = load_disp(field)
    _, affine = read_grid(field, header, assume_orientation)
    stored = read_provenance(field)
    if stored is not None and not is_described(field, stored):
        raise InputError(f"{field}: is not the field that {provenance_path(field).name} describes; predict it again")
    return CompositeTransform(np.eye(4), np.eye(4), affine, disp), stored


def _provenance(
    stored: Provenance | None, field: Path, out: Path, grid: dict[str, Any], form: str
) -> Provenance | None:
    """What ``out`` is made from; None if nothing is known of ``field``, then a former provenance of ``out`` goes."""
    if stored is None:
        return None
    read_provenance(out)  # refuses to replace a JSON of another kind
    resampled = {"field": file_entry(field), "grid": grid, "form": form, "version": __version__}
    return {**{entry: value for entry, value in stored.items() if entry != "field"}, "carried": resampled}


def _write_provenance(out: Path, written: Path, provenance: Provenance | None, sidecar: Path | None) -> None:
    """In step with the field: to be called when it is whole, just before both take their names."""
    if provenance is None or sidecar is None:
        try:
            if read_provenance(out) is not None:
                provenance_path(out).unlink()  # it tells of the file that is replaced now
        except InputError:
            return  # another program's
        return
    content = {**provenance, "field": {"name": out.name, "sha256": sha256_file(written)}}
    sidecar.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
