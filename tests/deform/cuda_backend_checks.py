"""The Triton kernels give the same numbers as plain torch: what ``test_cuda_backend.py`` runs in a process of its own.

With ``TRITON_INTERPRET=1`` on CPU tensors in Triton's interpreter, else on a GPU.
"""

import os
from itertools import product
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

from sitreg_lumir.deform import ops
from sitreg_lumir.deform.backends import backend_of, use_backend
from sitreg_lumir.deform.backends.cuda import backend, images
from sitreg_lumir.deform.backends.cuda.launch import blocks
from sitreg_lumir.deform.backends.torch import backend as torch_backend
from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.deform.splines import coefficients_of, steps_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SHAPES = [(7, 9, 11), (1, 5, 6), (6, 1, 1)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after the other; look-ups on the largest shape still need two."""
    if INTERPRETED:
        monkeypatch.setattr(backend, "_BLOCK", 512)
        monkeypatch.setattr(images, "_BLOCK", 1024)


@pytest.fixture
def random() -> Any:
    """Normal random tensors in float32: ``random(*shape, scale=...)``."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(DEVICE)

    return draw


def assert_same(actual: Any, expected: Any) -> None:
    """Equal to rounding, where gradients of up to a hundred summands and gradients of several voxels occur."""
    if actual is None or expected is None:
        assert actual is expected
        return
    if not isinstance(actual, Tensor):
        for first, second in zip(actual, expected, strict=True):
            assert_same(first, second)
        return
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_compositions_equal_plain_torch(shape: tuple[int, ...], random: Any) -> None:
    disps, grad = [random(2, 3, *shape, scale=0.5) for _ in range(4)], random(2, 3, *shape)
    for length in (2, 3, 4):
        fields = disps[:length]
        assert_same(backend.compose(fields), torch_backend.compose(fields))
        every, first, last = [True] * length, [True] + [False] * (length - 1), [False] * (length - 1) + [True]
        for needed in (every, first, last) if length == 3 else (every,):
            args = (grad, fields, needed)
            assert_same(backend.compose_adjoint(*args), torch_backend.compose_adjoint(*args))


@pytest.mark.parametrize("shape", SHAPES)
def test_inversion_equals_plain_torch(shape: tuple[int, ...], random: Any) -> None:
    disp, grad = random(2, 3, *shape, scale=0.05), random(2, 3, *shape)
    inverse = torch_backend.invert(disp, 1e-6, 100)
    assert_same(backend.invert(disp, 1e-6, 100), inverse)
    assert_same(backend.invert(disp, 1e-6, 0), -disp)
    assert_same(backend.invert_adjoint(grad, disp, inverse), torch_backend.invert_adjoint(grad, disp, inverse))


def test_inversion_meets_its_tolerance(random: Any) -> None:
    """The steepest fields that control points within their bound can make."""
    shape = (9, 7, 8)
    for factor, bound in ((1, 0.36), (2, 0.385), (8, 0.4)):
        control_points = random(1, 3, *(ceil(size / factor) for size in shape))
        disp = torch_backend.upsample_control_points(0.99 * bound * control_points.sign(), factor, shape)
        exact = torch_backend.invert(disp.double(), 1e-12, 300)
        for tolerance in (1e-2, 1e-4):
            error = (backend.invert(disp, tolerance, 50) - exact).abs()
            assert float(error.max()) < 3 * tolerance and float(error.mean()) < 0.1 * tolerance


def test_inversion_of_broken_fields_ends(random: Any) -> None:
    disp = random(1, 3, 6, 7, 8, scale=0.1)
    disp[0, 1, 2, 3, 4] = float("nan")
    assert int(backend.invert(disp, 1e-2, 20).isnan().sum()) < 30  # what is broken stays where it is
    assert bool(backend.invert(random(1, 3, 6, 7, 8, scale=9), 1e-2, 20).isfinite().all())


@pytest.mark.parametrize("shape", SHAPES)
def test_interpolation_equals_plain_torch(shape: tuple[int, ...], random: Any) -> None:
    values, grad = random(2, 5, *shape), random(2, 5, 4, 5, 3)
    for points in (random(2, 3, 4, 5, 3, scale=8), random(1, 3, 4, 5, 3, scale=3)):  # many lie outside
        assert_same(backend.interpolate(values, points), torch_backend.interpolate(values, points))
        for needed in ((True, True), (True, False), (False, True)):
            expected = torch_backend.interpolate_adjoint(grad, values, points, *needed)
            assert_same(backend.interpolate_adjoint(grad, values, points, *needed), expected)


@pytest.mark.parametrize(("shape", "factor"), [*product(SHAPES, (1, 2, 4)), ((6, 4, 1), 3)])
def test_level_operations_equal_plain_torch(shape: tuple[int, ...], factor: int, random: Any) -> None:
    level = [ceil(size / factor) for size in shape]
    control_points, grad = random(2, 3, *level), random(2, 3, *shape)
    field = torch_backend.upsample_control_points(control_points, factor, shape)
    assert_same(backend.upsample_control_points(control_points, factor, shape), field)
    expected = torch_backend.upsample_control_points_adjoint(grad, factor)
    assert_same(backend.upsample_control_points_adjoint(grad, factor), expected)
    disp = random(2, 3, *shape)
    every, all_at_once = ((True, True), (True, False), (False, True)), ((True, True),)
    samples = (random(2, 2, 1, *level), every), (channels_last(random(2, 2, 20, *level)), all_at_once)
    for (values, grad), needs in samples:
        warped = backend.warp(values, disp, factor)
        assert_same(warped, torch_backend.warp(values, disp, factor))
        assert warped.stride(1) == values.stride(1)
        for needed in needs:
            gradients = backend.warp_adjoint(grad, values, disp, factor, *needed)
            assert_same(gradients, torch_backend.warp_adjoint(grad, values, disp, factor, *needed))
            assert gradients[0] is None or gradients[0].stride(1) == values.stride(1)


def channels_last(tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in tensors]


def test_programs_share_the_channels(random: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    disp = random(1, 3, 4, 5, 6)
    for programs in (1, 10**6):
        monkeypatch.setattr(backend, "_PROGRAMS", programs)
        for values, grad in (random(2, 1, 37, 4, 5, 6), channels_last(random(2, 1, 37, 4, 5, 6))):
            assert_same(backend.warp(values, disp, 1), torch_backend.warp(values, disp, 1))
            expected = torch_backend.warp_adjoint(grad, values, disp, 1, True, False)
            assert_same(backend.warp_adjoint(grad, values, disp, 1, True, False), expected)


def test_far_displacements_equal_plain_torch(random: Any) -> None:
    """Look-ups from everywhere meet in a few voxels, and others leave the volume by far."""
    shape = (9, 7, 8)
    target = torch.tensor([4.3, 3.6, 2.2])[:, None, None, None].to(DEVICE)
    gather = target - torch_backend.grid_points(torch.empty(1, 3, *shape, device=DEVICE))
    for disp in (gather.contiguous(), random(1, 3, *shape, scale=40)):
        grad, outer = random(2, 1, 3, *shape)
        outer = 0.2 * outer
        args = (grad, [outer, disp, outer], [True] * 3)
        assert_same(backend.compose_adjoint(*args), torch_backend.compose_adjoint(*args))
        assert_same(
            backend.warp_adjoint(grad, outer, disp, 1, True, True),
            torch_backend.warp_adjoint(grad, outer, disp, 1, True, True),
        )


def test_ends_of_the_volume_have_no_slope(random: Any) -> None:
    """Positions exactly on the first and last voxels, where the clamp's derivative is 0."""
    values, points = random(1, 2, 4, 5, 6), torch.zeros(1, 3, 2, 1, 1, device=DEVICE)
    points[0, :, 1] = torch.tensor([3.0, 4.0, 5.0])[:, None, None]
    looked_up = backend.interpolate(values, points)
    assert_same(looked_up.flatten(2), torch.stack([values[..., 0, 0, 0], values[..., -1, -1, -1]], dim=-1))
    _, grad_points = backend.interpolate_adjoint(torch.ones_like(looked_up), values, points)
    assert grad_points is not None and not grad_points.any()


def test_positions_that_are_no_numbers_read_inside(random: Any) -> None:
    values = random(1, 2, 4, 5, 6)
    points = torch.full((1, 3, 1, 1, 3), float("nan"), device=DEVICE)
    points[..., 1], points[..., 2] = float("inf"), -float("inf")
    looked_up = backend.interpolate(values, points)
    first, last = values[..., 0, 0, 0], values[..., -1, -1, -1]
    assert_same(looked_up.flatten(2), torch.stack([first, last, first], dim=-1))


def test_any_layout_is_taken(random: Any) -> None:
    shape = (6, 7, 8)
    disp = random(1, 3, 1, 1, 1).expand(2, -1, *shape)
    sliced = random(2, 3, *(2 * size for size in shape), scale=0.05)[..., ::2, ::2, ::2]
    swapped = random(2, 3, *shape[::-1]).transpose(2, 4)
    (features,) = channels_last(random(1, 2, 9, *shape))
    fields, needed = [disp, swapped, sliced], [True] * 3
    assert_same(backend.compose(fields), torch_backend.compose(fields))
    for grad in (swapped, torch.ones((), device=DEVICE).expand(2, 3, *shape)):
        assert_same(backend.compose_adjoint(grad, fields, needed), torch_backend.compose_adjoint(grad, fields, needed))
        inverse = backend.invert(sliced, 1e-6, 100)
        assert_same(inverse, torch_backend.invert(sliced, 1e-6, 100))
        expected = torch_backend.invert_adjoint(grad, sliced, inverse)
        assert_same(backend.invert_adjoint(grad, sliced, inverse), expected)
        expected = torch_backend.upsample_control_points_adjoint(grad, 2)
        assert_same(backend.upsample_control_points_adjoint(grad, 2), expected)
    for values, grad in ((sliced, disp), (features[:, 3:6], swapped)):
        assert_same(backend.warp(values, swapped, 1), torch_backend.warp(values, swapped, 1))
        args = (grad, values, swapped, 1, True, True)
        assert_same(backend.warp_adjoint(*args), torch_backend.warp_adjoint(*args))


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_equal_plain_torch(shape: tuple[int, ...], random: Any) -> None:
    mask, points = random(2, 1, *shape) > -1.5, random(2, 3, *shape)
    for relative, scale in ((True, 0.05), (True, 2.0), (False, 5.0)):
        args = (mask, scale * points, relative)
        assert torch.equal(backend.mask_at(*args), torch_backend.mask_at(*args))
    assert torch.equal(backend.mask_at(mask, 0 * points, True), mask)
    points = random(1, 3, 3, 4, 5, scale=3)
    assert torch.equal(backend.mask_at(mask, points, False), torch_backend.mask_at(mask, points, False))


@pytest.mark.parametrize("shape", SHAPES)
def test_correlation_equals_plain_torch(shape: tuple[int, ...], random: Any) -> None:
    """In float64, where plain torch is exact."""
    image_1, image_2 = random(2, 2, 1, *shape, scale=0.2) + 0.5
    both, either, none = ((True, True),), ((False, True), (True, False)), ((False, False),)
    for window, mask, needs in ((3, None, both + either + none), (11, random(2, 1, *shape) > -1, both)):
        for needed in needs:
            exact = torch_backend.lncc_and_gradients(image_1.double(), image_2.double(), mask, window, *needed)
            actual = backend.lncc_and_gradients(image_1, image_2, mask, window, *needed)
            for result, reference in zip(actual, exact, strict=True):
                assert_close_to_largest(result, reference)


def test_correlation_keeps_what_a_bright_window_varies(random: Any) -> None:
    image_1, image_2 = 0.9 + 0.01 * torch.rand(2, 1, 1, 12, 13, 14, device=DEVICE)
    exact = torch_backend.lncc_and_gradients(image_1.double(), image_2.double(), None, 11, True, True)
    for result, expected in zip(backend.lncc_and_gradients(image_1, image_2, None, 11, True, True), exact, strict=True):
        assert_close_to_largest(result, expected)


def assert_close_to_largest(actual: Tensor | None, expected: Tensor | None) -> None:
    """Float32 against float64, to rounding of the largest value."""
    if actual is None or expected is None:
        assert actual is expected
        return
    assert actual.dtype == torch.float32
    largest = float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5 * largest)


def test_folding_equals_plain_torch(random: Any) -> None:
    for shape in ((7, 9, 11), (3, 4, 3)):
        disp = random(2, 3, *shape, scale=0.6)
        exact = torch_backend.ndv_sum_and_gradient(disp.double(), True)
        assert float(exact[0]) > 0.1
        for result, expected in zip(backend.ndv_sum_and_gradient(disp, True), exact, strict=True):
            assert_close_to_largest(result, expected)
        value, nothing = backend.ndv_sum_and_gradient(disp, False)
        assert nothing is None
        assert_close_to_largest(value, exact[0])
        assert_close_to_largest(backend.ndv_map(disp), torch_backend.ndv_map(disp.double()))
        for gradient in backend.ndv_sum_and_gradient(0.01 * disp, True):
            assert gradient is not None and not gradient.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusion_equals_plain_torch(shape: tuple[int, ...], random: Any) -> None:
    disp, scales = random(2, 3, *shape), [[1.0, 2.0, 0.5], [0.3, 1.0, 4.0], [2.0, 0.7, 1.0]]
    assert_close_to_largest(backend.diffusion(disp, scales), torch_backend.diffusion(disp.double(), scales))
    grad = torch.tensor(0.7, device=DEVICE)
    expected = torch_backend.diffusion_adjoint(grad.double(), disp.double(), scales)
    assert_close_to_largest(backend.diffusion_adjoint(grad, disp, scales), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_mind_equals_plain_torch(shape: tuple[int, ...], random: Any) -> None:
    image = random(2, 1, *shape, scale=0.2)
    image[:, :, : shape[0] // 2] = 0.3  # flat: nothing to compare
    for sigma, radius in ((0.5, 2), (1.0, 1)):
        expected = torch_backend.mind(image.double(), sigma, radius)
        assert_close_to_largest(backend.mind(image, sigma, radius), expected)


@pytest.mark.parametrize("inverse", [False, True])
def test_points_move_as_in_plain_torch(inverse: bool) -> None:
    """Through exact maps at the control point bound, also from beyond the grid; what is unknown stays unknown."""
    shape, generator = (7, 9, 11), torch.Generator().manual_seed(4)
    updates = []
    for level in (1, 0):
        size, bound = (3, *(ceil(n / 2**level) for n in shape)), 0.9 * control_point_bound((2**level,) * 3)
        pair = [(2 * torch.rand(size, generator=generator) - 1) * bound for _ in range(2)]
        updates.append((pair[0].to(DEVICE), pair[1].to(DEVICE)))
    points = (torch.rand(3, 150, generator=generator, dtype=torch.float64) * 16 - 3).to(DEVICE)
    points[1, 3] = torch.nan
    args = (points, steps_of(2, inverse), coefficients_of(updates, shape))
    for jacobians in (False, True):
        moved, derivatives, settled = backend.move_points(*args, jacobians, 1e-4, 200)
        expected, gradients, _ = torch_backend.move_points(*args, jacobians, 1e-4, 200)
        assert settled and bool(moved[:, 3].isnan().all()) and float((expected - points).abs().nanmedian()) > 0.1
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4, equal_nan=True)
        assert (derivatives is None) == (gradients is None) == (not jacobians)
        if derivatives is not None and gradients is not None:
            torch.testing.assert_close(derivatives, gradients, rtol=1e-3, atol=2e-3, equal_nan=True)
    _, _, settled = backend.move_points(*args, False, 1e-4, 1)
    assert not settled


def test_half_precision_values_are_read_as_they_are(random: Any) -> None:
    disp, (values,) = random(1, 3, 4, 5, 6), channels_last(random(1, 1, 5, 4, 5, 6).half())
    warped = backend.warp(values, disp, 1)
    assert warped.dtype == torch.half
    torch.testing.assert_close(warped.float(), torch_backend.warp(values.float(), disp, 1), rtol=1e-3, atol=1e-3)


def test_gradients_reach_the_inputs_of_public_operations(random: Any) -> None:
    """The same loss through the Triton kernels and through plain torch."""
    shape = (5, 4, 6)
    inputs = [random(1, 3, 3, 2, 3, scale=0.2), random(1, 3, *shape, scale=0.2), random(1, 4, 3, 2, 3)]
    results = []
    for name in ("cuda", "torch"):
        control_points, disp, features = (tensor.clone().requires_grad_() for tensor in inputs)
        with use_backend(name):
            update = ops.upsample_control_points(control_points, 2, shape)
            field = ops.compose(update, disp, ops.invert(update, 1e-6, 100))
            loss = ops.warp(features, field, 2).square().sum() + field.square().sum()
            loss = loss + ops.lncc(field[:, :1], disp[:, :1], window=3) + ops.ndv_sum(field)
            loss = loss + ops.diffusion(field, (1.0, 2.0, 1.5))
            results.append([loss, *torch.autograd.grad(loss, [control_points, disp, features])])
    assert_same(*results)


def test_only_float32_comes_here() -> None:
    with use_backend("cuda"):
        assert backend_of(torch.zeros(1, device=DEVICE)) is backend
        assert backend_of(torch.zeros(1, device=DEVICE, dtype=torch.float64)) is torch_backend
    assert INTERPRETED or backend_of(torch.zeros(1, device=DEVICE)) is backend


def test_volumes_too_large_for_32_bits_are_refused() -> None:
    assert blocks((1290, 1290, 1289), 128) == 16758008
    with pytest.raises(ValueError, match="up to 2147418112 voxels"):
        blocks((2048, 1024, 1024), 128)
