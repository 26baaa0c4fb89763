"""The summary of a registration: all measures, and a verdict with its reasons."""

import platform
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sitreg_lumir import __version__
from sitreg_lumir.io.json_file import json_values
from sitreg_lumir.network.precision import tf32_is_on
from sitreg_lumir.preprocessing.align import Alignment
from sitreg_lumir.preprocessing.intensity import Mask, Matrix, conform
from sitreg_lumir.preprocessing.structure import structure_match
from sitreg_lumir.preprocessing.template import TEMPLATE, load_template
from sitreg_lumir.registration.linear import LinearResult, judge_linear
from sitreg_lumir.registration.model import Model
from sitreg_lumir.registration.pair import ModelPair
from sitreg_lumir.registration.quality import (
    brain_points,
    coverage,
    displacement,
    folded_percent,
    inverse_error,
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
        "template_match": {
            "fixed": template_match(registration.model, pair.fixed, pair.fixed_brain),
            "moving": template_match(registration.model, pair.moving, pair.moving_brain),
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
    result: dict[str, Any] = json_values(summary, 6)
    return result


def template_match(model: Model, image: Tensor, brain: Tensor) -> dict[str, float]:
    """Measures how well a scan's coarse structures agree with the template's: whether it lies where it should.

    Args:
        model: whose grid the scan is on.
        image: ``(1, 1, X, Y, Z)``, intensity in [0, 1].
        brain: ``(1, 1, X, Y, Z)``, bool.

    Returns:
        the values of :class:`~sitreg_lumir.preprocessing.structure.StructureMatch`.
    """
    of_template = _template_on_grid(model.shape, tuple(map(tuple, model.affine.tolist())))
    match = structure_match(*of_template, image[0, 0].numpy(), brain[0, 0].numpy(), model.spacing)
    return {"correlation": match.correlation, "by_chance": match.by_chance}


@lru_cache(maxsize=2)
def _template_on_grid(
    shape: tuple[int, int, int], affine: tuple[tuple[float, ...], ...]
) -> tuple[NDArray[np.float32], Mask]:
    """The template's image, 0..255, and brain on a model's grid, ``(X, Y, Z)`` both."""
    template = load_template()
    return conform(template.image, template.affine, template.mask, np.eye(4), shape, np.array(affine))


def describe_alignment(alignment: Alignment | None, prealign: Matrix) -> dict[str, Any] | None:
    """What aligning a scan did to its brain, for the verdict; None where ``prealign`` is not that alignment's."""
    if alignment is None or prealign is not alignment.prealign:
        return None
    scales = np.linalg.svd(prealign[:3, :3], compute_uv=False)
    return {"turn": alignment.turn, "part": alignment.part, "scales": [float(scale) for scale in scales]}


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
        "alignment": describe_alignment(alignment, scan.prealign),
        "would_move_mm": None if alignment is None else alignment.moved_mm,
    }
