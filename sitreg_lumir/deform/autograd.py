"""All autograd Functions: how gradients go through operations on deformations, losses and the network's layers.

Each keeps its inputs, or less, and computes the rest again in the backward pass. Shapes are checked before, in ``ops``
and ``network.layers``; the arithmetic is the backends'.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sitreg_lumir.deform.backends import backend_of
from sitreg_lumir.deform.backends.cpu import layers as cpu_layers
from sitreg_lumir.deform.backends.torch import layers as torch_layers
from sitreg_lumir.deform.bspline import Coefficients, Steps


class Upsample(torch.autograd.Function):
    """:func:`~sitreg_lumir.deform.ops.upsample_control_points`."""

    @staticmethod
    def forward(ctx: Any, control_points: Tensor, factor: int, shape: tuple[int, ...]) -> Any:
        ctx.factor = factor
        return backend_of(control_points).upsample_control_points(control_points, factor, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return backend_of(grads[0]).upsample_control_points_adjoint(grads[0], ctx.factor), None, None


class Invert(torch.autograd.Function):
    """:func:`~sitreg_lumir.deform.ops.invert`; the gradient is that of the equation which the inverse solves."""

    @staticmethod
    def forward(ctx: Any, disp: Tensor, tolerance: float, max_iterations: int) -> Any:
        inverse = backend_of(disp).invert(disp, tolerance, max_iterations)
        ctx.save_for_backward(disp, inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        disp, inverse = ctx.saved_tensors
        return backend_of(disp).invert_adjoint(grads[0], disp, inverse), None, None


class Compose(torch.autograd.Function):
    """:func:`~sitreg_lumir.deform.ops.compose`."""

    @staticmethod
    def forward(ctx: Any, *disps: Tensor) -> Any:
        ctx.save_for_backward(*disps)
        return backend_of(disps[0]).compose(disps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        disps = ctx.saved_tensors
        return tuple(backend_of(disps[0]).compose_adjoint(grads[0], disps, ctx.needs_input_grad))


class Warp(torch.autograd.Function):
    """:func:`~sitreg_lumir.deform.ops.warp`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, disp: Tensor, factor: int) -> Any:
        ctx.save_for_backward(values, disp)
        ctx.factor = factor
        return backend_of(values).warp(values, disp, factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values, disp = ctx.saved_tensors
        needed = ctx.needs_input_grad
        adjoint = backend_of(values).warp_adjoint(grads[0], values, disp, ctx.factor, needed[0], needed[1])
        return (*adjoint, None)


MAPS = ("left_fwd", "right_fwd", "left_inv", "right_inv")  # the fields of ``update.Maps``, in their order
_FIRST_COMPOSITIONS = (("a", "b_inv"), ("b", "a_inv"))  # of left_fwd and right_fwd, the last applied first
_COMPOSITIONS = (
    ("left_fwd", "a", "b_inv"),
    ("right_fwd", "b", "a_inv"),
    ("b", "a_inv", "left_inv"),
    ("a", "b_inv", "right_inv"),
)


class Update(torch.autograd.Function):
    """:func:`~sitreg_lumir.deform.update.update_maps`; it keeps the updates' inverses and upsamples again."""

    @staticmethod
    def forward(
        ctx: Any,
        control_points: Tensor,
        control_points_reverse: Tensor,
        factor: int,
        shape: tuple[int, ...],
        tolerance: float,
        max_iterations: int,
        *maps: Tensor | None,
    ) -> Any:
        backend = backend_of(control_points)
        with backend.copies_shared():
            fields = _upsampled(control_points, control_points_reverse, factor, shape)
            a_inv, b_inv = (backend.invert(fields[name], tolerance, max_iterations) for name in ("a", "b"))
            fields |= {"a_inv": a_inv, "b_inv": b_inv, **dict(zip(MAPS, maps, strict=True))}
            updated = tuple(backend.compose([fields[name] for name in names]) for names in _compositions(maps))
        ctx.save_for_backward(control_points, control_points_reverse, a_inv, b_inv, *maps)
        ctx.factor, ctx.shape = factor, shape
        return updated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        control_points, control_points_reverse, a_inv, b_inv, *maps = ctx.saved_tensors
        backend = backend_of(a_inv)
        with torch.autocast(a_inv.device.type, enabled=False):
            fields = _upsampled(control_points, control_points_reverse, ctx.factor, ctx.shape)
            fields |= {"a_inv": a_inv, "b_inv": b_inv, **dict(zip(MAPS, maps, strict=True))}
            needed = {"a", "b", "a_inv", "b_inv"}
            needed |= {name for name, need in zip(MAPS, ctx.needs_input_grad[-len(maps) :], strict=True) if need}
            with backend.copies_shared():
                totals = _gradients(fields, needed, _compositions(maps), grads)
                through = []
                for name in ("a", "b"):
                    inverse = f"{name}_inv"
                    by_inverse = backend.invert_adjoint(totals.pop(inverse), fields[name], fields[inverse])
                    total = totals[name].add_(by_inverse)
                    through.append(backend.upsample_control_points_adjoint(total, ctx.factor))
        return (*through, None, None, None, None, *(totals.get(name) for name in MAPS))


def _gradients(
    fields: dict[str, Any], needed: set[str], compositions: Sequence[Sequence[str]], grads: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Gradients of the needed fields, from those of the compositions."""
    totals: dict[str, Tensor] = {}
    for names, grad in zip(compositions, grads, strict=True):
        parts = backend_of(grad).compose_adjoint(
            grad, [fields[name] for name in names], [name in needed for name in names]
        )
        for name, part in zip(names, parts, strict=True):
            if part is None:
                continue
            if name in totals:
                totals[name].add_(part)  # the backend made it just now, so nobody else sees it
            else:
                totals[name] = part
    return totals


def _upsampled(
    control_points: Tensor, control_points_reverse: Tensor, factor: int, shape: Sequence[int]
) -> dict[str, Any]:
    backend = backend_of(control_points)
    return {
        "a": backend.upsample_control_points(control_points, factor, shape),
        "b": backend.upsample_control_points(control_points_reverse, factor, shape),
    }


def _compositions(maps: Sequence[Tensor | None]) -> tuple[tuple[str, ...], ...]:
    return _FIRST_COMPOSITIONS if maps[0] is None else _COMPOSITIONS


class Follow(torch.autograd.Function):
    """:class:`~sitreg_lumir.deform.splines.FollowedPoints`; ``path`` keeps where the points went."""

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, points: Tensor, steps: Steps, coefficients: Coefficients, path: Tensor,
        needed: Sequence[bool], tolerance: float, max_iterations: int,
    ) -> Any:  # fmt: skip
        _, settled = backend_of(flat).trace_points(points, steps, coefficients, tolerance, max_iterations, path)
        ctx.save_for_backward(points)
        ctx.steps, ctx.coefficients, ctx.path, ctx.needed = steps, coefficients, path, needed
        return path[-1].clone(), torch.tensor(settled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (points,) = ctx.saved_tensors
        by_coefficients = backend_of(ctx.coefficients.flat).trace_points_adjoint(
            grads[0], points, ctx.steps, ctx.coefficients, ctx.path, ctx.needed
        )
        return by_coefficients, *(None,) * 7


class Lncc(torch.autograd.Function):
    """:func:`~sitreg_lumir.deform.ops.lncc`: a scalar, so its gradient is computed along with it and scaled later."""

    @staticmethod
    def forward(ctx: Any, image_1: Tensor, image_2: Tensor, mask: Tensor | None, window: int, learning: bool) -> Any:
        need_1, need_2 = (learning and need for need in ctx.needs_input_grad[:2])
        value, *grads = backend_of(image_1).lncc_and_gradients(image_1, image_2, mask, window, need_1, need_2)
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *(None if grad is None else grad * grads[0] for grad in ctx.saved_tensors), None, None, None


class NdvSum(torch.autograd.Function):
    """:func:`~sitreg_lumir.deform.ops.ndv_sum`, with its gradient at once as :class:`Lncc`."""

    @staticmethod
    def forward(ctx: Any, disp: Tensor, learning: bool) -> Any:
        value, grad = backend_of(disp).ndv_sum_and_gradient(disp, learning and ctx.needs_input_grad[0])
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.saved_tensors[0] * grads[0], None


class Diffusion(torch.autograd.Function):
    """:func:`~sitreg_lumir.deform.ops.diffusion`."""

    @staticmethod
    def forward(ctx: Any, disp: Tensor, scales: tuple[tuple[float, ...], ...]) -> Any:
        ctx.save_for_backward(disp)
        ctx.scales = scales
        return backend_of(disp).diffusion(disp, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (disp,) = ctx.saved_tensors
        return backend_of(disp).diffusion_adjoint(grads[0], disp, ctx.scales), None


class SumAndDifference(torch.autograd.Function):
    """``even + odd`` and ``even - odd`` one behind the other along the batch, written where they are to lie."""

    @staticmethod
    def forward(ctx: Any, even: Tensor, odd: Tensor) -> Any:
        layout = torch.channels_last_3d if cpu_layers.channels_are_last(even) else torch.contiguous_format
        shape = (2 * len(even), *even.shape[1:])
        both = torch.empty(shape, dtype=even.dtype, device=even.device, memory_format=layout)
        plus, minus = both.chunk(2)
        torch.add(even, odd, out=plus)
        torch.sub(even, odd, out=minus)
        return both

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plus, minus = grads[0].chunk(2)
        return plus + minus, plus - minus


class GroupNormRelu(torch.autograd.Function):
    """:func:`~sitreg_lumir.network.layers.group_norm_relu` on a CPU; it keeps its input and the statistics."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Any:
        features = cpu_layers.dense(features)
        out, ctx.statistics = cpu_layers.normalize(features, weight, bias, groups, eps, overwrite=False)
        ctx.groups = groups
        ctx.save_for_backward(features, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        features, weight = ctx.saved_tensors
        return *cpu_layers.normalize_adjoint(grads[0], features, weight, ctx.statistics, ctx.groups), None, None


class Convolve(torch.autograd.Function):
    """:func:`~sitreg_lumir.network.layers.convolve` on a CPU, with exact gradients of weight and bias."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Any:
        ctx.save_for_backward(values, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch_layers.convolve(values, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values, weight = ctx.saved_tensors
        (grad,) = grads
        by_values = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_values = torch_layers.convolve_adjoint(grad, values, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            by_weight = cpu_layers.weight_gradient(values, grad, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            by_bias = cpu_layers.bias_gradient(grad)
        return by_values, by_weight, by_bias, None, None
