"""What `predict` leaves in a folder: fields with their provenance, and on request what may lie beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.challenge.provenance import Provenance, compare, make_provenance, plan_fields, save_field
from sitreg_lumir.data.images import Pair
from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.spline_map import Mask, SplineMap
from sitreg_lumir.io.checksum import file_entry
from sitreg_lumir.io.maps import SUFFIX, description_path, read_made_from, save_map
from sitreg_lumir.io.read import read_affine
from sitreg_lumir.io.write import save_disp, save_volume

ALSO = ("inverse", "warped", "disagreement", "map")  # what may lie beside a field, as <kind>_<pair>.nii.gz
EXACT = "exact"  # of a provenance's options: the field is sampled from the exact map


class PairPlan(NamedTuple):
    """What is to be written for one pair, and where.

    Attributes:
        pair: the images.
        path: of the field.
        provenance: of the field.
        skip: all that is wanted is there already.
    """

    pair: Pair
    path: Path
    provenance: Provenance
    skip: bool

    def beside(self, kind: str) -> Path:
        """The file of the inverse field, the moved image, the disagreement or the map."""
        return map_path(self.path) if kind == "map" else self.path.with_name(_renamed(self.path, kind))

    def is_there(self, kind: str) -> bool:
        """Whether such a file is there; a map only if it is whole and was made from what the field is to be made from.

        Whether the field is sampled from the map makes no difference to the map.
        """
        if kind != "map":
            return self.beside(kind).is_file()
        made_from = read_made_from(self.beside(kind))
        return made_from is not None and not compare(made_from, of_map(self.provenance))


def map_path(field: Path) -> Path:
    """``map_X.safetensors`` for ``disp_X.nii.gz``."""
    return field.with_name(_renamed(field, "map").removesuffix(".gz").removesuffix(".nii") + SUFFIX)


def _renamed(field: Path, kind: str) -> str:
    return f"{kind}_{field.name.removeprefix('disp_')}"


def of_map(provenance: Provenance) -> Provenance:
    """The provenance of a map, from that of the field beside it: maps do not depend on how fields are sampled."""
    options = {name: value for name, value in options_of(provenance).items() if name != EXACT}
    kept = {entry: value for entry, value in provenance.items() if entry not in ("field", "tf32")}
    return kept | {"options": options}


def options_of(provenance: Provenance | None) -> dict[str, Any]:
    """The options of a provenance, none where nothing is known of them."""
    options = None if provenance is None else provenance.get("options")
    return dict(options) if isinstance(options, dict) else {}


class PairUpdates(NamedTuple):
    """What a pair's exact map is made of: control points, and ``(X, Y, Z)`` where each image is above 0."""

    updates: SplineUpdates
    fixed_brain: Mask
    moving_brain: Mask

    def between(self, fixed_affine: NDArray[np.float64], moving_affine: NDArray[np.float64]) -> SplineMap:
        """The map from the fixed to the moving world.

        Args:
            fixed_affine: ``(4, 4)`` voxel-to-world matrix of the fixed image, RAS, mm.
            moving_affine: ``(4, 4)`` of the moving image, whose voxels the control points lead to.
        """
        moving_to_model = fixed_affine @ np.linalg.inv(moving_affine)
        return SplineMap(np.eye(4), moving_to_model, fixed_affine, *self)


def plan_predictions(
    folder: Path,
    pairs: Sequence[Pair],
    members: Sequence[Path],
    options: Mapping[str, Any],
    also: Sequence[str] = (),
    *,
    overwrite: bool = False,
) -> list[PairPlan]:
    """Decides for each pair where its field goes and whether it is there already.

    Args:
        folder: need not exist.
        pairs: to be registered.
        members: files of the weights.
        options: plain values that change the field.
        also: which of :data:`ALSO` are wanted, too.
        overwrite: make fields again whose provenance differs.

    Raises:
        InputError: without ``overwrite``, a field is there that was made otherwise.
    """
    entries = [file_entry(member) for member in members]
    provenances = {pair: make_provenance(pair, entries, options) for pair in pairs}
    plans = []
    for pair, path, skip in plan_fields(folder, pairs, provenances.__getitem__, overwrite=overwrite):
        plan = PairPlan(pair, path, provenances[pair], skip)
        complete = skip and all(plan.is_there(kind) for kind in also)
        plans.append(plan._replace(skip=complete))
    return plans


def write_prediction(plan: PairPlan, arrays: Mapping[str, NDArray[Any]], exact: PairUpdates | None = None) -> None:
    """Writes one pair's results; the field with its provenance comes last, so that a crash leaves the pair undone.

    Args:
        plan: where.
        arrays: ``disp`` ``(3, X, Y, Z)``, voxels, fixed grid; perhaps ``inverse`` (the same on the moving grid),
            ``warped`` ``(X, Y, Z)`` and ``disagreement`` ``(X, Y, Z)``, voxels, which becomes mm on disk. What is
            not given is removed if an earlier run left it.
        exact: what the map is made of, if it is wanted.

    Raises:
        InputError: a file cannot be written, or a disagreement is given and the voxels are no cubes.
    """
    plan.path.parent.mkdir(parents=True, exist_ok=True)
    fixed, moving = (read_affine(image.path) for image in (plan.pair.fixed, plan.pair.moving))
    if "inverse" in arrays:
        save_disp(plan.beside("inverse"), arrays["inverse"], moving)
    if "warped" in arrays:
        save_volume(plan.beside("warped"), arrays["warped"], fixed, compresslevel=1)
    if "disagreement" in arrays:
        spread = arrays["disagreement"] * voxel_size(fixed, plan.pair.fixed.path)
        save_volume(plan.beside("disagreement"), spread, fixed, compresslevel=1)
    if exact is not None:
        grids = {"fixed": (exact.updates.shape, fixed), "moving": (exact.updates.shape, moving)}
        save_map(plan.beside("map"), exact.between(fixed, moving), grids, of_map(plan.provenance))
    else:
        description_path(plan.beside("map")).unlink(missing_ok=True)
    for kind in ALSO:
        if kind not in arrays and not (kind == "map" and exact is not None):
            plan.beside(kind).unlink(missing_ok=True)
    save_field(plan.path, arrays["disp"], fixed, plan.provenance)


def voxel_size(affine: NDArray[np.float64], path: Path) -> float:
    """The edge of a voxel, mm.

    Args:
        affine: ``(4, 4)`` voxel-to-world matrix, RAS, mm.
        path: the image it comes from, for the error.

    Raises:
        InputError: the voxels are no cubes (to 1 %), so that one number does not turn voxels into mm.
    """
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if sizes.max() > 1.01 * sizes.min():
        edges = " x ".join(f"{size:g}" for size in sizes)
        raise InputError(f"{path}: its voxels are {edges} mm, a disagreement needs cubes; leave out --disagreement")
    return float(sizes.mean())
