"""The fused losses: plain torch against its own formula and autograd, and the compiled loops against plain torch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.deform import ops
from sitreg_lumir.deform.backends import use_backend
from sitreg_lumir.deform.backends.cpu import backend as cpu_backend
from sitreg_lumir.deform.backends.torch import backend as torch_backend
from sitreg_lumir.deform.jacobian import non_diffeomorphic_volume

SHAPES = [(9, 13, 7), (18, 6, 21), (3, 4, 5)]
DTYPES = [torch.float64, torch.float32]


@pytest.fixture
def draw() -> Any:
    """Uniform random tensors: ``draw(*shape, dtype=..., scale=...)`` in [0, scale]."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        return scale * torch.rand(*shape, generator=generator, dtype=dtype)

    return uniform


def assert_same(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Equal to rounding, and where gradients are far below 1, to rounding of the largest."""
    if actual is None or expected is None:
        assert actual is expected
        return
    if not isinstance(actual, Tensor):
        for first, second in zip(actual, expected, strict=True):
            assert_same(first, second, dtype)
        return
    assert actual.dtype == expected.dtype == dtype and actual.shape == expected.shape
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * largest)


def plain_correlation(image_1: Tensor, image_2: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """The definition, with one dense convolution for each window sum."""
    if mask is not None:
        image_1, image_2 = image_1 * mask, image_2 * mask
    kernel = torch.ones(1, 1, window, window, window, dtype=image_1.dtype)

    def window_sum(values: Tensor) -> Tensor:
        return F.conv3d(values, kernel, padding=window // 2)

    sum_1, sum_2 = window_sum(image_1), window_sum(image_2)
    cross = window_sum(image_1 * image_2) - sum_1 * sum_2 / window**3
    variance_1 = window_sum(image_1**2) - sum_1**2 / window**3
    variance_2 = window_sum(image_2**2) - sum_2**2 / window**3
    return (cross**2 / (variance_1 * variance_2 + 1e-5)).mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [3, 11])
def test_plain_correlation_has_the_gradient_of_its_formula(shape: tuple[int, ...], window: int, draw: Any) -> None:
    """With and without mask, in windows wider than the volume, too."""
    image_1, image_2 = (draw(2, 1, *shape).requires_grad_() for _ in range(2))
    for mask in (None, draw(2, 1, *shape) > 0.3):
        expected = plain_correlation(image_1, image_2, mask, window)
        grads = torch.autograd.grad(expected, (image_1, image_2))
        value, *actual = torch_backend.lncc_and_gradients(image_1.detach(), image_2.detach(), mask, window, True, True)
        assert float(value) == pytest.approx(float(expected.detach()), rel=1e-12, abs=1e-18)
        assert_same(actual, grads, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 6, 1)])
@pytest.mark.parametrize("window", [3, 11])
def test_compiled_correlation_equals_plain_torch(
    shape: tuple[int, ...], window: int, dtype: torch.dtype, draw: Any
) -> None:
    image_1, image_2 = (draw(2, 1, *shape, dtype=dtype) for _ in range(2))
    exact = torch.float64  # plain torch sums up in the images' dtype, the loops in float64
    for mask in (None, draw(2, 1, *shape) > 0.3, torch.zeros(2, 1, *shape, dtype=torch.bool)):
        for needed in ((False, False), (True, False), (False, True), (True, True)):
            expected = torch_backend.lncc_and_gradients(image_1.to(exact), image_2.to(exact), mask, window, *needed)
            actual = cpu_backend.lncc_and_gradients(image_1, image_2, mask, window, *needed)
            assert_same(actual, [None if tensor is None else tensor.to(dtype) for tensor in expected], dtype)


def test_compiled_correlation_takes_any_layout(draw: Any) -> None:
    image_1 = draw(5, 6, 7, 1, 2).permute(4, 3, 2, 1, 0)
    image_2 = draw(1, 1, 14, 6, 10)[..., ::2, :, ::2].expand(2, -1, -1, -1, -1)
    mask = (draw(2, 1, 5, 6, 7) > 0.2).transpose(2, 4)
    args = (image_1, image_2, mask, 5, True, True)
    assert_same(cpu_backend.lncc_and_gradients(*args), torch_backend.lncc_and_gradients(*args), torch.float64)


def test_correlation_in_float32_keeps_what_a_bright_window_varies(draw: Any) -> None:
    """Variances are small differences of large sums; the loops take them in float64."""
    image_1, image_2 = (0.9 + draw(1, 1, 20, 21, 22, scale=1e-2) for _ in range(2))
    single = (image_1.float(), image_2.float())
    exact = torch_backend.lncc_and_gradients(*(image.double() for image in single), None, 11, True, False)
    actual = cpu_backend.lncc_and_gradients(*single, None, 11, True, False)
    assert float(actual[0]) == pytest.approx(float(exact[0]), rel=1e-6)
    assert exact[1] is not None and actual[1] is not None
    assert float((actual[1] - exact[1]).norm() / exact[1].norm()) < 1e-4


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_local_correlation_learns_and_scales(backend: str, draw: Any) -> None:
    image_1, image_2 = (draw(1, 1, 6, 7, 5).requires_grad_() for _ in range(2))
    mask = draw(1, 1, 6, 7, 5) > 0.2
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *images: ops.lncc(*images, mask, 3), (image_1, image_2))
        (once,) = torch.autograd.grad(ops.lncc(image_1, image_2, mask, 3), image_1)
        (thrice,) = torch.autograd.grad(-3 * ops.lncc(image_1, image_2.detach(), mask, 3), image_1)
        torch.testing.assert_close(thrice, -3 * once)
        half = ops.lncc(image_1.bfloat16(), image_2.bfloat16(), mask, 3)
        assert half.dtype == torch.bfloat16
        with torch.no_grad():
            assert not ops.lncc(image_1, image_2, mask, 3).requires_grad


def folding_field(draw: Any, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Folds in about every second voxel."""
    return draw(2, 3, *shape, dtype=dtype, scale=1.6)


def plain_diffusion(disp: Tensor, voxel_size: tuple[float, ...]) -> Tensor:
    """Mean over axes and components of the squared gradients, in units of the voxels' sizes."""
    gradients = [
        [((voxel_size[c] / voxel_size[d]) ** 2 * disp[:, c].diff(dim=d + 1) ** 2).mean() for c in range(3)]
        for d in range(3)
    ]
    return torch.stack([gradient for along in gradients for gradient in along]).mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_field_losses_have_the_gradients_of_their_formulas(shape: tuple[int, ...], draw: Any) -> None:
    disp = folding_field(draw, *shape).requires_grad_()
    volume = non_diffeomorphic_volume(disp)
    assert 0.2 < float((volume > 0).double().mean()) < 1
    (grad,) = torch.autograd.grad(volume.sum(), disp)
    assert_same(torch_backend.ndv_sum_and_gradient(disp.detach(), True), (volume.sum().detach(), grad), torch.float64)
    size = (1.0, 2.0, 1.5)
    expected = plain_diffusion(disp, size)
    (grad,) = torch.autograd.grad(expected, disp)
    with use_backend("torch"):
        value = ops.diffusion(disp, size)
        assert_same((value.detach(), *torch.autograd.grad(value, disp)), (expected.detach(), grad), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (6, 3, 3)])
