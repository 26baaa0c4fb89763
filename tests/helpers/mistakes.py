"""Deliberate mistakes in gradients, to show that a comparison finds them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sitreg_lumir.deform.backends import use_backend
from sitreg_lumir.deform.backends.torch import backend as torch_backend

_interpolate_adjoint = torch_backend.interpolate_adjoint


@contextmanager
def only_in_float32(name: str, mistaken: Callable[..., Any]) -> Iterator[None]:
    """Plain torch computes everything within the block, and one operation wrongly where tensors are float32."""
    right = getattr(torch_backend, name)

    def chosen(first: Any, *args: Any, **kwargs: Any) -> Any:
        return (mistaken if first.dtype == torch.float32 else right)(first, *args, **kwargs)

    with use_backend("torch"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, name, chosen)
        yield


def no_gradient_of_inverse(grad: Tensor, disp: Tensor, inverse: Tensor) -> Tensor:
    return torch.zeros_like(disp)


def inverse_with_wrong_sign(grad: Tensor, disp: Tensor, inverse: Tensor) -> Tensor:
    return -inverse_without_solve(grad, disp, inverse)


def inverse_without_solve(grad: Tensor, disp: Tensor, inverse: Tensor) -> Tensor:
    """The adjoint look-up alone, without the 3x3 system of each voxel."""
    gradient, _ = _interpolate_adjoint(-grad, disp, torch_backend.grid_points(disp) + inverse, need_points=False)
    assert gradient is not None
    return gradient


def gradients_outside(
    grad: Tensor, values: Tensor, points: Tensor, need_values: bool = True, need_points: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """The clamp's derivative is not 0 outside the volume: the border's slope goes on there."""
    last = torch.tensor([size - 1.0 for size in values.shape[2:]]).to(points)[:, None, None, None]
    return _interpolate_adjoint(
        grad, values, torch.minimum(points.clamp(min=1e-3), last - 1e-3), need_values, need_points
    )


def gradients_a_percent_off(
    grad: Tensor, values: Tensor, points: Tensor, need_values: bool = True, need_points: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by positions are 1 % too large."""
    by_values, by_points = _interpolate_adjoint(grad, values, points, need_values, need_points)
    return by_values, None if by_points is None else 1.01 * by_points
