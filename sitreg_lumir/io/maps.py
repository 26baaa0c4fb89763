"""Exact maps on disk: control points in ``map.safetensors``, and beside it ``map.json``, which says what they are.

`predict --save-maps` names both files after their pair: ``map_0100_0101.safetensors``, ``map_0100_0101.json``.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sitreg_lumir.deform.splines import ROLES, SplineUpdates, quantum
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import Matrix, checked_matrix
from sitreg_lumir.io.atomic import writing_together
from sitreg_lumir.io.bounded import check_voxels, read_bytes
from sitreg_lumir.io.checksum import sha256_file
from sitreg_lumir.io.json_file import read_json

MAP = "map.safetensors"
DESCRIPTION = "map.json"
SUFFIX = ".safetensors"
FORMAT, VERSION = "sitreg_lumir exact map", 1
_MOST_LEVELS, _LARGEST_SIZE = 12, 4096
_LARGEST = 1 << 34  # bytes
_MATRICES = ("fixed_to_model", "moving_to_model", "model_affine")
_REMEDY = "make it again, or copy both of its files again"

Grid: TypeAlias = tuple[tuple[int, int, int], Matrix]
"""``(X, Y, Z)`` and the ``(4, 4)`` voxel-to-world matrix, RAS, mm."""


@dataclass(frozen=True, eq=False)
class SavedMap:
    """A map as it lies on disk.

    Attributes:
        forward: fixed world -> moving world.
        grids: of the ``fixed`` and of the ``moving`` scan.
        made_from: provenance of a map that `predict` wrote, None for those of `register`.
    """

    forward: SplineMap
    grids: dict[str, Grid]
    made_from: dict[str, Any] | None = None


def save_map(
    path: Path, forward: SplineMap, grids: dict[str, Grid], made_from: Mapping[str, Any] | None = None
) -> None:
    """Writes a map's two files, both or neither.

    Args:
        path: a folder, which gets ``map.safetensors`` and ``map.json``; or a file of that kind, such as
            ``map_0100_0101.safetensors``, replaced if it exists.
        forward: fixed world -> moving world, with updates as :meth:`SplineUpdates.rounded` makes them.
        grids: of the ``fixed`` and of the ``moving`` scan.
        made_from: provenance, plain values.

    Raises:
        InputError: a file cannot be written.
    """
    file = path / MAP if path.is_dir() else path
    updates = forward.updates
    tensors: dict[str, Any] = {name: np.asarray(getattr(forward, name), np.float64) for name in _MATRICES}
    tensors |= {name: integers.numpy() for name, integers in updates.integers().items()}
    for name, brain in (("fixed_brain", forward.brain), ("moving_brain", forward.other_brain)):
        tensors[name] = np.packbits(brain)
    spacing = np.linalg.norm(forward.model_affine[:3, :3], axis=0)
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "shape": list(updates.shape),
        "levels": len(updates.updates),
        "control_point_spacing_mm": [[float(factor * step) for step in spacing] for factor in updates.factors],
        "quanta_voxels_of_the_level": [quantum(factor) for factor in updates.factors],
        "grids": {role: {"shape": list(shape), "affine": affine.tolist()} for role, (shape, affine) in grids.items()},
        **{name: getattr(forward, name).tolist() for name in _MATRICES},
        **({} if made_from is None else {"made_from": dict(made_from)}),
    }
    with writing_together(description_path(file), file) as (sidecar, temporary):
        temporary.write_bytes(save({name: np.ascontiguousarray(values) for name, values in tensors.items()}))
        described = {"sha256": sha256_file(temporary), **description}
        sidecar.write_text(json.dumps(described, indent=1) + "\n")


def description_path(file: Path) -> Path:
    """``map.json`` for ``map.safetensors``, ``map_0100_0101.json`` for ``map_0100_0101.safetensors``."""
    return file.with_suffix(".json")


def load_map(path: str | Path) -> SplineMap:
    """Loads the exact map of a registered pair.

    Args:
        path: folder of a registration, or a file: its ``map.safetensors``, or one of `predict --save-maps`.

    Returns:
        the map from the fixed to the moving world; its ``inverse`` leads back.

    Raises:
        InputError: a file is missing, damaged or of another kind.

    Examples:
        >>> exact = sitreg_lumir.load_map("registration")
        >>> sitreg_lumir.map_points(exact, [[10.0, -20.0, 5.0]]).shape
        (1, 3)
    """
    return read_map(Path(path)).forward


def read_map(path: Path) -> SavedMap:
    """Reads what :func:`save_map` wrote: see :func:`load_map`."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; name the folder of a registration, or a map's {SUFFIX} file")
    file = path / MAP if path.is_dir() else path
    if file.suffix != SUFFIX:
        raise InputError(f"{file}: is no exact map; name the folder of a registration, or a map's {SUFFIX} file")
    description = _description(description_path(file))
    try:
        content = read_bytes(file, _LARGEST, "an exact map")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); {_REMEDY}") from None
    if hashlib.sha256(content).hexdigest() != description.get("sha256"):
        name = description_path(file).name
        raise InputError(f"{file}: is not the file that {name} beside it describes, or damaged; {_REMEDY}")
    try:
        tensors = load(content)
        shape = _shape(description["shape"])
        check_voxels(file, shape)
        levels = int(description["levels"])
        if not 1 <= levels <= _MOST_LEVELS:
            raise ValueError(f"{levels} levels")
        names = [f"{role}_{stage}" for stage in range(levels) for role in ROLES]
        updates = SplineUpdates.of_integers({name: _points(tensors[name]) for name in names}, levels, shape)
        fixed, moving, model = (checked_matrix(tensors[name], name) for name in _MATRICES)
        fixed_brain, moving_brain = (_brain(tensors[name], shape) for name in ("fixed_brain", "moving_brain"))
        forward = SplineMap(fixed, moving, model, updates, fixed_brain, moving_brain)
        grids = {role: _grid(description["grids"][role]) for role in ("fixed", "moving")}
        made_from = description.get("made_from")
        if made_from is not None and not isinstance(made_from, dict):
            raise ValueError("made_from is no object")
    except InputError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{file}: is no exact map ({error}); {_REMEDY}") from None
    return SavedMap(forward, grids, made_from)


