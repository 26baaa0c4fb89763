"""Parts of the deformation maths against exact values of the reference implementation."""

import json
from pathlib import Path

import pytest
import torch
from kinks import MASK_THRESHOLD, LookUp, mask_weights, relative_l2
from mistakes import inverse_with_wrong_sign, inverse_without_solve, no_gradient_of_inverse, only_in_float32
from oracle_samples import random_field
from safetensors.torch import load_file
from torch import Tensor

from sitreg_lumir.deform.backends import use_backend
from sitreg_lumir.deform.backends.torch.backend import grid_points
from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.deform.ops import compose, invert, upsample_control_points, warp, warp_mask

PRECISIONS = [(torch.float64, 1e-6), (torch.float32, 1e-4)]


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def pieces(oracles: Path, backend: str):
    return load_file(oracles / "pieces.safetensors")


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


def inverse_and_gradient(disp: Tensor, cotangent: Tensor, dtype: torch.dtype, stop: float) -> tuple[Tensor, Tensor]:
    disp = disp.to(dtype).clone().requires_grad_()
    inverse = invert(disp, tolerance=stop, max_iterations=200)
    (gradient,) = torch.autograd.grad(inverse, disp, cotangent.to(dtype))
    return inverse.detach(), gradient


def assert_inversion_in_float32_follows(disp: Tensor, cotangent: Tensor) -> None:
    """Without what enters at voxels whose look-up is at the border of a cell; few they are."""
    inverse, _ = inverse_and_gradient(disp, cotangent, torch.float64, 1e-9)
    single, _ = inverse_and_gradient(disp, cotangent, torch.float32, 1e-5)
    torch.testing.assert_close(single.double(), inverse, atol=1e-4, rtol=0)
    look_up = LookUp(grid_points(inverse) + inverse, tuple(disp.shape[2:]))
    kinks = look_up.at_kink(grid_points(single) + single)
    assert float(kinks.double().mean()) <= 5e-3
    cotangent = cotangent.masked_fill(kinks, 0)
    _, expected = inverse_and_gradient(disp, cotangent, torch.float64, 1e-9)
    _, gradient = inverse_and_gradient(disp, cotangent, torch.float32, 1e-5)
    assert relative_l2(gradient, expected) <= 1e-3


def test_inversion_and_its_gradient_match_the_oracle(pieces):
    disp, cotangent = pieces["inverse/displacement"], pieces["inverse/cotangent"]
    inverse, gradient = inverse_and_gradient(disp, cotangent, torch.float64, 1e-9)
    torch.testing.assert_close(inverse, pieces["inverse/inverse"].double(), atol=1e-6, rtol=0)
    assert relative_l2(gradient, pieces["inverse/gradient"]) <= 1e-6
    assert_inversion_in_float32_follows(disp, cotangent)


def inversion_sample(seed: int) -> tuple[Tensor, Tensor]:
    """A field that can be inverted, and a cotangent of its inverse."""
    generator = torch.Generator().manual_seed(seed)
    disp = random_field(generator, (17, 22, 19), 4, 0.9)
    return disp, torch.randn(disp.shape, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_inversion_in_float32_follows_float64_on_other_seeds(backend: str, seed: int):
    assert_inversion_in_float32_follows(*inversion_sample(seed))


@pytest.mark.parametrize("mistaken", [no_gradient_of_inverse, inverse_with_wrong_sign, inverse_without_solve])
def test_what_is_left_out_at_kinks_hides_no_mistake(mistaken):
    with only_in_float32("invert_adjoint", mistaken), pytest.raises(AssertionError):
        assert_inversion_in_float32_follows(*inversion_sample(0))


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_composition_and_warping_match_the_oracle(pieces, dtype, tolerance):
    outer, inner = pieces["compose/outer"].to(dtype), pieces["compose/inner"].to(dtype)
    torch.testing.assert_close(compose(outer, inner), pieces["compose/result"].to(dtype), atol=tolerance, rtol=0)
    image = pieces["compose/image"].to(dtype)
    expected = pieces["compose/image_warped_by_outer"].to(dtype)
    torch.testing.assert_close(warp(image, outer), expected, atol=tolerance, rtol=0)
    inside = warp_mask(torch.ones_like(image), outer)
    differing = inside != pieces["compose/inside_mask_of_warp"].bool()
    assert float(differing.double().mean()) <= (0 if dtype == torch.float64 else 1e-3)
    weights = mask_weights(torch.ones_like(image), grid_points(outer) + pieces["compose/outer"].double())
    assert not bool((differing & ((weights - MASK_THRESHOLD).abs() > 1e-6 * max(image.shape[2:]))).any())


@pytest.mark.slow
def test_control_point_bounds_match_the_oracle(oracles: Path):
    stored = json.loads((oracles / "control_point_bounds.json").read_text())
    checked = 0
    for table in ("lookup", "computed"):
        for key, expected in stored[table].items():
            factors = tuple(map(int, key.split("x")))
            if max(factors) <= 128 or (len(factors) == 2 and max(factors) <= 1024):
                assert control_point_bound(factors) == pytest.approx(expected, rel=1e-9)
                checked += 1
    assert checked
