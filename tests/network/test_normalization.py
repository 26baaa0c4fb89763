"""Group normalisation with ReLU: right at the sizes that users have, in any layout, on any number of threads."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.deform.backends import use_backend
from sitreg_lumir.deform.backends.cpu.layers import channel_sums
from sitreg_lumir.network.layers import GroupNormRelu, group_norm_relu
from sitreg_lumir.network.mind import Mind

LAYOUTS = {"last": torch.channels_last_3d, "first": torch.contiguous_format}
SIZES = {"2mm": (80, 112, 96), "1mm": (160, 224, 192)}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def brain_features(shape: tuple[int, ...], channels: int = 12) -> Tensor:
    """A convolution of the MIND descriptor of an ellipsoid of noise: most voxels are background, all the same."""
    generator = torch.Generator().manual_seed(1)
    axes = torch.meshgrid(*(torch.linspace(-1.2, 1.2, size) for size in shape), indexing="ij")
    brain = sum(axis.square() for axis in axes) < 1
    image = (torch.rand(shape, generator=generator) * 0.5 + 0.3) * brain
    torch.manual_seed(2)
    convolution = torch.nn.Conv3d(6, channels, 1)
    with torch.no_grad():
        return convolution(Mind()(image[None, None]))


def exact(features: Tensor, groups: int, weight: Tensor, bias: Tensor) -> np.ndarray:
    """Normalised in float64 by numpy, whose sums are pairwise."""
    values = features.detach().contiguous().numpy().astype(np.float64)
    batch, channels = values.shape[:2]
    grouped = values.reshape(batch, groups, -1)
    normal = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(grouped.var(2, keepdims=True) + 1e-5)
    columns = (1, channels, 1, 1, 1)
    return np.maximum(
        normal.reshape(values.shape) * weight.double().numpy().reshape(columns)
        + bias.double().numpy().reshape(columns),
        0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_exact_at_full_size(size: str, layout: str) -> None:
    features = brain_features(SIZES[size]).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.rand(12) + 0.5, torch.randn(12)
    expected = exact(features, 4, weight, bias)
    with torch.no_grad():
        error = np.abs(group_norm_relu(features, 4, weight, bias).numpy() - expected)
    assert error.max() < 2e-5
    assert error.mean() < 1e-6


def gradients(features: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, groups: int = 4) -> list[Tensor]:
    inputs = [tensor.detach().clone(memory_format=torch.preserve_format) for tensor in (features, weight, bias)]
    for tensor in inputs:
        tensor.requires_grad_()
    result = group_norm_relu(inputs[0], groups, *inputs[1:])
    return [result.detach(), *torch.autograd.grad(result, inputs, grad)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_exact_at_the_size_of_training(layout: str) -> None:
    features = brain_features(SIZES["2mm"], 8).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.rand(8) + 0.5, torch.randn(8)
    grad = torch.randn_like(features) + 0.1
    actual = gradients(features, weight, bias, grad)
    inputs = [tensor.double().contiguous().requires_grad_() for tensor in (features, weight, bias)]
    expected = torch.autograd.grad(F.relu(F.group_norm(inputs[0], 4, *inputs[1:])), inputs, grad.double())
    for first, second in zip(actual[1:], expected, strict=True):
        assert float((first - second).norm() / second.norm()) < 2e-6


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_threads_change_no_bit(kind: str) -> None:
    features = brain_features(SIZES["2mm"], 8).to(getattr(torch, kind))
    features = torch.cat([features, features.flip(2)]).contiguous(memory_format=torch.channels_last_3d)
    weight, bias, grad = torch.rand(8) + 0.5, torch.randn(8), torch.randn_like(features)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(gradients(features, weight, bias, grad))
    for result in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], result, strict=True))


CASES = [  # batch, channels, groups, shape
    (1, 4, 2, (1, 1, 1)),
    (2, 6, 3, (5, 7, 3)),
    (3, 12, 4, (9, 8, 7)),
    (1, 256, 4, (3, 4, 5)),
    (2, 5, 1, (30, 31, 29)),
    (1, 8, 8, (40, 41, 9)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_shape_agrees_with_plain_pytorch(case: Any, layout: str, dtype: torch.dtype) -> None:
    batch, channels, groups, shape = case
    features = (torch.randn(batch, channels, *shape, dtype=dtype) + 3).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.randn(2, channels, dtype=dtype)
    grad = torch.randn_like(features)
    actual = gradients(features, weight, bias, grad, groups)
    with use_backend("torch"):
        plain = gradients(features, weight, bias, grad, groups)
    assert actual[0].stride() == features.stride()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for first, second in zip(actual, plain, strict=True):
        torch.testing.assert_close(first, second, atol=tolerance, rtol=tolerance)


def test_a_view_of_a_larger_volume_is_normalised_as_a_copy_of_it() -> None:
    whole = torch.randn(2, 8, 12, 10, 9)
    weight, bias = torch.rand(8), torch.randn(8)
    view = whole[:, :, 1:-1, 2:, ::2]
    actual = gradients(view, weight, bias, torch.ones(view.shape))
    copied = gradients(view.contiguous(), weight, bias, torch.ones(view.shape))
    assert all(torch.equal(first, second) for first, second in zip(actual, copied, strict=True))
    with torch.no_grad():
        before = whole.clone()
        group_norm_relu(view, 4, weight, bias)
    assert torch.equal(whole, before)


def test_bfloat16_is_float32_rounded_to_the_nearest() -> None:
    features = (torch.randn(2, 8, 20, 21, 19) * 2).bfloat16().contiguous(memory_format=torch.channels_last_3d)
    weight, bias = torch.rand(8) + 0.5, torch.randn(8)
    in_float = gradients(features.float(), weight, bias, torch.ones(features.shape))[0]
    result = gradients(features, weight, bias, torch.ones(features.shape, dtype=torch.bfloat16))[0]
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, in_float.bfloat16())


def test_without_gradients_the_input_is_overwritten_and_the_result_the_same() -> None:
    layer = GroupNormRelu(4, 8)
    features = torch.randn(1, 8, 9, 8, 7).contiguous(memory_format=torch.channels_last_3d)
    with_gradients = layer(features.clone(memory_format=torch.preserve_format))
    with torch.inference_mode():
        result = layer(features)
    assert torch.equal(result, with_gradients)
    assert result.data_ptr() == features.data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_does_not_vanish(value: float, dtype: torch.dtype) -> None:
    features = torch.randn(1, 8, 9, 8, 7).to(dtype)
    features[0, 0, 4, 4, 4] = value
    for layout in LAYOUTS.values():
        result = gradients(features.contiguous(memory_format=layout), torch.ones(8), torch.zeros(8), features)[0]
        assert not result[:, :2].isfinite().all()
        assert result[:, 2:].isfinite().all()


def test_a_flat_volume_becomes_the_bias() -> None:
    bias = torch.linspace(-1, 1, 8)
    features = torch.full((1, 8, 40, 40, 40), 1e4).contiguous(memory_format=torch.channels_last_3d)
    result = group_norm_relu(features, 4, torch.ones(8), bias)
    torch.testing.assert_close(result, bias.clamp(min=0)[None, :, None, None, None].expand(result.shape))


def test_sums_by_channel() -> None:
    features = torch.randn(2, 5, 17, 18, 19).contiguous(memory_format=torch.channels_last_3d)
    plain, squares = channel_sums(features)
    torch.testing.assert_close(torch.from_numpy(plain), features.double().sum(dim=(2, 3, 4)))
    torch.testing.assert_close(torch.from_numpy(squares), features.double().square().sum(dim=(2, 3, 4)))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        group_norm_relu(torch.zeros(1, 6, 3, 3, 3), 4, torch.ones(6), torch.ones(6))
    with pytest.raises(ValueError, match="features must be"):
        group_norm_relu(torch.zeros(1, 8, 3, 3, 3), 4, torch.ones(6), torch.ones(6))
