"""Registers two scans, whatever their headers, fields of view and contrasts."""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import Matrix
from sitreg_lumir.io.atomic import alone
from sitreg_lumir.io.bounded import recorded_checksums
from sitreg_lumir.io.itk import load_affine
from sitreg_lumir.io.json_file import json_values
from sitreg_lumir.network.sitreg import Update
from sitreg_lumir.preprocessing.strip import HeadStrip
from sitreg_lumir.preprocessing.template import check_model_world, load_template
from sitreg_lumir.registration.linear import TransformKind, no_updates, register_linearly
from sitreg_lumir.registration.made_from import made_from
from sitreg_lumir.registration.model import Model, load_model
from sitreg_lumir.registration.objective import ImagePair
from sitreg_lumir.registration.optimise import Optimised, optimise
from sitreg_lumir.registration.options import RegisterOptions
from sitreg_lumir.registration.outputs import check_folder
from sitreg_lumir.registration.pair import ModelPair, finer_factor, meet_half_way, pair_on_finer_grid, pair_on_grid
from sitreg_lumir.registration.placed_scans import PlacedScans
from sitreg_lumir.registration.result import Registration
from sitreg_lumir.registration.scan import Align, PlacedScan
from sitreg_lumir.registration.summary import summarise
from sitreg_lumir.registration.uncertainty import check_members, spread_of_members

Scans: TypeAlias = tuple[PlacedScan, PlacedScan]
Prealigns: TypeAlias = tuple[Matrix, Matrix]
_log = logging.getLogger(__name__)


def register(
    fixed: str | Path,
    moving: str | Path,
    out: str | Path | None = None,
    *,
    model: Model | str | Path | None = None,
    fixed_mask: str | Path | None = None,
    moving_mask: str | Path | None = None,
    align: Align = "auto",
    initial_transform: str | Path | None = None,
    fixed_to_template: str | Path | None = None,
    moving_to_template: str | Path | None = None,
    refine: int = 0,
    refine_similarity: str = "lncc",
    refine_mm: float | None = None,
    fixed_lesion: str | Path | None = None,
    moving_lesion: str | Path | None = None,
    header: str | None = None,
    assume_orientation: str | None = None,
    padding_mm: float = 0.0,
    uncertainty: bool = False,
    report: bool = True,
    overwrite: bool = False,
    save: str | Sequence[str] | None = None,
    transform: TransformKind = "deformable",
    strip: HeadStrip | None = None,
) -> Registration:
    """Registers the moving scan onto the fixed scan, and at once the fixed scan onto the moving scan.

    Args:
        fixed: NIfTI file, any orientation, voxel size, field of view and contrast; or ``MNI152``, the
            template; or ``EXAMPLE-T1``, ``EXAMPLE-T2``, which come with the package.
        moving: NIfTI file, any orientation, voxel size, field of view and contrast; or one of these names.
        out: folder for all results (see :meth:`Registration.save`); None writes nothing.
        model: of :func:`load_model`, or files of members; by default those that come with the package.
        fixed_mask: mask of the fixed scan's brain, NIfTI; without one the scan must be skull-stripped.
        moving_mask: mask of the moving scan's brain, NIfTI; without one the scan must be skull-stripped.
        align: how each scan is aligned to MNI152, independently: ``auto`` aligns it where that is needed, ``each``
            always, ``none`` never (the headers place both scans in MNI152's world).
        initial_transform: ITK affine from the fixed to the moving world: the alignments are changed to agree with it.
        fixed_to_template: ITK affine that takes the fixed scan's points to MNI152, instead of aligning it.
        moving_to_template: ITK affine that takes the moving scan's points to MNI152, instead of aligning it.
        refine: steps of instance optimisation for this pair after the prediction; 40 is a good start.
        refine_similarity: what ``refine`` increases, for any contrasts: ``lncc``, the local correlation of intensities
            (after contrast transfer where contrasts differ), or ``mind``, which gains less and stays nearer the
            prediction.
        refine_mm: voxel size at which ``refine`` compares the scans in its last quarter, beside the model's: 1 pays for
            scans of 1 mm, in twice the time. It must divide the model's.
        fixed_lesion: mask of what has no counterpart in the moving scan, left out of the similarity that ``refine``
            increases.
        moving_lesion: mask of what has no counterpart in the fixed scan, likewise left out.
        header: ``sform`` or ``qform``: the one to use, in every file, if they differ.
        assume_orientation: letters such as ``RAS``, for files whose header does not say where the axes point to.
        padding_mm: border of the transforms beyond their image, mm.
        uncertainty: also run each member alone, on mirrored images too, and report how far their fields differ.
        report: also write ``report.html``.
        overwrite: replace an earlier registration in ``out``.
        save: which outputs ``out`` gets, by their names (see :meth:`Registration.save`).
        transform: ``deformable``; or ``rigid`` or ``affine``, for the scans to one another, without a network: between
            two scans of one person, say.
        strip: for scans of whole heads without a mask: ``deepbet`` (T1; the extra ``[strip]``), or ``template``, which
            is some millimetres off; scans that show the brain alone stay as they are. The masks are written, too.

    Returns:
        the :class:`Registration`.

    Raises:
        InputError: a file cannot be used, the scans do not fit the model, or the folder cannot be written.

    Examples:
        >>> registration = sitreg_lumir.register("EXAMPLE-T1", "EXAMPLE-T2")
        >>> registration.verdict
        'ok'
    """
    options = RegisterOptions(
        fixed_mask=fixed_mask,
        moving_mask=moving_mask,
        align=align,
        initial_transform=initial_transform,
        fixed_to_template=fixed_to_template,
        moving_to_template=moving_to_template,
        refine=refine,
        refine_similarity=refine_similarity,
        refine_mm=refine_mm,
        fixed_lesion=fixed_lesion,
        moving_lesion=moving_lesion,
        header=header,
        assume_orientation=assume_orientation,
        padding_mm=padding_mm,
        uncertainty=uncertainty,
        report=report,
        overwrite=overwrite,
        save=save,
        transform=transform,
        strip=strip,
    )
    return register_scans(fixed, moving, out, model, options)


