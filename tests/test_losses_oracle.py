"""The losses against exact values of the reference implementation, gradients included."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sitreg_lumir.deform.ops import use_backend, warp, warp_mask
from sitreg_lumir.measures.losses import cycle_mask, diffusion, group_consistency, lncc, ndv_sum, similarity

DTYPES = [torch.float64, torch.float32]


def relative_l2(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=["torch", "cpu"])
def losses(oracles: Path, request):
    with use_backend(request.param):
        yield load_file(oracles / "losses.safetensors")


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


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-5), (torch.float32, 1e-2)])
def test_similarity_with_warping_matches_the_oracle(losses, dtype, relative):
    stored = {key.split("/")[1]: value for key, value in losses.items() if key.startswith("similarity/")}
    disp = stored["forward_displacement"].to(dtype).clone().requires_grad_()
    disp_inv = stored["inverse_displacement"].to(dtype).clone().requires_grad_()
    image_1, image_2 = stored["image_1"].to(dtype), stored["image_2"].to(dtype)
    mask_1, mask_2 = stored["mask_1"], stored["mask_2"]
    forward = similarity(disp, image_2, image_1, mask_2, mask_1)
    inverse = similarity(disp_inv, image_1, image_2, mask_1, mask_2)
    assert float(forward.detach()) == pytest.approx(float(stored["value_forward"]), abs=1e-5)
    assert float(inverse.detach()) == pytest.approx(float(stored["value_inverse"]), abs=1e-5)
    total = (forward + inverse) / 2
    assert float(total.detach()) == pytest.approx(float(stored["value_total"]), abs=1e-5)
    total.backward()
    assert relative_l2(disp.grad, stored["grad_forward_displacement"]) <= relative
    assert relative_l2(disp_inv.grad, stored["grad_inverse_displacement"]) <= relative
    torch.testing.assert_close(warp(image_1, disp).detach(), stored["warped_image_1"].to(dtype), atol=1e-4, rtol=0)
    assert float((warp_mask(mask_1, disp) != stored["warped_mask_1"].bool()).double().mean()) <= 1e-3


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_ndv_loss_matches_the_oracle(losses, dtype):
    disp = losses["ndv/displacement"].to(dtype).clone().requires_grad_()
    value = ndv_sum(disp)
    assert float(value.detach()) == pytest.approx(float(losses["ndv/value"]), rel=1e-5)
    value.backward()
    assert relative_l2(disp.grad, losses["ndv/grad"]) <= 1e-5


@pytest.mark.parametrize(("dtype", "value_relative", "gradient_relative"), [
    (torch.float64, 1e-6, 1e-5), (torch.float32, 1e-4, 1e-3),
])  # fmt: skip
def test_group_consistency_matches_the_oracle(losses, dtype, value_relative, gradient_relative):
    start = "group_consistency/"
    stored = {key.removeprefix(start): value for key, value in losses.items() if key.startswith(start)}
    forward = [stored[f"forward_{k}"].to(dtype).clone().requires_grad_() for k in (1, 2, 3)]
    inverse = [stored[f"inverse_{k}"].to(dtype).clone().requires_grad_() for k in (1, 2, 3)]
    masks = [stored[f"mask_{k}"] for k in (1, 2, 3)]
    for size_name in ("voxel_size_1", "anisotropic"):
        size = stored["anisotropic/voxel_size"].tolist() if size_name == "anisotropic" else [1.0] * 3
        for mask_name, used in (("masked", masks), ("unmasked", None)):
            value = group_consistency(forward, inverse, used, size)
            expected = float(stored[f"{size_name}/{mask_name}/value"])
            assert float(value.detach()) == pytest.approx(expected, rel=value_relative)
            if f"{size_name}/{mask_name}/grad_forward_1" in stored:
                gradients = torch.autograd.grad(value, [*forward, *inverse])
                names = [f"grad_{kind}_{k}" for kind in ("forward", "inverse") for k in (1, 2, 3)]
                for gradient, name in zip(gradients, names, strict=True):
                    assert relative_l2(gradient, stored[f"{size_name}/{mask_name}/{name}"]) <= gradient_relative
    found = cycle_mask([disp.detach() for disp in forward], [masks[1], masks[2], masks[0]])
    assert float((found != stored["cycle_forward_mask"].bool()).double().mean()) <= 1e-3
