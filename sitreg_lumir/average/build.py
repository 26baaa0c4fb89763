"""Builds an unbiased average brain of many scans, and writes it with each scan's map to it."""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sitreg_lumir import __version__
from sitreg_lumir.average.mean_shape import mean_size
from sitreg_lumir.average.options import Average, TemplateOptions
from sitreg_lumir.average.outputs import WORK, Results, check_output, finished, save_template
from sitreg_lumir.average.rounds import Reference, Registered, Rounds, measures
from sitreg_lumir.average.sampling import Grid
from sitreg_lumir.average.subjects import Subject, Subjects, ordered
from sitreg_lumir.average.work import WorkFolder
from sitreg_lumir.geometry.transforms import Matrix, transform_by
from sitreg_lumir.io.atomic import alone
from sitreg_lumir.preprocessing.intensity import Mask, conform, inverse
from sitreg_lumir.preprocessing.strip import HeadStrip
from sitreg_lumir.preprocessing.template import LUMIR_CENTRE, check_model_world, load_template
from sitreg_lumir.registration.model import Model, load_model
from sitreg_lumir.registration.scan import Align

_MARGIN_MM = 4.0  # around the brain on the template's grid
_FITS = 0.7  # of the median correlation with the template: a scan below it shows something else
_log = logging.getLogger(__name__)