def test_compiled_folding_equals_plain_torch(shape: tuple[int, ...], dtype: torch.dtype, draw: Any) -> None:
    fields = [folding_field(draw, *shape, dtype=dtype), 0.1 * folding_field(draw, *shape, dtype=dtype)]
    fields += [fields[0].permute(0, 1, 4, 2, 3), fields[0][:1].expand(3, -1, -1, -1, -1)]
    for disp in fields:
        assert_same(cpu_backend.ndv_map(disp), torch_backend.ndv_map(disp), dtype)
        for need_grad in (True, False):
            assert_same(
                cpu_backend.ndv_sum_and_gradient(disp, need_grad),
                torch_backend.ndv_sum_and_gradient(disp, need_grad),
                dtype,
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 6, 1)])
def test_compiled_diffusion_equals_plain_torch(shape: tuple[int, ...], dtype: torch.dtype, draw: Any) -> None:
    scales = tuple(tuple(row) for row in (0.5 + draw(3, 3)).tolist())
    grad = torch.tensor(-1.7, dtype=dtype)
    disp = draw(2, 3, *shape, dtype=dtype)
    for field in (disp, disp.permute(0, 1, 4, 2, 3)):
        assert_same(cpu_backend.diffusion(field, scales), torch_backend.diffusion(field, scales), dtype)
        args = (grad, field, scales)
        assert_same(cpu_backend.diffusion_adjoint(*args), torch_backend.diffusion_adjoint(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 6, 1)])
