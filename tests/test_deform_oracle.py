"""Parts of the deformation maths against exact values of the reference implementation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.deform.ops import compose, invert, upsample_control_points, use_backend, warp, warp_mask

pytestmark = pytest.mark.parametrize("backend", ["torch", "cpu"])
PRECISIONS = [(torch.float64, 1e-6), (torch.float32, 1e-4)]


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def pieces(oracles: Path, backend: str):
    with use_backend(backend):
        yield load_file(oracles / "pieces.safetensors")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_upsampling_matches_the_oracle(pieces, dtype, tolerance):
    factors = sorted({int(name.split("_")[1].split("/")[0]) for name in pieces if name.startswith("spline/")})
    assert factors
    for factor in factors:
        expected = pieces[f"spline/factor_{factor}/displacement"]
        control_points = pieces[f"spline/factor_{factor}/control_points"].to(dtype)
        value = upsample_control_points(control_points, factor, expected.shape[2:])
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(value, expected.to(dtype), atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_feature_warping_matches_the_oracle(pieces, dtype, tolerance):
    factors = sorted({int(name.split("_")[1].split("/")[0]) for name in pieces if name.startswith("warp/")})
    assert factors
    for factor in factors:
        disp = pieces[f"spline/factor_{factor}/displacement"].to(dtype)
        value = warp(pieces[f"warp/factor_{factor}/features"].to(dtype), disp, factor)
        torch.testing.assert_close(value, pieces[f"warp/factor_{factor}/warped"].to(dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance", "stop", "relative"), [
    (torch.float64, 1e-6, 1e-9, 1e-6), (torch.float32, 1e-4, 1e-5, 1e-3),
])  # fmt: skip
def test_inversion_and_its_gradient_match_the_oracle(pieces, dtype, tolerance, stop, relative):
    disp = pieces["inverse/displacement"].to(dtype).clone().requires_grad_()
    inverse = invert(disp, tolerance=stop, max_iterations=200)
    torch.testing.assert_close(inverse.detach(), pieces["inverse/inverse"].to(dtype), atol=tolerance, rtol=0)
    inverse.backward(pieces["inverse/cotangent"].to(dtype))
    assert disp.grad is not None
    assert relative_l2(disp.grad, pieces["inverse/gradient"]) <= relative


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_composition_and_warping_match_the_oracle(pieces, dtype, tolerance):
    outer, inner = pieces["compose/outer"].to(dtype), pieces["compose/inner"].to(dtype)
    torch.testing.assert_close(compose(outer, inner), pieces["compose/result"].to(dtype), atol=tolerance, rtol=0)
    image = pieces["compose/image"].to(dtype)
    expected = pieces["compose/image_warped_by_outer"].to(dtype)
    torch.testing.assert_close(warp(image, outer), expected, atol=tolerance, rtol=0)
    inside = warp_mask(torch.ones_like(image), outer)
    differing = (inside != pieces["compose/inside_mask_of_warp"].bool()).double().mean()
    assert differing <= (0 if dtype == torch.float64 else 1e-3)


def test_control_point_bounds_match_the_oracle(oracles: Path, backend: str):
    stored = json.loads((oracles / "control_point_bounds.json").read_text())
    checked = 0
    for table in ("lookup", "computed"):
        for key, expected in stored[table].items():
            factors = tuple(map(int, key.split("x")))
            if max(factors) <= 128 or (len(factors) == 2 and max(factors) <= 1024):
                assert control_point_bound(factors) == pytest.approx(expected, rel=1e-9)
                checked += 1
    assert checked
