"""Sums over feature maps in compiled CPU loops: group normalisation with ReLU, and convolutions' weight gradients.

Sums over a volume run in float64, in an order that does not depend on the number of threads. PyTorch on a CPU adds up
volumes with channels innermost one voxel after the other in float32: at 160x224x192 its statistics are off by up to
0.2 standard deviations, and the gradients of weights by a share of the same kind.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sitreg_lumir.deform.backends.cpu import normalization as loops
from sitreg_lumir.deform.backends.cpu.fallback import working
from sitreg_lumir.deform.backends.cpu.threads import run

_LANES = 192  # about so many values a step: enough to fill the processor's registers, few enough to stay in its cache
_STEPS = 256  # of a row
_LENGTH = 2**15  # of a row where values are taken one by one


class Statistics(NamedTuple):
    """What a normalisation measured, ``(B, C)``, float64: ``result = max((value - mean) * scale + shift, 0)``."""

    mean: Any
    inverse_deviation: Any  # of the channel's group
    scale: Any
    shift: Any


def normalize(
    features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, overwrite: bool
) -> tuple[Tensor, Statistics]:
    """Group normalisation with ReLU.

    Args:
        features: ``(B, C, X, Y, Z)``, :func:`dense`; float32, float64 or bfloat16.
        weight: ``(C,)``.
        bias: ``(C,)``.
        groups: a divisor of ``C``.
        eps: is added to variances.
        overwrite: write the result over ``features``.

    Returns:
        the result, of the shape, type and layout of ``features``, and what :func:`normalize_adjoint` needs.
    """
    layout, values = _Layout.of(features), _flat(features)
    sums, squares = channel_sums(features).reshape(2, len(features), groups, -1).sum(axis=3)
    count = features[0].numel() // groups
    with np.errstate(invalid="ignore"):  # of values that are not finite, results are not finite either
        mean = sums / count
        inverse_deviation = 1 / np.sqrt(np.maximum(squares / count - mean * mean, 0) + eps)
    mean, inverse_deviation = (part.repeat(layout.channels // groups, axis=1) for part in (mean, inverse_deviation))
    scale = inverse_deviation * _numbers(weight)
    statistics = Statistics(mean, inverse_deviation, scale, np.broadcast_to(_numbers(bias), scale.shape))
    out = features.detach() if overwrite else torch.empty_like(features)
    affine = _affine_by_lane(statistics, layout, _arithmetic(features))
    run(loops.normalize, layout.rows, values, layout.size, layout.length, *affine, _flat(out))
    return out, statistics


def normalize_adjoint(
    grad: Tensor, features: Tensor, weight: Tensor, statistics: Statistics, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`normalize` with respect to ``features``, ``weight`` and ``bias``."""
    layout, values, dtype = _Layout.of(features), _flat(features), _arithmetic(features)
    order = torch.channels_last_3d if layout.last else torch.contiguous_format
    flat_grad = _flat(grad.to(features.dtype).contiguous(memory_format=order))
    affine = _affine_by_lane(statistics, layout, dtype)
    totals = np.empty((layout.rows, 2, layout.lanes))
    run(loops.gradient_sums, layout.rows, values, flat_grad, layout.size, layout.length, *affine, totals)
    by_bias, products = layout.by_channel(totals)
    by_weight = products * statistics.inverse_deviation
    count = features[0].numel() // groups

    def share(sums: Any) -> Any:
        """What each value of a group takes from the sum of the group's weighted gradients."""
        of_group = (sums * _numbers(weight)).reshape(layout.batch, groups, -1).sum(axis=2) / count
        return of_group.repeat(layout.channels // groups, axis=1) * statistics.inverse_deviation

    offsets = layout.by_lane(share(by_bias), dtype)
    factors = layout.by_lane(share(by_weight) * statistics.inverse_deviation, dtype)
    out = torch.empty_like(features)
    args = (values, flat_grad, layout.size, layout.length, *affine, offsets, factors, _flat(out))
    run(loops.gradient, layout.rows, *args)
    to_weight, to_bias = (torch.from_numpy(part.sum(axis=0)).to(weight.dtype) for part in (by_weight, by_bias))
    return out, to_weight, to_bias


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


def weight_gradient(values: Tensor, grad: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Gradient of a convolution with respect to its weight.

    Args:
        values: what was convolved, ``(B, C, X, Y, Z)``.
        grad: with respect to the result, ``(B, N, I, J, K)``.
        weight: ``(N, C, K, K, K)``.
        stride: of the windows, voxels.
        padding: zeros before and behind each axis, voxels.

    Returns:
        the shape of ``weight``.
    """
    by_weight: Tensor = working("weight_gradient", values.dtype)(values, grad, weight, stride, padding)
    return by_weight


def bias_gradient(grad: Tensor) -> Tensor:
    """Gradient of a convolution with respect to its bias, ``(N,)``, from that with respect to its result."""
    return torch.from_numpy(channel_sums(dense(grad))[0].sum(axis=0)).to(grad.dtype)


def write_sum_and_difference(first: Tensor, second: Tensor) -> None:
    """Writes the sum over ``first`` and the difference over ``second``, both dense and alike in layout and type."""
    values = _flat(first)
    run(loops.sum_and_difference, -(-len(values) // _LENGTH), values, _flat(second), _LENGTH)


def channels_are_last(features: Tensor) -> bool:
    """Whether channels lie innermost in memory."""
    return not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last_3d)


def dense(features: Tensor) -> Tensor:
    """The same values as they are where they are contiguous or have their channels innermost, else contiguous."""
    return features if channels_are_last(features) else features.contiguous()


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
        last, voxels = channels_are_last(features), features[0, 0].numel()
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


def _affine_by_lane(statistics: Statistics, layout: _Layout, dtype: Any) -> tuple[Any, ...]:
    """Means, scales and shifts as the loops take them."""
    return tuple(layout.by_lane(part, dtype) for part in (statistics.mean, statistics.scale, statistics.shift))


def _arithmetic(features: Tensor) -> Any:
    return np.float64 if features.dtype == torch.float64 else np.float32


def _numbers(parameter: Tensor) -> Any:
    return parameter.detach().double().numpy()


def _flat(features: Tensor) -> Any:
    """The values in the order in which they lie in memory; a bfloat16 as its bits."""
    features = features.detach()
    if features.dtype == torch.bfloat16:
        features = features.view(torch.uint16)
    if channels_are_last(features):
        features = features.movedim(1, -1)
    return features.view(-1).numpy()
