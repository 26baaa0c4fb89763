"""What a registration is judged by: each measure decides, and says why."""

import json
from typing import Any

import pytest

from sitreg_lumir.registration.verdict import judge

SUMMARY: dict[str, Any] = {
    "fixed": {"alignment": None},
    "moving": {"alignment": {"turn": "", "part": False, "scales": [1.1, 1.05, 1.0]}},
    "template_match": {
        "fixed": {"correlation": 0.45, "by_chance": 0.15},
        "moving": {"correlation": 0.12, "by_chance": 0.05},
    },
    "similarity": {
        "aligned": {"mind": 0.4, "mind_by_chance": 0.45, "lncc": 0.2, "brain_overlap": 0.9},
        "registered": {"mind": 0.1, "mind_by_chance": 0.45, "lncc": 0.5, "brain_overlap": 0.98},
    },
    "ndv_percent": 0.0,
    "inverse_error_mm": {"median": 0.01, "p99": 0.001},
    "coverage_fixed": {"in_model_grid": 1.0, "seen_by_other": 1.0},
    "coverage_moving": {"in_model_grid": 1.0, "seen_by_other": 1.0},
}


@pytest.mark.parametrize(
    ("place", "value", "verdict", "reason"),
    [
        ("ndv_percent", 0.0, "ok", ""),
        ("similarity/registered/mind", 0.45, "failed", "match less than before"),
        ("similarity/aligned/mind", 0.085, "check", "match less than before"),
        ("similarity/aligned/mind", 0.095, "ok", ""),  # two contrasts of one person
        ("similarity/registered/mind_by_chance", 0.09, "failed", "hardly match"),
        ("similarity/registered/mind_by_chance", 0.113, "check", "hardly match"),
        ("similarity/registered/mind", None, "failed", "do not overlap"),
        ("similarity/registered/brain_overlap", 0.5, "failed", "overlap by 0.50"),
        ("template_match/moving/correlation", 0.05, "failed", "moving brain hardly agrees with the template"),
        ("template_match/fixed/correlation", 0.25, "check", "fixed brain hardly agrees with the template"),
        ("template_match/fixed/by_chance", None, "failed", "fixed brain misses the template's"),
        ("moving/alignment/turn", "180 degrees about the left-right axis", "check", "left and right are exchanged"),
        ("moving/alignment/scales", [1.76, 1.1, 1.0], "check", "stretches the moving brain by 1.00 to 1.76"),
        ("moving/alignment/scales", [1.7, 1.65, 1.6], "check", "check its voxel size"),
        ("ndv_percent", 2.0, "check", "2.000 % of the brain folds"),
        ("inverse_error_mm/p99", 3.0, "check", "inverse to 3.00 mm"),
        ("coverage_moving/in_model_grid", 0.8, "check", "80% of the moving brain"),
        ("coverage_fixed/seen_by_other", 0.2, "failed", "20% of the fixed brain"),
    ],
)
def test_the_verdict_and_its_reasons(place: str, value: Any, verdict: str, reason: str) -> None:
    summary = json.loads(json.dumps(SUMMARY))
    *parents, key = place.split("/")
    inner = summary
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    judged, reasons = judge(summary)
    assert judged == verdict
    assert reason in "; ".join(reasons)