def read_made_from(file: Path) -> dict[str, Any] | None:
    """The provenance of a map that `predict` wrote; None if there is no such map, or none that is whole.

    Args:
        file: ``map_<pair>.safetensors``; it is compared with its checksum, but not read further.
    """
    try:
        description = _description(description_path(file))
        whole = sha256_file(file) == description.get("sha256")
    except InputError:
        return None
    made_from = description.get("made_from")
    return made_from if whole and isinstance(made_from, dict) else None


def _description(path: Path) -> dict[str, Any]:
    description = read_json(path, "the description of an exact map", _REMEDY)
    if description.get("format") != FORMAT:
        raise InputError(f"{path}: does not describe an exact map; {_REMEDY}")
    if description.get("version") != VERSION:
        raise InputError(f"{path}: has version {description.get('version')!r}, known is {VERSION}; update sitreg_lumir")
    return description


def _points(integers: Any) -> torch.Tensor:
    if integers.dtype != np.int16 or integers.ndim != 4 or integers.size == 0 or integers.min() == -(2**15):
        raise ValueError("control points are no int16 within their bound")
    return torch.from_numpy(integers)


def _brain(packed: Any, shape: tuple[int, int, int]) -> Any:
    if packed.dtype != np.uint8 or packed.ndim != 1:
        raise ValueError("a brain is no packed mask")
    return np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape).astype(np.bool_)


def _shape(values: Any) -> tuple[int, int, int]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"shape {str(values)[:60]}")
    x, y, z = values
    if not all(1 <= size <= _LARGEST_SIZE for size in (x, y, z)):
        raise ValueError(f"shape {(x, y, z)}")
    return x, y, z


def _grid(entry: dict[str, Any]) -> Grid:
    return _shape(entry["shape"]), checked_matrix(entry["affine"], "affine")
