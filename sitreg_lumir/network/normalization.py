"""Group normalisation followed by ReLU, with statistics that are right in any layout and at any size.

PyTorch's on a CPU adds up volumes with channels innermost one voxel after the other in float32: at 160x224x192 its
results are off by up to 0.2 standard deviations, and they depend on the number of threads.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sitreg_lumir.deform.cpu import normalization as loops
from sitreg_lumir.deform.cpu.threads import run
from sitreg_lumir.deform.ops import compiled_on_cpu

_LANES = 192  # about so many values a step: enough to fill the processor's registers, few enough to stay in its cache
_STEPS = 256  # of a row
_LENGTH = 2**15  # of a row where values are taken one by one


class GroupNormRelu(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` and ReLU in one. On a CPU without gradients it overwrites its input.

    ``forward``: ``(B, C, X, Y, Z)`` -> the same shape, type and layout.
    """

    def forward(self, features: Tensor) -> Tensor:
        return group_norm_relu(features, self.num_groups, self.weight, self.bias, self.eps)


def group_norm_relu(features: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance of each group of channels of each volume, then ``max(weight * . + bias, 0)``.

    Sums over a volume run in float64, in an order that does not depend on the number of threads. Half precision is
    computed in float32.

    Args:
        features: ``(B, C, X, Y, Z)``. On a CPU, they are overwritten where no gradient is asked for.
        groups: a divisor of ``C``.
        weight: ``(C,)``.
        bias: ``(C,)``.
        eps: is added to variances.

    Returns:
        the same shape, type and layout as ``features``.

    Raises:
        ValueError: the shapes do not belong together.

    Source: Wu & He, Group normalization, ECCV 2018.
    """
    channels = features.shape[1] if features.ndim > 1 else 0
    if features.ndim != 5 or channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"features must be (B, C, X, Y, Z) with C a multiple of {groups} and as many weights, got "
            f"{tuple(features.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if compiled_on_cpu(features):
        if torch.is_grad_enabled():
            result: Tensor = _GroupNormRelu.apply(features, weight, bias, groups, eps)
            return result
        return _normalize(dense(features), weight, bias, groups, eps, overwrite=True)[0]
    last = _channels_are_last(features)
    with torch.autocast(features.device.type, enabled=False):
        # PyTorch's is right for volumes whose channels lie one behind the other, and on GPUs
        whole = features.to(weight.dtype).contiguous()
        result = F.relu(F.group_norm(whole, groups, weight, bias, eps), inplace=True).to(features.dtype)
    return result.contiguous(memory_format=torch.channels_last_3d) if last else result


def sum_and_difference(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """``first + second`` and ``first - second``; where no gradient is asked for, both are overwritten.

    Args:
        first: ``(B, C, X, Y, Z)``.
        second: the same shape and type.
    """
    if torch.is_grad_enabled():
        return first + second, first - second
    alike = first.stride() == second.stride() and first.dtype == second.dtype
    if not (alike and compiled_on_cpu(first) and (first.is_contiguous() or _channels_are_last(first))):
        difference = first - second
        return first.add_(second), difference
    values = _flat(first)
    run(loops.sum_and_difference, -(-len(values) // _LENGTH), values, _flat(second), _LENGTH)
    return first, second


def channel_sums(features: Tensor) -> Any:
    """Sums and sums of squares of each channel of each volume on a CPU, independent of the number of threads.

    Args:
        features: ``(B, C, X, Y, Z)``, contiguous, or with channels innermost.

    Returns:
        a float64 array ``(2, B, C)``.
    """
    layout = _Layout.of(features)
    totals = np.empty((layout.rows, 2, layout.lanes))
    run(loops.sums, layout.rows, _flat(features), layout.size, layout.length, totals)
    return layout.by_channel(totals)


class _Layout(NamedTuple):
    """How a volume's values lie in memory: see the module of the loops."""

    batch: int
    channels: int
    last: bool  # channels innermost
    size: int  # of an item
    lanes: int
    length: int  # of a row
    rows: int  # of all items

    @classmethod
    def of(cls, features: Tensor) -> "_Layout":
        batch, channels = features.shape[:2]
        last, voxels = _channels_are_last(features), features[0, 0].numel()
        size = channels * voxels if last else voxels
        lanes = channels * max(1, _LANES // channels) if last else _LANES
        length = lanes * _STEPS
        items = batch if last else batch * channels
        return cls(batch, channels, last, size, lanes, length, items * -(-size // length))

    def by_lane(self, by_channel: Any, dtype: Any) -> Any:
        """``(B, C)`` -> ``(items, lanes)``."""
        if self.last:
            return np.tile(by_channel, self.lanes // self.channels).astype(dtype)
        return np.repeat(by_channel.reshape(-1, 1), self.lanes, axis=1).astype(dtype)

    def by_channel(self, totals: Any) -> Any:
        """``(rows, N, lanes)`` -> sums ``(N, B, C)``."""
        items = self.batch if self.last else self.batch * self.channels
        sums = totals.reshape(items, self.rows // items, *totals.shape[1:]).sum(axis=1)
        if self.last:
            sums = sums.reshape(items, -1, self.lanes // self.channels, self.channels).sum(axis=2)
        else:
            sums = sums.sum(axis=2, keepdims=True).reshape(self.batch, self.channels, -1).swapaxes(1, 2)
        return sums.swapaxes(0, 1)


class _ByChannel(NamedTuple):
    """What a forward pass found, ``(B, C)``, float64: ``result = max((value - mean) * scale + shift, 0)``."""

    mean: Any
    inverse_deviation: Any  # of the channel's group
    scale: Any
    shift: Any

    def by_lane(self, layout: _Layout, dtype: Any) -> tuple[Any, Any, Any]:
        """Means, scales and shifts as the loops take them."""
        return tuple(layout.by_lane(part, dtype) for part in (self.mean, self.scale, self.shift))


def _normalize(
    features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, overwrite: bool
) -> tuple[Tensor, _ByChannel]:
    layout, values = _Layout.of(features), _flat(features)
    sums, squares = channel_sums(features).reshape(2, len(features), groups, -1).sum(axis=3)
    count = features[0].numel() // groups
    with np.errstate(invalid="ignore"):  # of values that are not finite, results are not finite either
        mean = sums / count
        inverse_deviation = 1 / np.sqrt(np.maximum(squares / count - mean * mean, 0) + eps)
    mean, inverse_deviation = (part.repeat(layout.channels // groups, axis=1) for part in (mean, inverse_deviation))
    scale = inverse_deviation * _numbers(weight)
    found = _ByChannel(mean, inverse_deviation, scale, np.broadcast_to(_numbers(bias), scale.shape))
    out = features.detach() if overwrite else torch.empty_like(features)
    affine = found.by_lane(layout, _arithmetic(features))
    run(loops.normalize, layout.rows, values, layout.size, layout.length, *affine, _flat(out))
    return out, found


class _GroupNormRelu(torch.autograd.Function):
    """:func:`group_norm_relu` in compiled loops; it keeps its input and the statistics."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Any:
        features = dense(features)
        out, ctx.found = _normalize(features, weight, bias, groups, eps, overwrite=False)
        ctx.groups = groups
        ctx.save_for_backward(features, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        features, weight = ctx.saved_tensors
        layout, values, dtype = _Layout.of(features), _flat(features), _arithmetic(features)
        order = torch.channels_last_3d if layout.last else torch.contiguous_format
        grad = _flat(grads[0].to(features.dtype).contiguous(memory_format=order))
        affine = ctx.found.by_lane(layout, dtype)
        totals = np.empty((layout.rows, 2, layout.lanes))
        run(loops.gradient_sums, layout.rows, values, grad, layout.size, layout.length, *affine, totals)
        by_bias, products = layout.by_channel(totals)
        by_weight = products * ctx.found.inverse_deviation
        count = features[0].numel() // ctx.groups

        def share(sums: Any) -> Any:
            """What each value of a group takes from the sum of the group's weighted gradients."""
            of_group = (sums * _numbers(weight)).reshape(layout.batch, ctx.groups, -1).sum(axis=2) / count
            return of_group.repeat(layout.channels // ctx.groups, axis=1) * ctx.found.inverse_deviation

        offsets = layout.by_lane(share(by_bias), dtype)
        slopes = layout.by_lane(share(by_weight) * ctx.found.inverse_deviation, dtype)
        out = torch.empty_like(features)
        args = (values, grad, layout.size, layout.length, *affine, offsets, slopes, _flat(out))
        run(loops.gradient, layout.rows, *args)
        by_parameter = (torch.from_numpy(part.sum(axis=0)).to(weight.dtype) for part in (by_weight, by_bias))
        return out, *by_parameter, None, None


def _channels_are_last(features: Tensor) -> bool:
    return not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last_3d)


def dense(features: Tensor) -> Tensor:
    """The same values as they are where they are contiguous or have their channels innermost, else contiguous."""
    return features if _channels_are_last(features) else features.contiguous()


def _arithmetic(features: Tensor) -> Any:
    return np.float64 if features.dtype == torch.float64 else np.float32


def _numbers(parameter: Tensor) -> Any:
    return parameter.detach().double().numpy()


def _flat(features: Tensor) -> Any:
    """The values in the order in which they lie in memory; a bfloat16 as its bits."""
    features = features.detach()
    if features.dtype == torch.bfloat16:
        features = features.view(torch.uint16)
    if _channels_are_last(features):
        features = features.movedim(1, -1)
    return features.view(-1).numpy()
