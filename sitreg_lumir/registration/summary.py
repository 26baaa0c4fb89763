"""The summary of a registration: all measures, and a verdict with its reasons."""

import platform
from typing import Any

import torch

from sitreg_lumir import __version__
from sitreg_lumir.network.precision import tf32_is_on
from sitreg_lumir.preprocessing.template import TEMPLATE
from sitreg_lumir.registration.linear import LinearResult, judge_linear
from sitreg_lumir.registration.pair import ModelPair
from sitreg_lumir.registration.quality import (
    brain_points,
    coverage,
    displacement,
    folded_percent,
    inverse_error,
    json_values,
    similarities,
    uncertainty_in_brain,
)
from sitreg_lumir.registration.result import Registration
from sitreg_lumir.registration.scan import PlacedScan
from sitreg_lumir.registration.verdict import judge


def summarise(
    registration: Registration,
    pair: ModelPair,
    *,
    align: str,
    refined: dict[str, Any] | None,
    linear: LinearResult | None = None,
) -> dict[str, Any]:
    """Measures a registration.

    Args:
        registration: the maps; its summary is not read.
        pair: both scans on the model's grid.
        align: the option ``align``.
        refined: what instance optimisation did, or None.
        linear: what registered the scans if that was rigid or affine, else None.

    Returns:
        plain values, as ``summary.json`` holds them.
    """
    fixed_brain, moving_brain = (brain[0, 0].numpy() for brain in (pair.fixed_brain, pair.moving_brain))
    disp = torch.from_numpy(registration.disp)[None]
    of_fixed = brain_points(registration.fixed.brain, registration.fixed.affine)
    of_moving = brain_points(registration.moving.brain, registration.moving.affine)
    images = (pair.fixed, pair.moving, pair.fixed_brain, pair.moving_brain)
    spacing = registration.model.spacing
    placed = None
    if pair.as_placed is not None:
        placed = similarities(pair.fixed, pair.as_placed[0], pair.fixed_brain, pair.as_placed[1], None, spacing)
    summary: dict[str, Any] = {
        "fixed": _describe(registration.fixed, registration.forward.fixed_to_model),
        "moving": _describe(registration.moving, registration.forward.moving_to_model),
        "similarity": {
            "as_placed": placed,
            "aligned": similarities(*images, None, spacing),
            "registered": similarities(*images, disp, spacing),
        },
        "ndv_percent": folded_percent(registration.forward, fixed_brain),
        "ndv_inverse_percent": folded_percent(registration.backward, moving_brain),
        "inverse_error_mm": inverse_error(registration.forward, registration.backward, of_fixed),
        "inverse_error_mm_moving": inverse_error(registration.backward, registration.forward, of_moving),
        "displacement_mm": displacement(registration.forward, of_fixed),
        "uncertainty_mm": None,
        "coverage_fixed": coverage(
            registration.forward, of_fixed, registration.moving.shape, registration.moving.affine
        ),
        "coverage_moving": coverage(
            registration.backward, of_moving, registration.fixed.shape, registration.fixed.affine
        ),
        "align": align,
        "refined": refined,
        "template": TEMPLATE,
        "model": {
            "files": [dict(entry) for entry in registration.model.checksums],
            "shape": list(registration.model.shape),
            "spacing_mm": registration.model.spacing,
            "training": registration.model.card.training,
            "precision": registration.model.precision,
            "flip": registration.model.flip,
        },
        "versions": {"sitreg_lumir": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": registration.model.device.type,
        "tf32": tf32_is_on(),
    }
    if registration.uncertainty_voxels is not None:
        summary["uncertainty_mm"] = uncertainty_in_brain(
            registration.uncertainty_voxels, fixed_brain, registration.model.spacing
        )
    if linear is not None:
        summary["linear"] = {
            "matrix": linear.matrix.tolist(),
            "directions_apart_mm": linear.apart_mm,
            "mutual_information": linear.mutual_information,
        }
    summary["verdict"], summary["reasons"] = judge(summary) if linear is None else judge_linear(summary)
    result: dict[str, Any] = json_values(summary)
    return result


def _describe(scan: PlacedScan, prealign: Any) -> dict[str, Any]:
    alignment = scan.alignment
    return {
        "name": scan.name,
        "sha256": scan.checksum,
        "shape": list(scan.shape),
        "spacing_mm": [float(step) for step in scan.spacing],
        "affine_from": scan.source,
        "prealign": [[float(value) for value in row] for row in prealign],
        "how": scan.how,
        "stripped_by": scan.stripped_by,
        "mutual_information": None
        if alignment is None
        else {"before": alignment.mi_before, "after": alignment.mi_after},
        "would_move_mm": None if alignment is None else alignment.moved_mm,
    }