def test_compiled_mind_equals_plain_torch(shape: tuple[int, ...], dtype: torch.dtype, draw: Any) -> None:
    image = draw(2, 1, *shape, dtype=dtype)
    image[1, :, : 1 + shape[0] // 2] = 0.3  # flat, but for the last bits
    for view in (image, image.permute(0, 1, 4, 2, 3)):
        for sigma, radius in ((0.5, 2), (1.3, 1), (0.8, 3)):
            actual, expected = (backend.mind(view, sigma, radius) for backend in (cpu_backend, torch_backend))
            assert_same(actual, expected, dtype)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_field_losses_learn_and_scale(backend: str, draw: Any) -> None:
    disp = folding_field(draw, 4, 5, 3).requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(ops.ndv_sum, disp)
        assert torch.autograd.gradcheck(lambda field: ops.diffusion(field, (1.0, 2.0, 3.0)), disp)
        for loss in (ops.ndv_sum, ops.diffusion):
            (once,) = torch.autograd.grad(loss(disp), disp)
            (thrice,) = torch.autograd.grad(-3 * loss(disp), disp)
            torch.testing.assert_close(thrice, -3 * once)
            assert loss(disp.bfloat16()).dtype == torch.bfloat16
            with torch.no_grad():
                assert not loss(disp).requires_grad
        assert not ops.ndv_map(disp).requires_grad


def test_mind_of_an_image_that_learns_has_a_gradient(draw: Any) -> None:
    image = draw(1, 1, 3, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: ops.mind(values, 0.5, 1), image)
    torch.testing.assert_close(ops.mind(image.detach(), 0.5, 1), ops.mind(image, 0.5, 1).detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_masks_equal_plain_torch(dtype: torch.dtype, draw: Any) -> None:
    """Inside, on the border up to a thousandth, and far outside; relative and absolute points."""
    for shape in (*SHAPES, (1, 6, 1)):
        mask = draw(2, 1, *shape) > 0.1
        points = draw(2, 3, *shape, dtype=dtype, scale=6.0) - 3
        rounded = (4 * points).round() / 4
        for disp in (points, rounded, rounded * 4.7e-4, rounded.fill_(0)):
            actual, expected = (backend.mask_at(mask, disp, True) for backend in (cpu_backend, torch_backend))
            assert actual.dtype == torch.bool and actual.shape == mask.shape
            assert torch.equal(actual, expected)
            relative = ops.mask_at(mask, disp, relative=True)
            assert torch.equal(relative, ops.mask_at(mask.double(), torch_backend.grid_points(disp) + disp))
        other_grid = 8 * draw(2, 3, 4, 3, 2, dtype=dtype) - 1
        assert torch.equal(cpu_backend.mask_at(mask, other_grid, False), torch_backend.mask_at(mask, other_grid, False))


def test_results_do_not_depend_on_the_number_of_threads(draw: Any, two_threads: None) -> None:
    shape = (35, 12, 17)
    image_1, image_2 = (draw(2, 1, *shape, dtype=torch.float32) for _ in range(2))
    mask, disp = draw(2, 1, *shape) > 0.2, 4 * draw(2, 3, *shape, dtype=torch.float32) - 2
    scales, grad = ((1.0,) * 3,) * 3, torch.ones(())

    def results() -> list[Tensor]:
        tensors = [
            *cpu_backend.lncc_and_gradients(image_1, image_2, mask, 5, True, True),
            cpu_backend.mask_at(mask, disp, True),
            *cpu_backend.ndv_sum_and_gradient(disp, True),
            cpu_backend.ndv_map(disp),
            cpu_backend.diffusion(disp, scales),
            cpu_backend.diffusion_adjoint(grad, disp, scales),
            cpu_backend.mind(image_1, 0.5, 2),
        ]
        return [tensor for tensor in tensors if tensor is not None]

    on_two = [results() for _ in range(3)]
    torch.set_num_threads(1)
    for run in on_two:
        assert all(torch.equal(first, second) for first, second in zip(results(), run, strict=True))


@pytest.mark.parametrize("backend", [torch_backend, cpu_backend])
def test_what_is_not_finite_stays_so_and_ends(backend: Any, draw: Any) -> None:
    image = draw(1, 1, 6, 7, 8)
    image[0, 0, 2, 3, 4] = float("nan")
    value, grad, _ = backend.lncc_and_gradients(image, draw(1, 1, 6, 7, 8), None, 3, True, False)
    assert bool(value.isnan()) and bool(grad.isnan().any())
    assert bool(backend.mind(image, 0.5, 2).isnan().any())
    disp = folding_field(draw, 6, 7, 8)
    disp[0, 1, 2, 3, 4] = float("nan")
    value, grad = backend.ndv_sum_and_gradient(disp, True)
    assert bool(value.isnan()) and backend.ndv_map(disp).isnan().sum() == 13  # the voxels that look at it
    scales = ((1.0,) * 3,) * 3
    assert bool(backend.diffusion(disp, scales).isnan())
    assert backend.diffusion_adjoint(torch.ones((), dtype=disp.dtype), disp, scales).isnan().sum() == 7
    disp = torch.full((1, 3, 6, 7, 8), float("nan"), dtype=torch.float64)
    assert not bool(backend.mask_at(torch.ones(1, 1, 6, 7, 8, dtype=torch.bool), disp, True).any())


def test_wrong_shapes_are_named(draw: Any) -> None:
    image = draw(1, 1, 4, 5, 6)
    assert 0 <= float(ops.lncc(image, image, window=1)) < 1e-20
    with pytest.raises(ValueError, match="images must be"):
        ops.lncc(image, image[..., 1:])
    with pytest.raises(ValueError, match="images must be"):
        ops.lncc(image.expand(1, 2, -1, -1, -1), image.expand(1, 2, -1, -1, -1))
    with pytest.raises(ValueError, match="mask must be"):
        ops.lncc(image, image, torch.ones(1, 1, 4, 5, 5))
    with pytest.raises(ValueError, match="odd"):
        ops.lncc(image, image, None, 4)
    for loss in (ops.ndv_sum, ops.ndv_map):
        with pytest.raises(ValueError, match="axes of 3 or more"):
            loss(torch.zeros(1, 3, 3, 2, 3))
    with pytest.raises(ValueError, match=r"\(B, 3, X, Y, Z\)"):
        ops.diffusion(image)
    with pytest.raises(ValueError, match="three positive"):
        ops.diffusion(torch.zeros(1, 3, 3, 2, 3), (1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="image must be"):
        ops.mind(torch.zeros(1, 3, 3, 2, 3), 0.5, 2)
    with pytest.raises(ValueError, match="radius"):
        ops.mind(image, 0.5, 0)