def register_scans(
    fixed: str | Path,
    moving: str | Path,
    out: str | Path | None,
    model: Model | str | Path | None,
    options: RegisterOptions,
    placed: PlacedScans | None = None,
) -> Registration:
    """Does what :func:`register` does, with its options in one object; ``placed`` places scans that pairs share.

    Raises:
        InputError: a file cannot be used, the scans do not fit the model, or the folder cannot be written.
    """
    if out is None:
        return _register_scans(fixed, moving, None, model, options, placed)
    check_folder(Path(out), options.overwrite)  # before the work, not after it
    with alone(Path(out)):
        return _register_scans(fixed, moving, out, model, options, placed)


def _register_scans(
    fixed: str | Path,
    moving: str | Path,
    out: str | Path | None,
    model: Model | str | Path | None,
    options: RegisterOptions,
    placed: PlacedScans | None,
) -> Registration:
    """Does what :func:`register_scans` does, in a folder that can be written to."""
    model = model if isinstance(model, Model) else load_model(model)
    check_model_world(load_template(), model.shape, model.affine, str(model.files[0]))
    if options.uncertainty:
        check_members(model)
    factor = None if options.refine_mm is None else finer_factor(model, options.refine_mm)
    seconds: dict[str, float] = {}
    with _timed(seconds, "read and align"), recorded_checksums() as read:
        scans, prealigns = _read(fixed, moving, options, placed or PlacedScans())
    linear = None
    if options.transform != "deformable":
        with _timed(seconds, options.transform):
            linear = register_linearly(*scans, prealigns, rigid=options.transform == "rigid")
            prealigns = meet_half_way(*prealigns, linear.matrix)
    with _timed(seconds, "read and align"):
        pair = pair_on_grid(model, *scans, *prealigns)
    refined, updates = None, None
    if linear is None:
        with _timed(seconds, "predict"):
            updates = model.control_points(fixed=pair.fixed, moving=pair.moving)
        _log.info("control points by %s in %.1f s", model, seconds["predict"])
    if options.refine and updates is not None:
        with _timed(seconds, "refine"):
            finer = None if factor is None else pair_on_finer_grid(model, factor, *scans, *prealigns)
            optimised = optimise_pair(model, pair, updates, options.refine, options.refine_similarity, finer)
            updates, refined = list(optimised.control_points), _describe(optimised, options)
        _log.info("refined in %.1f s, %d of %d steps of use", seconds["refine"], optimised.steps, options.refine)
    with _timed(seconds, "measure"):
        fixed_brain, moving_brain = (brain[0, 0].numpy() for brain in (pair.fixed_brain, pair.moving_brain))
        rounded = no_updates(model.shape, 1) if updates is None else SplineUpdates.rounded(updates, model.shape)
        forward = SplineMap(*prealigns, model.affine, rounded, fixed_brain, moving_brain)
        spread = spread_of_members(model, pair) if options.uncertainty else None
        registration = Registration(*scans, model, forward, spread)
        registration.summary.update(summarise(registration, pair, align=options.align, refined=refined, linear=linear))
    registration.summary["made_from"] = made_from(fixed, moving, options, model, read)
    registration.summary["seconds"] = json_values(seconds, 6)
    if out is not None:
        registration.save(
            out, padding_mm=options.padding_mm, report=options.report, overwrite=options.overwrite, save=options.save
        )
    return registration


