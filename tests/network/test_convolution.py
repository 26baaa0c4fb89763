"""Convolutions: PyTorch's results, and gradients of the weights that are exact and independent of threads."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.deform.backends.cpu import fallback, vectorised
from sitreg_lumir.network.layers import Convolution, convolve

KINDS = {"3x3x3": (3, 1, 1), "half": (2, 2, 0), "1x1x1": (1, 1, 0), "5x5x5": (5, 1, 2)}  # width, stride, padding


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def volume(batch: int, channels: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(batch, channels, *shape, dtype=dtype).relu()
    return values.contiguous(memory_format=torch.channels_last_3d)


def gradients(function: Any, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in inputs]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad)]


def case(kind: str, batch: int, channels: int, outputs: int, shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    width, stride, padding = KINDS[kind]
    inputs = [volume(batch, channels, shape), torch.randn(outputs, channels, *[width] * 3), torch.randn(outputs)]
    grad = torch.randn_like(F.conv3d(*inputs, stride=stride, padding=padding)) + 0.1
    return inputs, grad


def check(kind: str, inputs: list[Tensor], grad: Tensor, tolerance: float) -> None:
    _, stride, padding = KINDS[kind]
    actual = gradients(lambda *args: convolve(*args, stride, padding), inputs, grad)
    exact = gradients(
        lambda *args: F.conv3d(*args, stride, padding),
        [tensor.double().contiguous() for tensor in inputs],
        grad.double(),
    )
    for first, second in zip(actual, exact, strict=True):
        assert first.dtype == torch.float32
        assert float((first - second).norm() / second.norm()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 6, 5), (12, 10, 9), (6, 5, 40)], ids=str)
@pytest.mark.parametrize("channels", [(1, 1), (3, 5), (6, 4), (9, 8)], ids=str)
def test_gradients_of_any_shape_agree_with_float64(
    kind: str, shape: tuple[int, ...], channels: tuple[int, int]
) -> None:
    check(kind, *case(kind, 2, *channels, shape), tolerance=2e-6)


def raises(*_: Any) -> Any:
    raise AttributeError("module 'llvmlite.binding' has no attribute 'get_host_cpu_features'")


def wrong(values: Tensor, grad: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return torch.zeros_like(weight)


@pytest.mark.parametrize("broken", [raises, wrong])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_without_vectors_are_exact_too(
    broken: Any, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vectorised, "weight_gradient", broken)
    fallback.working.cache_clear()
    try:
        check(kind, *case(kind, 2, 3, 5, (7, 6, 5)), tolerance=2e-6)
        check(kind, *case(kind, 1, 9, 8, (6, 5, 40)), tolerance=2e-6)
    finally:
        fallback.working.cache_clear()
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "weight_gradient: vectors do not work with this version of numba"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["3x3x3", "half", "1x1x1"])
def test_gradients_at_the_size_of_training_are_exact(kind: str) -> None:
    check(kind, *case(kind, 1, 8, 8, (80, 112, 96)), tolerance=1e-6)


@pytest.mark.slow
def test_threads_change_no_bit_at_the_size_of_training() -> None:
    for kind, batch, channels, outputs, shape in (
        ("3x3x3", 2, 8, 8, (80, 112, 96)),
        ("3x3x3", 2, 32, 32, (20, 28, 24)),
        ("half", 2, 8, 16, (80, 112, 96)),
        ("1x1x1", 1, 6, 8, (80, 112, 96)),
        ("1x1x1", 2, 8, 3, (80, 112, 96)),
    ):
        inputs, grad = case(kind, batch, channels, outputs, shape)
        _, stride, padding = KINDS[kind]
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(gradients(lambda *args, s=stride, p=padding: convolve(*args, s, p), inputs, grad))
        for result in results[1:]:
            assert all(torch.equal(first, second) for first, second in zip(results[0], result, strict=True)), kind


def test_products_of_matrices_are_the_same_convolution() -> None:
    layer = Convolution(12, 3, 1)
    values = volume(1, 12, (40, 30, 20))
    with torch.inference_mode():
        result = layer(values)
    torch.testing.assert_close(result, F.conv3d(values, layer.weight, layer.bias), atol=1e-6, rtol=1e-6)
    assert result.is_contiguous(memory_format=torch.channels_last_3d)


def test_state_and_gradients_are_those_of_pytorch_s_layer() -> None:
    ours, theirs = Convolution(4, 6, 3, padding=1), torch.nn.Conv3d(4, 6, 3, padding=1)
    theirs.load_state_dict(ours.state_dict())
    values = volume(2, 4, (9, 8, 7))
    for layer in (ours, theirs):
        layer(values).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, atol=1e-3, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(values).dtype == torch.bfloat16


def test_frozen_weights_get_no_gradient_and_values_do() -> None:
    layer = Convolution(4, 6, 3, padding=1).requires_grad_(False)
    values = volume(2, 4, (9, 8, 7)).requires_grad_()
    layer(values).sum().backward()
    assert layer.weight.grad is None and values.grad is not None
