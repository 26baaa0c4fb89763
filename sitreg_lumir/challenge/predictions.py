"""What `predict` leaves in a folder: fields with their provenance, and on request what may lie beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.challenge.provenance import Provenance, make_provenance, plan_fields, save_field
from sitreg_lumir.data.lumir import Pair
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.checksum import file_entry
from sitreg_lumir.io.read import read_affine
from sitreg_lumir.io.write import save_disp, save_volume

ALSO = ("inverse", "warped", "disagreement")  # what may lie beside a field, as <kind>_<pair>.nii.gz


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
        """The file of the inverse field, the moved image or the disagreement."""
        return self.path.with_name(f"{kind}_{self.path.name.removeprefix('disp_')}")


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
        complete = skip and all(plan.beside(kind).is_file() for kind in also)
        plans.append(plan._replace(skip=complete))
    return plans


def write_prediction(plan: PairPlan, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes one pair's results; the field with its provenance comes last, so that a crash leaves the pair undone.

    Args:
        plan: where.
        arrays: ``disp`` ``(3, X, Y, Z)``, voxels, fixed grid; perhaps ``inverse`` (the same on the moving grid),
            ``warped`` ``(X, Y, Z)`` and ``disagreement`` ``(X, Y, Z)``, voxels, which becomes mm on disk. What is
            not given is removed if an earlier run left it.

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
    for kind in ALSO:
        if kind not in arrays:
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
