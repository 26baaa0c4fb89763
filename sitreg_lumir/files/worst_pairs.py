"""The report of an evaluated run: pictures of its worst pairs, from the images and fields on disk."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sitreg_lumir.data.lumir import LumirDataset
from sitreg_lumir.data.volumes import read_volume
from sitreg_lumir.deform.jacobian import jacobian_determinant
from sitreg_lumir.deform.ops import warp
from sitreg_lumir.errors import InputError
from sitreg_lumir.files.evaluate import Evaluation
from sitreg_lumir.files.nifti import load_disp
from sitreg_lumir.files.scans import read_image
from sitreg_lumir.report.pictures import Volumes
from sitreg_lumir.report.report import write_run_report
from sitreg_lumir.report.scores import worst_pairs

Floats = NDArray[np.float32]

_MOST = 9  # pairs with pictures, whatever the number of groups: about 2 MB each at 1 mm


def report_evaluation(
    file: str | Path,
    evaluation: Evaluation,
    datasets: Sequence[LumirDataset],
    folder: str | Path | None,
    *,
    pairs: int = 3,
) -> None:
    """Writes the report of a run with pictures of its worst pairs, and says so.

    Args:
        file: where the page goes.
        evaluation: what ``evaluate`` returned for these data sets and this folder.
        datasets: with the images.
        folder: of the fields; None where the images were scored as they are.
        pairs: of each group, that get pictures; nine in all at most, shared evenly.

    Raises:
        InputError: an image or a field cannot be read any more, or the page not be written.

    Examples:
        >>> dataset = sitreg_lumir.read_dataset("LUMIR", validation=True)
        >>> evaluation = sitreg_lumir.evaluate(None, [dataset], identity=True)
               pairs ...
        >>> sitreg_lumir.report_evaluation("report.html", evaluation, [dataset], None)
        written: report.html...
    """
    fields = None if folder is None else Path(folder)
    write_run_report(Path(file), evaluation, _pictures(evaluation, datasets, fields, pairs))
    print(f"written: {file}")


def _pictures(
    evaluation: Evaluation, datasets: Sequence[LumirDataset], folder: Path | None, count: int
) -> Iterator[tuple[str, Volumes]]:
    """Name and volumes of each of the worst pairs, one after the other."""
    by_name = {pair.long_name: (pair, dataset.shape) for dataset in datasets for pair in dataset.validation}
    fields = {case["pair"]: case["field"] for case in evaluation.cases}
    groups = len({case["group"] for case in evaluation.cases})
    each = min(count, max(1, _MOST // max(groups, 1)))  # so that no group is left without
    for name in worst_pairs(evaluation.cases, each)[:_MOST]:
        pair, shape = by_name[name]
        fixed, affine = read_volume(pair.fixed.path, shape=shape)
        moving, _ = read_volume(pair.moving.path, shape=shape)
        size = [float(step) for step in np.linalg.norm(affine[:3, :3], axis=0)]
        field = None if folder is None else folder / fields[name]
        disp = np.zeros((3, *shape), dtype=np.float32) if field is None else load_disp(field, shape=shape)[0]
        volumes = Volumes(
            fixed=fixed,
            moving=moving,
            warped=moving if field is None else _warp(moving, disp),
            disp=disp,
            jac_det=None if field is None else _jacobian(disp),
            disagreement=None if field is None else _disagreement(field, shape),
            voxel_size=(size[0], size[1], size[2]),
        )
        yield name, volumes


def _warp(moving: NDArray[np.uint8] | Floats, disp: Floats) -> Floats:
    """The moving image ``(X, Y, Z)`` on the fixed grid; ``disp`` is ``(3, X, Y, Z)``, voxels, fixed grid."""
    stored = torch.from_numpy(moving).float()[None, None]
    warped: Floats = warp(stored, torch.from_numpy(disp)[None])[0, 0].numpy()
    return warped


def _jacobian(disp: Floats) -> Floats:
    """The determinant on the whole grid ``(X, Y, Z)``, no unit; NaN at its border."""
    full = np.full(disp.shape[1:], np.nan, dtype=np.float32)
    full[1:-1, 1:-1, 1:-1] = jacobian_determinant(torch.from_numpy(disp)[None])[0].numpy()
    return full


def _disagreement(field: Path, shape: tuple[int, int, int]) -> Floats | None:
    """The map that ``predict --disagreement`` wrote beside a field, ``(X, Y, Z)``, mm; None if there is none."""
    path = field.with_name(f"disagreement_{field.name.removeprefix('disp_')}")
    if not path.is_file():
        return None
    values = read_image(path, allow_constant=True).data
    if values.shape != shape:
        raise InputError(f"{path}: the shape is {values.shape}, the field's is {shape}; remove or predict it again")
    return values.astype(np.float32)
