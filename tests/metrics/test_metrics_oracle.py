"""The metrics and the folded volume equal the stored values of the official evaluation."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinks import folds_at_kink, relative_l2
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import load_file
from torch import Tensor

from sitreg_lumir import metrics
from sitreg_lumir.deform.jacobian import determinant, jacobian_determinant, non_diffeomorphic_volume

NAMED = os.environ.get("SITREG_LUMIR_ORACLES") or os.environ.get("SITREG_ORACLES")
ORACLES = Path(NAMED or Path(__file__).parents[3] / "shared" / "oracles")
pytestmark = pytest.mark.skipif(not ORACLES.is_dir(), reason=f"no oracle files in {ORACLES} (set SITREG_LUMIR_ORACLES)")


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    with np.load(ORACLES / "evaluation.npz") as stored:
        names = sorted({key.split("/")[0] for key in stored.files})
        return [
            {key.split("/", 1)[1]: stored[key] for key in stored.files if key.startswith(f"{name}/")} for name in names
        ]


@pytest.fixture(scope="module")
def losses() -> dict[str, Tensor]:
    return {key: value for key, value in load_file(ORACLES / "losses.safetensors").items() if key.startswith("ndv/")}


def test_oracle_overlap_distance_and_landmarks(cases: list[dict[str, Any]]) -> None:
    assert cases
    for case in cases:
        disp, labels = np.moveaxis(case["displacement"], -1, 0), case["labels"].tolist()
        fixed, moving = case["fixed_labels"], case["moving_labels"]
        warped = metrics.warp_nearest(moving, disp)
        assert_array_equal(warped, case["warped_labels"])
        assert_allclose(metrics.dsc(fixed, moving, warped, labels), case["dice"], rtol=0, atol=1e-9)
        assert_allclose(metrics.hd95(fixed, moving, warped, labels), case["hd95"], rtol=0, atol=1e-9)
        warped = metrics.warp_nearest(case["moving_landmarks"], disp)
        assert_array_equal(warped, case["warped_landmarks"])
        assert_allclose(metrics.tre(case["fixed_landmarks"], warped), case["tre"], rtol=0, atol=1e-9)
        before = metrics.tre(case["fixed_landmarks"], case["moving_landmarks"])
        assert_allclose(before, case["tre_identity"], rtol=0, atol=1e-9)


def test_oracle_scores_of_a_pair_and_of_the_table(cases: list[dict[str, Any]]) -> None:
    names = ("fixed_labels", "moving_labels", "fixed_landmarks", "moving_landmarks")
    for case in cases:
        scores = metrics.score_pair(
            torch.from_numpy(case["displacement"]).movedim(-1, 0),
            fixed_mask=case["fixed_image"] > 0,
            labels=case["labels"].tolist(),
            voxel_size=2.0,
            **{name: torch.from_numpy(case[name]) for name in names},
        )
        table = metrics.PairTable()
        table.add(scores, contrasts="T1-T2")
        result = table.means()
        expected = {"dsc": "dice_mean", "hd95": "hd95_mean", "tre": "tre"}
        for name, key in expected.items():
            if np.isnan(case[key]):
                assert f"{name}/T1-T2" not in result
                continue
            assert_allclose(float(result[f"{name}/T1-T2"]), case[key], rtol=0, atol=1e-9)
            if name != "dsc":
                assert_allclose(float(result[f"{name}_mm/T1-T2"]), 2 * case[key], rtol=0, atol=1e-9)
        assert_allclose(float(result["ndv/T1-T2"]), case["ndv_mask_fixed/percent"], rtol=1e-5)


def test_oracle_ndv_in_percent_of_each_mask(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        disp = np.moveaxis(case["displacement"], -1, 0)
        masks = {"fixed": case["fixed_image"] > 0, "moving": case["moving_image"] > 0, "none": None}
        for name, mask in masks.items():
            assert_allclose(metrics.ndv(disp, mask), case[f"ndv_mask_{name}/percent"], rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_oracle_folded_volume_and_its_gradient(losses: dict[str, Tensor], dtype: torch.dtype) -> None:
    disp = losses["ndv/displacement"].to(dtype).requires_grad_()
    volume = non_diffeomorphic_volume(disp)
    scale = losses["ndv/volume_map"].abs().max().item()
    stored = losses["ndv/volume_map"].to(dtype)
    torch.testing.assert_close(volume.detach(), stored, rtol=1e-5, atol=1e-6 * scale)
    per_item = volume.double().sum(dim=(1, 2, 3, 4))
    torch.testing.assert_close(per_item, losses["ndv/value_per_item"], rtol=1e-5, atol=0)
    torch.testing.assert_close(per_item.sum()[None], losses["ndv/value"], rtol=1e-5, atol=0)
    volume.sum().backward()
    assert disp.grad is not None
    smooth = None if dtype == torch.float64 else ~folds_at_kink(disp)  # float64 decides where a determinant is near 0
    assert smooth is None or float(smooth.double().mean()) >= 0.99
    assert relative_l2(disp.grad, losses["ndv/grad"], smooth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_oracle_determinants(losses: dict[str, Tensor], dtype: torch.dtype) -> None:
    disp = losses["ndv/displacement"][:1].to(dtype)
    names = [key.rsplit("/", 1)[1] for key in losses if key.startswith("ndv/determinant/")]
    assert len(names) > 1
    for name in names:
        stored = losses[f"ndv/determinant/{name}"].to(dtype)
        value = jacobian_determinant(disp) if name == "central" else determinant(disp, name)
        torch.testing.assert_close(value, stored, rtol=1e-5, atol=1e-5 * stored.abs().max().item())