def build_template(
    images: Sequence[str | Path],
    out: str | Path,
    *,
    masks: Sequence[str | Path] | None = None,
    model: Model | str | Path | None = None,
    rounds: int = 3,
    tolerance_mm: float = 0.1,
    average: Average = "trimmed",
    sharpen: float = 0.5,
    spacing_mm: float | None = None,
    refine: int = 0,
    align: Align = "each",
    header: str | None = None,
    assume_orientation: str | None = None,
    strip: HeadStrip | None = None,
    save: str | Sequence[str] = "maps",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes an average brain whose size and shape are the mean of the scans', led by none of them and by no atlas.

    ``out`` gets ``template.nii.gz``, its brain, the standard deviation between the scans, the affine mean that the
    rounds began with, ``summary.json`` and ``picture.png``, and what ``save`` asks for. What was computed of each scan
    is kept in ``out/work`` until all is written, so that a run that was stopped goes on. The order of the images
    changes nothing.

    Args:
        images: two or more scans of one contrast, of different brains: any orientation, voxel size and field of view.
        out: folder.
        masks: a brain mask for each image, in their order; without masks scans must be skull-stripped.
        model: of :func:`load_model`, or files of members; by default those that come with the package.
        rounds: of registering all scans to the mean and averaging them again, at most.
        tolerance_mm: a round whose mean map moves the brain by less, or differs from the last round's by less, mean
            over the brain, is the last.
        average: of the intensities at each voxel: ``trimmed`` (without a tenth at each end), ``mean`` or ``median``.
        sharpen: amount of unsharp masking (Gaussian of 2 mm) after each round; 0 for none.
        spacing_mm: voxel size of the template; by default the model's. Scans are sampled at it from their exact maps.
        refine: steps of instance optimisation for each registration.
        align: how each scan is aligned to MNI152 at first: ``each``; ``auto``, only where it is needed; ``none``.
        header: ``sform`` or ``qform``: the one to use, in every file, if they differ.
        assume_orientation: letters such as ``RAS``, for files whose header does not say where the axes point to.
        strip: for scans of whole heads without masks: ``deepbet`` (T1), or ``template``, which is some mm off.
        save: what is written of each scan: ``maps`` (its exact map to the template, for ``apply``), ``warped`` (the
            scan on the template's grid), ``all`` or ``none``.
        overwrite: replace a template in ``out`` that was made otherwise.

    Returns:
        the summary, as ``summary.json`` holds it.

    Raises:
        InputError: a scan cannot be used, two are the same, their contrasts differ, or the folder cannot be written.

    Examples:
        >>> scans = ["MNI152", "EXAMPLE-T1"]
        >>> summary = sitreg_lumir.build_template(scans, "average", rounds=1, align="none", save="none")
        >>> len(summary["rounds"]), summary["grid"]["shape"]
        (1, [80, 112, 96])
    """
    options = TemplateOptions(
        rounds=rounds,
        tolerance_mm=tolerance_mm,
        average=average,
        sharpen=sharpen,
        spacing_mm=spacing_mm,
        refine=refine,
        align=align,
        header=header,
        assume_orientation=assume_orientation,
        strip=strip,
        save=save,
    )
    return build(images, masks, Path(out), model, options, overwrite=overwrite)


def build(
    images: Sequence[str | Path],
    masks: Sequence[str | Path] | None,
    out: Path,
    model: Model | str | Path | None,
    options: TemplateOptions,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Does what :func:`build_template` does, with its options in one object."""
    check_output(out)
    with alone(out):
        return _build(images, masks, out, model, options, overwrite=overwrite)


def _build(
    images: Sequence[str | Path],
    masks: Sequence[str | Path] | None,
    out: Path,
    model: Model | str | Path | None,
    options: TemplateOptions,
    *,
    overwrite: bool,
) -> dict[str, Any]:
    began = time.perf_counter()
    model = model if isinstance(model, Model) else load_model(model)
    check_model_world(load_template(), model.shape, model.affine, str(model.files[0]))
    work = WorkFolder(out / WORK)
    subjects = Subjects(images, masks, model, options, work)
    made_from = _made_from(subjects, model, options)
    before = finished(out, made_from, overwrite)
    if before is not None:
        _log.info("%s: is there already, made from the same scans with the same options", out)
        return before
    check_output(out, write=True)
    count = len(subjects.entries)
    placed = []
    for number in range(count):
        placed.append(subjects.place(number))
        _log.info("scan %d of %d, %s: %s", number + 1, count, placed[-1].name, placed[-1].how)
    scans = ordered(placed)
    run = Rounds(scans, subjects, model, options, work, _Progress(count))
    mean = run.affine_mean(run.grid)
    history: list[dict[str, Any]] = []
    earlier: Registered | None = None
    size = mean_size([scan.prealign for scan in scans])
    while True:
        number = len(history) + 1
        registered = run.register(Reference(mean.image, mean.brain), f"round {number}, registering")
        shift, change = run.shift_of(registered), None if earlier is None else run.change_of(registered, earlier)
        settled = min(shift["mean"], shift["mean"] if change is None else change) < options.tolerance_mm
        last = number == options.rounds or settled
        earlier = registered
        grid = _output_grid(mean.brain, model, size, options.spacing_mm) if last else run.grid
        mean, facts = run.average(registered, grid, f"round {number}, averaging")
        history.append(
            {"mean_displacement_mm": shift, "changed_mm": change, "left_mm": facts["left_mm"]}
            | {"displacement_mm": float(np.mean(facts["displacement_mm"])), **measures(mean, grid)}
        )
        _log.info(
            "round %d: the mean moved by %.2f mm (scans by %.2f mm), gradient %.4f per mm",
            number, shift["mean"], history[-1]["displacement_mm"], history[-1]["averaged"]["gradient_per_mm"],
        )  # fmt: skip
        if last:
            break
    affine = run.affine_mean(grid)
    closing = _register_to_template(run, mean.image, mean.brain, grid) if options.saved else None
    summary = {
        "scans": _describe(scans, facts),
        "rounds": history,
        "affine_mean": measures(affine, grid),
        "final_mean_displacement_mm": None if closing is None else run.shift_of(closing),
        "grid": {"shape": list(grid.shape), "spacing_mm": grid.spacing.tolist(), "affine": grid.affine.tolist()},
        "template_to_MNI152": grid.to_model.tolist(),
        "made_from": made_from,
        "seconds": time.perf_counter() - began,
    }
    save_template(out, Results(mean, affine, grid, run, closing), summary, options.saved)
    return summary


class _Progress:
    """Reports what is done of each scan."""

    def __init__(self, count: int) -> None:
        self.count, self.label, self.number = count, "", 0

    def __call__(self, label: str, scan: Subject) -> None:
        self.number = self.number + 1 if label == self.label else 1
        self.label = label
        _log.info("%s: %d of %d, %s", label, self.number, self.count, scan.name)


def _register_to_template(run: Rounds, image: Any, brain: Mask, grid: Grid) -> Registered:
    """All scans registered to the finished template, as `register` does with its file."""
    model = run.model
    on_grid, its_brain = conform(image, grid.affine, brain, grid.to_model, model.shape, model.affine, "the template")
    return run.register(Reference(on_grid, its_brain), "maps to the template")


def _output_grid(brain: Mask, model: Model, size: Matrix, spacing_mm: float | None) -> Grid:
    """The template's grid: the model's field of view, larger where the brain needs it."""
    spacing = model.spacing if spacing_mm is None else spacing_mm
    extent = np.array(model.shape) * np.linalg.norm(model.affine[:3, :3], axis=0)
    order = np.argmax(np.abs(model.affine[:3, :3]), axis=1)  # the model's axis along each of the world's
    centre = transform_by(inverse(size), LUMIR_CENTRE[:, None])[:, 0]
    world = transform_by(inverse(size) @ model.affine, np.argwhere(brain).T.astype(np.float64))
    reach = 2 * (np.abs(world - centre[:, None]).max(axis=1) + _MARGIN_MM)
    shape = np.ceil(np.maximum(extent[order], reach) / spacing - 1e-6).astype(int)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = centre - spacing * (shape - 1) / 2
    x, y, z = (int(length) for length in shape)
    return Grid((x, y, z), affine, size)


def _describe(scans: Sequence[Subject], facts: dict[str, Any]) -> list[dict[str, Any]]:
    typical = float(np.median(facts["correlation"]))
    described = [
        {
            "name": scan.name,
            **scan.entries,
            "alignment": scan.how,
            "to_MNI152": scan.prealign.tolist(),
            "displacement_mm": displacement,
            "correlation": correlation,
            "fits": correlation > _FITS * typical,
        }
        for scan, displacement, correlation in zip(scans, facts["displacement_mm"], facts["correlation"], strict=True)
    ]
    return sorted(described, key=lambda entry: str(entry["name"]))


def _made_from(subjects: Subjects, model: Model, options: TemplateOptions) -> dict[str, Any]:
    """Equal entries mean equal results; the order of the images is none of them."""
    return {
        "files": sorted(subjects.entries, key=lambda entry: os.fspath(entry["image"]["sha256"])),
        "options": options.of_results,
        "members": [dict(entry) for entry in model.checksums],
        "precision": model.precision,
        "flip": model.flip,
        "version": __version__,
    }