def _read(
    fixed: str | Path, moving: str | Path, options: RegisterOptions, placed_scans: PlacedScans
) -> tuple[Scans, Prealigns]:
    """Both scans, each placed independently, and the alignments to use: each scan's world -> the model's world."""
    files = options.scan_files("fixed", fixed), options.scan_files("moving", moving)
    place = partial(
        placed_scans.place, align=options.align, header=options.header, assume_orientation=options.assume_orientation
    )
    with ThreadPoolExecutor(min(2, torch.get_num_threads())) as threads:  # ITK and scipy compute on a single one
        results = [threads.submit(copy_context().run, place, scan) for scan in files]  # which records checksums
        placed = {scan.role: result.result() for scan, result in zip(files, results, strict=True)}
    for role, scan in placed.items():
        _log.info("%s %s: %s", role, scan.name, scan.how)
    scans = placed["fixed"], placed["moving"]
    prealigns = scans[0].prealign, scans[1].prealign
    if options.initial_transform is not None:
        path = Path(options.initial_transform)
        grids = (scans[0].shape, scans[0].affine), (scans[1].shape, scans[1].affine)
        prealigns = meet_half_way(*prealigns, load_affine(path, grids))
        _log.info("both alignments changed to agree with %s", path.name)
    return scans, prealigns


def optimise_pair(
    model: Model,
    pair: ModelPair,
    updates: Sequence[Update],
    steps: int,
    similarity: str,
    finer: ImagePair | None = None,
) -> Optimised:
    """Optimises the predicted control points for one pair.

    With ``lncc``, smoothness has the weight of the model's training; with ``mind``, whose scale differs, it has 1.

    Args:
        model: that predicted them.
        pair: the images.
        updates: of :meth:`Model.control_points`.
        steps: of the optimisation.
        similarity: ``lncc`` or ``mind``.
        finer: the images on a finer grid, which are compared as well.
    """
    member = model.members[0]

    def on_device(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(model.device)

    return optimise(
        [(first.float().clone(), second.float().clone()) for first, second in updates],
        fixed=pair.fixed.to(model.device),
        moving=pair.moving.to(model.device),
        fixed_mask=pair.fixed_brain.to(model.device),
        moving_mask=pair.moving_brain.to(model.device),
        fixed_lesion=on_device(pair.fixed_lesion),
        moving_lesion=on_device(pair.moving_lesion),
        finer=None if finer is None else finer.to(model.device),
        steps=steps,
        similarity=similarity,
        mind=member.mind,
        diffusion_weight=member.card.diffusion_weight if similarity == "lncc" else 1.0,
        bound_multiplier=member.card.architecture.get("bound_multiplier", 0.99),
    )


def _describe(optimised: Optimised, options: RegisterOptions) -> dict[str, Any]:
    """The summary's entry on instance optimisation; its similarities are local correlations, higher is better."""
    before, after = (-value for value in optimised.dissimilarity)
    return {
        "steps": options.refine,
        "best_step": optimised.steps,
        "of": options.refine_similarity,
        "finer_mm": options.refine_mm,
        "carried_over": optimised.contrasts_transferred,
        "similarity_before": before,
        "similarity_after": after,
    }


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Adds the duration of a block to that of a step."""
    start = time.perf_counter()
    yield
    seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start
