"""The summary of a registration: plain numbers, and a verdict with its reasons."""

import platform
from typing import Any

import numpy as np
import torch

from sitreg_lumir import __version__
from sitreg_lumir.measures.metrics import ndv
from sitreg_lumir.network.precision import tf32_is_on
from sitreg_lumir.prepare.frame import TEMPLATE
from sitreg_lumir.registration.numbers import (
    ModelPair,
    brain_points,
    coverage,
    displacement,
    inverse_error,
    plain,
    similarities,
    spread,
)
from sitreg_lumir.registration.result import Registration
from sitreg_lumir.registration.sides import Side

# Beyond these a registration is to be looked at (check), or did not work (failed). benchmarks/verdict.py: good pairs of
# training images match at 0.65 to 0.73 and overlap by 0.97 and more, spoiled ones of whole brains match at 0.843 on.
CHECK_MATCH, FAILED_MATCH = 0.80, 0.89  # MIND difference, share of what chance gives
CHECK_OVERLAP, FAILED_OVERLAP = 0.93, 0.80
CHECK_NDV = 0.05
CHECK_INVERSE_MM = 1.0
CHECK_COVERAGE, FAILED_COVERAGE = 0.90, 0.50


def summarise(found: Registration, pair: ModelPair, *, align: str, refined: dict[str, Any] | None) -> dict[str, Any]:
    """Measures a registration.

    Args:
        found: the maps; its own summary is not read.
        pair: both scans on the model's grid.
        align: the option.
        refined: what refining did, or None.

    Returns:
        plain values, as ``summary.json`` holds them.
    """
    fixed_brain, moving_brain = (brain[0, 0].numpy() for brain in (pair.fixed_brain, pair.moving_brain))
    disp = torch.from_numpy(found.disp)[None]
    of_fixed = brain_points(found.fixed.brain, found.fixed.affine)
    of_moving = brain_points(found.moving.brain, found.moving.affine)
    images = (pair.fixed, pair.moving, pair.fixed_brain, pair.moving_brain)
    spacing = found.model.spacing
    placed = None
    if pair.as_placed is not None:
        placed = similarities(pair.fixed, pair.as_placed[0], pair.fixed_brain, pair.as_placed[1], None, spacing)
    summary: dict[str, Any] = {
        "fixed": _side(found.fixed, found.forward.fixed_to_model),
        "moving": _side(found.moving, found.forward.moving_to_model),
        "similarity": {
            "as_placed": placed,
            "aligned": similarities(*images, None, spacing),
            "registered": similarities(*images, disp, spacing),
        },
        "ndv_percent": ndv(found.disp, fixed_brain),
        "ndv_inverse_percent": ndv(found.disp_inv, moving_brain),
        "inverse_error_mm": inverse_error(found.forward, found.backward, of_fixed),
        "inverse_error_mm_moving": inverse_error(found.backward, found.forward, of_moving),
        "displacement_mm": displacement(found.forward, of_fixed),
        "disagreement_mm": None,
        "coverage_fixed": coverage(found.forward, of_fixed, found.moving.shape, found.moving.affine),
        "coverage_moving": coverage(found.backward, of_moving, found.fixed.shape, found.fixed.affine),
        "align": align,
        "refined": refined,
        "template": TEMPLATE,
        "model": {
            "files": [dict(entry) for entry in found.model.checksums],
            "shape": list(found.model.shape),
            "spacing_mm": found.model.spacing,
            "training": found.model.card.training,
            "precision": found.model.precision,
            "flip": found.model.flip,
        },
        "versions": {"sitreg_lumir": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": found.model.device.type,
        "tf32": tf32_is_on(),
    }
    if found.disagreement_voxels is not None:
        summary["disagreement_mm"] = spread(found.disagreement_voxels, fixed_brain, found.model.spacing)
    summary["verdict"], summary["reasons"] = judge(summary)
    result: dict[str, Any] = plain(summary)
    return result


def judge(summary: dict[str, Any]) -> tuple[str, list[str]]:
    """``ok``, ``check`` or ``failed``, and why, one line each.

    The limits were set on registrations of training images, good ones and spoiled ones.
    """
    registered, aligned = summary["similarity"]["registered"], summary["similarity"]["aligned"]
    failed, check = [], []

    def tell(value: float, limit: float, limit_failed: float, text: str, *, low: bool) -> None:
        if value is None or not np.isfinite(value):
            return
        sign = -1 if low else 1
        if sign * value > sign * limit_failed:
            failed.append(text)
        elif sign * value > sign * limit:
            check.append(text)

    mind, chance, overlap = (registered[key] for key in ("mind", "mind_by_chance", "brain_overlap"))
    if mind is None or chance is None or not np.isfinite(mind / chance):
        failed.append("the brains do not overlap")
    else:
        text = f"the structures hardly match (MIND difference {mind:.3f}, by chance {chance:.3f})"
        tell(mind / chance, CHECK_MATCH, FAILED_MATCH, text, low=False)
        if aligned["mind"] is not None and mind > aligned["mind"]:
            failed.append(f"they match less than before (MIND difference {aligned['mind']:.3f}, now {mind:.3f})")
    tell(overlap, CHECK_OVERLAP, FAILED_OVERLAP, f"the brains overlap by {overlap:.2f} (Dice)", low=True)
    folded = summary["ndv_percent"]
    tell(folded, CHECK_NDV, np.inf, f"{folded:.3f} % of the brain folds", low=False)
    error = summary["inverse_error_mm"]["p99"]
    tell(error, CHECK_INVERSE_MM, np.inf, f"the maps are inverse to {error:.2f} mm only (99th percentile)", low=False)
    for role in ("fixed", "moving"):
        shares = summary[f"coverage_{role}"]
        inside, seen = shares["in_model_grid"], shares["seen_by_other"]
        text = f"{inside:.0%} of the {role} brain lies in the model's grid"
        tell(inside, CHECK_COVERAGE, FAILED_COVERAGE, text, low=True)
        text = f"{seen:.0%} of the {role} brain lies in the other scan's field of view"
        tell(seen, CHECK_COVERAGE, FAILED_COVERAGE, text, low=True)
    return ("failed" if failed else "check" if check else "ok"), failed + check


def _side(side: Side, prealign: Any) -> dict[str, Any]:
    alignment = side.alignment
    return {
        "name": side.name,
        "sha256": side.checksum,
        "shape": list(side.shape),
        "spacing_mm": [float(step) for step in side.spacing],
        "affine_from": side.source,
        "prealign": [[float(value) for value in row] for row in prealign],
        "how": side.how,
        "mutual_information": None
        if alignment is None
        else {"before": alignment.mi_before, "after": alignment.mi_after},
        "would_move_mm": None if alignment is None else alignment.moved_mm,
    }
