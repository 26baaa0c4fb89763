"""Registers two scans, whatever their headers, fields of view and contrasts."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sitreg_lumir.deform.ops import invert
from sitreg_lumir.errors import InputError
from sitreg_lumir.files.chain import Chain, Matrix, swap
from sitreg_lumir.files.transforms import load_affine
from sitreg_lumir.measures.losses import ndv_sum
from sitreg_lumir.network.sitreg import Stage
from sitreg_lumir.prepare.conform import conform, mask_on_grid
from sitreg_lumir.prepare.frame import check_frame, load_frame
from sitreg_lumir.registration.model import Model, as_tensor, load_model
from sitreg_lumir.registration.numbers import ModelPair, plain
from sitreg_lumir.registration.refine import SIMILARITIES, Refined, control_points_of
from sitreg_lumir.registration.refine import refine as refine_control_points
from sitreg_lumir.registration.result import Registration
from sitreg_lumir.registration.sides import ALIGN, MNI152, Align, Given, Side, meet_half_way, read_side
from sitreg_lumir.registration.summary import summarise

_INVERSION_VOXELS = 1e-4
_FOLDED = 1e-4  # share of the volume that may fold for the sake of a smaller inverse error
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
    fixed_lesion: str | Path | None = None,
    moving_lesion: str | Path | None = None,
    header: str | None = None,
    assume_orientation: str | None = None,
    padding_mm: float = 0.0,
    report: bool = True,
    overwrite: bool = False,
) -> Registration:
    """Registers the moving scan onto the fixed scan; symmetric, so both directions come at once.

    Args:
        fixed: NIfTI file, any orientation, voxel size, field of view and contrast; or ``MNI152``, the
            template; or ``EXAMPLE-T1``, ``EXAMPLE-T2``, which come with the package.
        moving: the same.
        out: folder for all results (see :meth:`Registration.save`); None writes nothing.
        model: of :func:`load_model`, or files of members; by default those that come with the package.
        fixed_mask: mask of the fixed scan's brain, NIfTI; without one the scan must be skull-stripped.
        moving_mask: of the moving scan's.
        align: how each scan gets to the model's frame, by itself: ``auto`` aligns where it is needed, ``each`` always,
            ``none`` never (the headers place both in the MNI152 frame).
        initial_transform: ITK affine from the fixed to the moving world: the alignments are made to agree with it.
        fixed_to_template: ITK affine that takes the fixed scan's points to MNI152, instead of aligning it.
        moving_to_template: the same for the moving scan.
        refine: steps of optimisation for this very pair after the prediction; 40 is a good start.
        refine_similarity: what ``refine`` raises, for any contrasts: ``lncc``, the local correlation of intensities,
            carried over to the other scan's contrast, or ``mind``, which gains less and stays nearer the prediction.
        fixed_lesion: mask of what has no counterpart in the moving scan, left out of the similarity that ``refine``
            raises.
        moving_lesion: the same for the moving scan.
        header: ``sform`` or ``qform``: the one to use, in every file, if they differ.
        assume_orientation: letters such as ``RAS``, of files whose header does not say where the axes point to.
        padding_mm: border of the transforms beyond their image, mm.
        report: also write ``report.html``.
        overwrite: replace an earlier registration in ``out``.

    Returns:
        the :class:`Registration`.

    Raises:
        InputError: a file cannot be used, the scans do not fit the model, or the folder cannot be written.

    Examples:
        >>> registration = sitreg_lumir.register("EXAMPLE-T1", "EXAMPLE-T2")
        >>> registration.verdict
        'ok'
    """
    if align not in ALIGN:
        raise InputError(f"--align {align}: must be auto, each or none")
    if refine < 0:
        raise InputError(f"--refine {refine}: must be 0 or more steps")
    if refine_similarity not in SIMILARITIES:
        raise InputError(f"--refine-similarity {refine_similarity}: must be lncc or mind")
    if refine == 0 and (fixed_lesion or moving_lesion):
        raise InputError("--fixed-lesion, --moving-lesion: leave a lesion out of --refine N; add it")
    if not 0 <= padding_mm < 1000:
        raise InputError(f"--padding {padding_mm:g}: must be 0 or more mm")
    if out is not None:
        from sitreg_lumir.registration.outputs import check_folder

        check_folder(Path(out), overwrite)  # before the work, not after it
    network = model if isinstance(model, Model) else load_model(model)
    check_frame(load_frame(), network.shape, network.affine, str(network.files[0]))
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    given = (
        Given(fixed, "fixed", _path(fixed_mask), _path(fixed_lesion), _path(fixed_to_template)),
        Given(moving, "moving", _path(moving_mask), _path(moving_lesion), _path(moving_to_template)),
    )
    for one in given:
        if str(one.image) == MNI152 and (one.mask or one.lesion or one.to_template):
            raise InputError(f"--{one.role} MNI152: the template has its mask and place; leave the options for it out")
    sides = [read_side(one, align, header, assume_orientation) for one in given]
    for one, side in zip(given, sides, strict=True):
        _log.info("%s %s: %s", one.role, side.name, side.how)
    prealigns = sides[0].prealign, sides[1].prealign
    if initial_transform is not None:
        prealigns = meet_half_way(*prealigns, load_affine(Path(initial_transform)))
        _log.info("both alignments changed to agree with %s", Path(initial_transform).name)
    pair = _on_model_grid(network, sides[0], sides[1], *prealigns)
    seconds["read and align"] = time.perf_counter() - start
    start = time.perf_counter()
    stages = network.run(fixed=pair.fixed, moving=pair.moving, levels=_levels(network) if refine else (0,))
    seconds["predict"] = time.perf_counter() - start
    _log.info("fields by %s in %.1f s", network, seconds["predict"])
    disp, disp_inv, refined = stages[-1].disp, stages[-1].disp_inv, None
    if refine:
        start = time.perf_counter()
        improved = refine_pair(network, pair, stages, refine, refine_similarity)
        disp, disp_inv, refined = improved.disp, improved.disp_inv, _told(improved, refine, refine_similarity)
        seconds["refine"] = time.perf_counter() - start
        _log.info("refined in %.1f s, %d of %d steps of use", seconds["refine"], improved.steps, refine)
    start = time.perf_counter()
    disp, disp_inv = closer_inverses(disp.float().cpu(), disp_inv.float().cpu())
    forward = Chain(*prealigns, network.affine, disp[0].numpy())
    disagreement = stages[-1].disagreement
    spread = None if disagreement is None else disagreement[0, 0].float().cpu().numpy()
    found = Registration(sides[0], sides[1], network, forward, swap(forward, disp_inv[0].numpy()), spread)
    found.summary.update(summarise(found, pair, align=align, refined=refined))
    seconds["measure"] = time.perf_counter() - start
    found.summary["seconds"] = plain(seconds)
    if out is not None:
        found.save(out, padding_mm=padding_mm, report=report, overwrite=overwrite)
    return found


def _on_model_grid(
    model: Model, fixed: Side, moving: Side, fixed_to_model: Matrix, moving_to_model: Matrix
) -> ModelPair:
    """Both scans as the network knows them, and the moving one where the headers alone would put it."""

    def on_grid(side: Side, prealign: Matrix) -> tuple[Tensor, Tensor]:
        values, brain = conform(side.data, side.affine, side.brain, prealign, model.shape, model.affine, side.name)
        return as_tensor(values), torch.from_numpy(brain)[None, None]

    def lesion(side: Side, prealign: Matrix) -> Tensor | None:
        if side.lesion is None:
            return None
        name = f"the lesion mask of {side.name}"
        return torch.from_numpy(mask_on_grid(side.lesion, prealign @ side.affine, model.shape, model.affine, name))[
            None, None
        ]

    try:
        as_placed = on_grid(moving, fixed_to_model)
    except InputError:  # the headers place them apart
        as_placed = None
    return ModelPair(
        *on_grid(fixed, fixed_to_model),
        *on_grid(moving, moving_to_model),
        as_placed,
        lesion(fixed, fixed_to_model),
        lesion(moving, moving_to_model),
    )


def _levels(model: Model) -> tuple[int, ...]:
    return tuple(range(model.ensemble.levels))


def refine_pair(model: Model, pair: ModelPair, stages: Sequence[Stage], steps: int, similarity: str) -> Refined:
    """The pair's control points, optimised for this pair.

    With ``lncc``, smoothness weighs what it did in the model's training, with ``mind``, whose scale is its own, 1.

    Args:
        model: that predicted them.
        pair: the images.
        stages: of :meth:`Model.run`, of all levels.
        steps: of the optimisation.
        similarity: ``lncc`` or ``mind``.
    """
    member = model.members[0]

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(model.device)

    points = control_points_of(stages, len(_levels(model)))
    return refine_control_points(
        [(first.float().clone(), second.float().clone()) for first, second in points],
        fixed=pair.fixed.to(model.device),
        moving=pair.moving.to(model.device),
        fixed_mask=pair.fixed_brain.to(model.device),
        moving_mask=pair.moving_brain.to(model.device),
        fixed_lesion=there(pair.fixed_lesion),
        moving_lesion=there(pair.moving_lesion),
        steps=steps,
        similarity=similarity,
        mind=member.mind,
        diffusion_weight=member.card.diffusion_weight if similarity == "lncc" else 1.0,
        bound_multiplier=member.card.architecture.get("bound_multiplier", 0.99),
    )


def _told(improved: Refined, steps: int, similarity: str) -> dict[str, Any]:
    """For the summary; the similarity is the local correlation of what was compared: higher is better."""
    before, after = (-value for value in improved.dissimilarity)
    return {
        "steps": steps,
        "best_step": improved.steps,
        "of": similarity,
        "carried_over": improved.carried_over,
        "similarity_before": before,
        "similarity_after": after,
    }


def closer_inverses(disp: Tensor, disp_inv: Tensor) -> tuple[Tensor, Tensor]:
    """Each field's mean with the inverse of the other, three times: halves what resampling left of the error.

    Exchanging the fields exchanges the results. Where space is squeezed to nearly nothing, no inverse is found: a mean
    that folds for that reason is not taken.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels.
        disp_inv: its inverse, but for a fraction of a voxel.
    """
    allowed = max(_FOLDED * disp[:, 0].numel(), _folded(disp, disp_inv))
    for _ in range(3):
        first, second = invert(disp, _INVERSION_VOXELS), invert(disp_inv, _INVERSION_VOXELS)
        closer = (disp + second) / 2, (disp_inv + first) / 2
        if _folded(*closer) > allowed:
            break
        disp, disp_inv = closer
    return disp, disp_inv


def _folded(*fields: Tensor) -> float:
    """The larger of the folded volumes, voxels^3."""
    return max(float(ndv_sum(field)) for field in fields)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
