"""The losses against exact values of the reference implementation, gradients included."""

from pathlib import Path

import pytest
import torch
from kinks import MASK_THRESHOLD, LookUp, composition_look_ups, folds_at_kink, mask_weights, relative_l2
from mistakes import gradients_a_percent_off, only_in_float32
from oracle_samples import group_sample, similarity_sample
from safetensors.torch import load_file

from sitreg_lumir.deform.backends import use_backend
from sitreg_lumir.deform.backends.torch.backend import grid_points
from sitreg_lumir.deform.ops import compose, warp, warp_mask
from sitreg_lumir.losses import cycle_mask, diffusion, group_consistency, lncc, ndv_sum, warped_lncc

DTYPES = [torch.float64, torch.float32]


CLOSE = {"atol": 1e-6, "rtol": 0}


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def losses(oracles: Path, backend):
    return load_file(oracles / "losses.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
def test_lncc_matches_the_oracle(losses, dtype):
    names = [name for name in losses if name.startswith("ncc/window_") and name.endswith("/value")]
    assert names
    for name in names:
        _, window, which, _ = name.split("/")
        mask_1 = losses["ncc/mask_1"] if which in ("mask_1", "both_masks") else None
        mask_2 = losses["ncc/mask_2"] if which in ("mask_2", "both_masks") else None
        image_1 = losses["ncc/image_1"].to(dtype).clone().requires_grad_()
        value = lncc(image_1, losses["ncc/image_2"].to(dtype), mask_1, mask_2, int(window.split("_")[1]))
        assert float(value.detach()) == pytest.approx(float(losses[name]), abs=1e-6)
        gradient = losses.get(name.replace("value", "grad_image_1"))
        if gradient is not None:
            value.backward()
            assert relative_l2(image_1.grad, gradient) <= 1e-3


def assert_masks_differ_at_threshold(single, exact, weights, shape):
    """Masks in float32 differ from those in float64 only where a weight is next to the threshold, and rarely."""
    differing = single != exact
    assert float(differing.double().mean()) <= 1e-3
    near = torch.stack([(weight - MASK_THRESHOLD).abs() < 1e-6 * max(shape) for weight in weights]).any(dim=0)
    assert not bool((differing & ~near).any())


def similarity_of(stored, dtype, directions):
    """Values and gradients of both directions, gradients of their mean."""
    values, gradients = [], []
    for name, fixed, moving in directions:
        disp = stored[f"{name}_displacement"].to(dtype).clone().requires_grad_()
        images = stored[f"image_{fixed}"].to(dtype), stored[f"image_{moving}"].to(dtype)
        values.append(warped_lncc(disp, *images, stored[f"mask_{fixed}"], stored[f"mask_{moving}"]))
        gradients.append(torch.autograd.grad(values[-1] / 2, disp)[0])
        values[-1] = float(values[-1].detach())
    return values, gradients


DIRECTIONS = (("forward", 2, 1), ("inverse", 1, 2))  # name, fixed image, moving image


def assert_similarity_in_float32_follows(stored):
    """With the masks that float32 warps, and but for voxels whose image look-up is at the border of a cell."""
    values, gradients = similarity_of(stored, torch.float32, DIRECTIONS)
    for (name, fixed, moving), value, gradient in zip(DIRECTIONS, values, gradients, strict=True):
        disp = stored[f"{name}_displacement"].double().requires_grad_()
        mask = stored[f"mask_{moving}"]
        points = grid_points(disp) + disp.detach()
        single = warp_mask(mask, disp.detach().float())
        exact = warp_mask(mask, disp.detach())
        assert_masks_differ_at_threshold(single, exact, [mask_weights(mask, points)], disp.shape[2:])
        warped = warp(stored[f"image_{moving}"].double(), disp)
        expected = lncc(warped, stored[f"image_{fixed}"].double(), single, stored[f"mask_{fixed}"], 11)
        assert value == pytest.approx(float(expected.detach()), abs=1e-5)
        (expected_gradient,) = torch.autograd.grad(expected / 2, disp)
        smooth = ~LookUp(points, disp.shape[2:]).at_kink()
        assert float(smooth.double().mean()) >= 1 - 2e-3
        assert relative_l2(gradient, expected_gradient, smooth) <= 1e-3


def test_similarity_with_warping_matches_the_oracle(losses):
    stored = {key.split("/")[1]: value for key, value in losses.items() if key.startswith("similarity/")}
    values, gradients = similarity_of(stored, torch.float64, DIRECTIONS)
    for (name, *_), value, gradient in zip(DIRECTIONS, values, gradients, strict=True):
        assert value == pytest.approx(float(stored[f"value_{name}"]), abs=1e-5)
        assert relative_l2(gradient, stored[f"grad_{name}_displacement"]) <= 1e-5
    assert sum(values) / 2 == pytest.approx(float(stored["value_total"]), abs=1e-5)
    disp = stored["forward_displacement"].double()
    torch.testing.assert_close(warp(stored["image_1"].double(), disp), stored["warped_image_1"].double(), **CLOSE)
    assert torch.equal(warp_mask(stored["mask_1"], disp), stored["warped_mask_1"].bool())
    warped = warp(stored["image_1"], disp.float())
    torch.testing.assert_close(warped, stored["warped_image_1"], atol=1e-4, rtol=0)
    assert_similarity_in_float32_follows(stored)


@pytest.mark.parametrize("seed", range(5))
def test_similarity_in_float32_follows_float64_on_other_seeds(backend, seed):
    assert_similarity_in_float32_follows(similarity_sample(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_diffusion_matches_the_oracle(losses, dtype):
    cases = sorted({name.split("/")[1] for name in losses if name.startswith("diffusion/") and name.endswith("value")})
    assert cases
    for case in cases:
        disp = losses["diffusion/displacement"].to(dtype).clone().requires_grad_()
        value = diffusion(disp, losses[f"diffusion/{case}/voxel_size"].tolist())
        assert float(value.detach()) == pytest.approx(float(losses[f"diffusion/{case}/value"]), rel=1e-5)
        value.backward()
        assert relative_l2(disp.grad, losses[f"diffusion/{case}/grad"]) <= 1e-5


def ndv_gradient(disp, dtype):
    disp = disp.to(dtype).clone().requires_grad_()
    value = ndv_sum(disp)
    value.backward()
    return float(value.detach()), disp.grad


def assert_ndv_in_float32_follows(disp):
    """But for components on which a determinant next to zero depends."""
    (expected, exact), (value, gradient) = ndv_gradient(disp, torch.float64), ndv_gradient(disp, torch.float32)
    assert value == pytest.approx(expected, rel=1e-5)
    smooth = ~folds_at_kink(disp)
    assert float(smooth.double().mean()) >= 0.99
    assert relative_l2(gradient, exact, smooth) <= 1e-5


def test_ndv_loss_matches_the_oracle(losses):
    disp = losses["ndv/displacement"]
    value, gradient = ndv_gradient(disp, torch.float64)
    assert value == pytest.approx(float(losses["ndv/value"]), rel=1e-5)
    assert relative_l2(gradient, losses["ndv/grad"]) <= 1e-5
    assert_ndv_in_float32_follows(disp)


@pytest.mark.parametrize("seed", range(5))
def test_ndv_in_float32_follows_float64_on_other_seeds(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    assert_ndv_in_float32_follows(1.5 * torch.randn(2, 3, 9, 11, 8, generator=generator))


CYCLES = ((("forward", 1), ("forward", 2), ("forward", 3)), (("inverse", 3), ("inverse", 2), ("inverse", 1)))
CYCLE_MASKS = ((2, 3, 1), (3, 2, 1))  # of the grids on which the fields of each cycle live


def group_gradients(stored, dtype, masks, size):
    disps = {(kind, k): stored[f"{kind}_{k}"].to(dtype).clone().requires_grad_() for pair in CYCLES for kind, k in pair}
    forward, inverse = ([disps[kind, k] for k in (1, 2, 3)] for kind in ("forward", "inverse"))
    value = group_consistency(forward, inverse, masks, size)
    return float(value.detach()), dict(zip(disps, torch.autograd.grad(value, list(disps.values())), strict=True))


def cycle_errors(disps, size):
    """Squared distance from the identity after a cycle, ``(B, 1, X, Y, Z)``, normalised units, written out."""
    cycle = compose(*disps)
    extent = max(n * s for n, s in zip(cycle.shape[2:], size, strict=True))
    unit = torch.tensor([2 * component / extent for component in size], dtype=cycle.dtype)[:, None, None, None]
    return (cycle * unit).square().sum(dim=1, keepdim=True)


def assert_group_consistency_in_float32_follows(stored, used, size):
    """With the masks of float32, and but for what cycles contribute whose look-ups are at the border of a cell."""
    shape = stored["forward_1"].shape[2:]
    masks = [stored[f"mask_{k}"] if used else torch.ones_like(stored[f"mask_{k}"]) for k in (1, 2, 3)]
    value, gradients = group_gradients(stored, torch.float32, masks if used else None, size)
    exact = {key: stored[f"{key[0]}_{key[1]}"].double().requires_grad_() for pair in CYCLES for key in pair}
    errors, kinked = [], []
    for cycle, order in zip(CYCLES, CYCLE_MASKS, strict=True):
        disps, held = [exact[key] for key in cycle], [masks[k - 1] for k in order]
        fixed = [disp.detach() for disp in disps]
        look_ups = composition_look_ups(fixed)
        single, double = cycle_mask([disp.float() for disp in fixed], held), cycle_mask(fixed, held)
        weights = [mask_weights(held[1], look_ups[0].points), mask_weights(held[0], look_ups[1].points)]
        assert_masks_differ_at_threshold(single, double, weights, shape)
        error = cycle_errors(disps, size) * single
        kinks = torch.stack([look_up.at_kink() for look_up in look_ups]).any(dim=0)
        assert float(kinks.double().mean()) <= 2e-3
        errors.append(error.mean() / 2)
        kinked.append((error * kinks).sum())
    expected = sum(errors)
    assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    affected = torch.autograd.grad(sum(kinked), list(exact.values()), retain_graph=True)
    for key, gradient, part in zip(exact, torch.autograd.grad(expected, list(exact.values())), affected, strict=True):
        assert float((part != 0).double().mean()) <= 0.02
        assert relative_l2(gradients[key], gradient, part == 0) <= 1e-3


@pytest.mark.parametrize("size_name", ["voxel_size_1", "anisotropic"])
@pytest.mark.parametrize("used", [True, False])
def test_group_consistency_matches_the_oracle(losses, size_name, used):
    start = "group_consistency/"
    stored = {key.removeprefix(start): value for key, value in losses.items() if key.startswith(start)}
    masks = [stored[f"mask_{k}"] for k in (1, 2, 3)]
    size = stored["anisotropic/voxel_size"].tolist() if size_name == "anisotropic" else [1.0] * 3
    value, gradients = group_gradients(stored, torch.float64, masks if used else None, size)
    case = f"{size_name}/{'masked' if used else 'unmasked'}"
    assert value == pytest.approx(float(stored[f"{case}/value"]), rel=1e-6)
    for (kind, k), gradient in gradients.items():
        if f"{case}/grad_{kind}_{k}" in stored:
            assert relative_l2(gradient, stored[f"{case}/grad_{kind}_{k}"]) <= 1e-5
    actual = cycle_mask([stored[f"forward_{k}"].double() for k in (1, 2, 3)], [masks[1], masks[2], masks[0]])
    assert torch.equal(actual, stored["cycle_forward_mask"].bool())
    assert_group_consistency_in_float32_follows(stored, used, size)


@pytest.mark.parametrize("seed", range(5))
def test_group_consistency_in_float32_follows_float64_on_other_seeds(backend, seed):
    assert_group_consistency_in_float32_follows(group_sample(seed), seed % 2 == 0, [1.0, 1.5, 1.2])


@pytest.mark.parametrize(
    ("check", "sample"),
    [
        (assert_similarity_in_float32_follows, similarity_sample),
        (lambda stored: assert_group_consistency_in_float32_follows(stored, True, [1.0] * 3), group_sample),
    ],
)
def test_what_is_left_out_at_kinks_hides_no_mistake(check, sample):
    with only_in_float32("interpolate_adjoint", gradients_a_percent_off), pytest.raises(AssertionError):
        check(sample(0))
