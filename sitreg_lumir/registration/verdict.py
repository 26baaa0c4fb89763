"""The verdict on a registration, and its reasons."""

from typing import Any

import numpy as np

# Beyond these a registration is to be looked at (check), or did not work (failed). benchmarks/verdict.py: good pairs of
# training images match at 0.65 to 0.73 and overlap by 0.97 and more, degraded ones of whole brains match at 0.843 on.
CHECK_MATCH, FAILED_MATCH = 0.80, 0.89  # MIND difference, share of what chance gives
# MIND difference that the deformation adds, share of chance: two contrasts of one person, in place: to 0.017.
CHECK_LOST, FAILED_LOST = 0.025, 0.05
CHECK_STRUCTURE, FAILED_STRUCTURE = 2.0, 1.6  # correlation of coarse structures, multiple of what chance gives
CHECK_STRETCH = 1.35  # largest scale of an alignment against its smallest
CHECK_SCALES = (0.7, 1.6)
CHECK_OVERLAP, FAILED_OVERLAP = 0.93, 0.80
CHECK_NDV = 0.05
CHECK_INVERSE_MM = 0.05
CHECK_COVERAGE, FAILED_COVERAGE = 0.90, 0.50


def judge(summary: dict[str, Any]) -> tuple[str, list[str]]:
    """``ok``, ``check`` or ``failed``, and why, one line each.

    The limits were set on registrations of training images, good and degraded ones.
    """
    registered, aligned = summary["similarity"]["registered"], summary["similarity"]["aligned"]
    failed, check = [], []

    def compare(value: float, limit: float, limit_failed: float, text: str, *, low: bool) -> None:
        if value is None or not np.isfinite(value):
            return
        sign = -1 if low else 1
        if sign * value > sign * limit_failed:
            failed.append(text)
        elif sign * value > sign * limit:
            check.append(text)

    placed_failed, placed_check = placement_reasons(summary)
    failed += placed_failed
    check += placed_check
    mind, chance, overlap = (registered[key] for key in ("mind", "mind_by_chance", "brain_overlap"))
    if mind is None or chance is None or not np.isfinite(mind / chance):
        failed.append("the brains do not overlap")
    else:
        text = f"the structures hardly match (MIND difference {mind:.3f}, by chance {chance:.3f})"
        compare(mind / chance, CHECK_MATCH, FAILED_MATCH, text, low=False)
        if aligned["mind"] is not None:
            text = f"they match less than before (MIND difference {aligned['mind']:.3f}, now {mind:.3f})"
            compare((mind - aligned["mind"]) / chance, CHECK_LOST, FAILED_LOST, text, low=False)
    compare(overlap, CHECK_OVERLAP, FAILED_OVERLAP, f"the brains overlap by {overlap:.2f} (Dice)", low=True)
    folded = summary["ndv_percent"]
    compare(folded, CHECK_NDV, np.inf, f"{folded:.3f} % of the brain folds", low=False)
    error = summary["inverse_error_mm"]["p99"]
    compare(
        error, CHECK_INVERSE_MM, np.inf, f"the maps are inverse to {error:.2f} mm only (99th percentile)", low=False
    )
    for role in ("fixed", "moving"):
        shares = summary[f"coverage_{role}"]
        in_grid, in_view = shares["in_model_grid"], shares["seen_by_other"]
        text = f"{in_grid:.0%} of the {role} brain lies in the model's grid"
        compare(in_grid, CHECK_COVERAGE, FAILED_COVERAGE, text, low=True)
        text = f"{in_view:.0%} of the {role} brain lies in the other scan's field of view"
        compare(in_view, CHECK_COVERAGE, FAILED_COVERAGE, text, low=True)
    return ("failed" if failed else "check" if check else "ok"), failed + check


def placement_reasons(summary: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Why the scans' places make a registration ``failed``, and why ``check``, one line each.

    A scan lies where it should if its structures agree with the template's; nothing that follows can repair the rest.
    """
    failed: list[str] = []
    check: list[str] = []
    for role in ("fixed", "moving"):
        structure, chance = (summary["template_match"][role][key] for key in ("correlation", "by_chance"))
        if structure is None or chance is None or not np.isfinite(structure / chance):
            failed.append(f"the {role} brain misses the template's")
        elif structure / chance < CHECK_STRUCTURE:
            text = (
                f"the {role} brain hardly agrees with the template (correlation of coarse structures {structure:.2f}, "
                f"by chance {chance:.2f})"
            )
            (failed if structure / chance < FAILED_STRUCTURE else check).append(text)
        alignment = summary[role].get("alignment")
        if alignment is not None:
            check += _unusual(role, alignment)
    return failed, check


def _unusual(role: str, alignment: dict[str, Any]) -> list[str]:
    """What an alignment did that a right header seldom asks for."""
    reasons = []
    if alignment["turn"]:
        reasons.append(
            f"the {role} scan's header turns the brain by {alignment['turn']}; it was turned back, but images do not "
            "show whether left and right are exchanged: check the header"
        )
    largest, smallest = max(alignment["scales"]), min(alignment["scales"])
    if largest > CHECK_STRETCH * smallest:
        reasons.append(
            f"aligning stretches the {role} brain by {smallest:.2f} to {largest:.2f}; check its mask and voxel size"
        )
    elif not CHECK_SCALES[0] < smallest <= largest < CHECK_SCALES[1]:
        reasons.append(f"aligning scales the {role} brain by {smallest:.2f} to {largest:.2f}; check its voxel size")
    return reasons
