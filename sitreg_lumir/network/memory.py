"""What makes a network run in little memory and time: the arithmetic of :class:`~sitreg_lumir.network.sitreg.SITReg`.

* Features are let go level by level, and written over where no gradient is asked for: sums and differences in place.
* An ensemble holds no features of full resolution, the largest by far: it computes them again for the last stage.
* With ``recompute``, the backward pass computes activations again instead of finding them stored.
* Large volumes go through the encoder's finest level, and through a head, one by one; small ones in one batch, which
  PyTorch on a CPU convolves several times faster.
* A head's first convolution is linear, so it is applied to sum and difference once and not to both orders.

The first three change no bit, the others no more than the rounding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sitreg_lumir.deform import autograd
from sitreg_lumir.deform.backends import compiled_on_cpu
from sitreg_lumir.deform.backends.cpu import layers as cpu_layers
from sitreg_lumir.deform.ops import warp
from sitreg_lumir.deform.update import Maps
from sitreg_lumir.network.encoder import Encoder
from sitreg_lumir.network.head import ControlPointHead
from sitreg_lumir.network.layers import Convolution, convolve, fastest_layout

SLOW_ALONE = 20_480  # up to so many values in a plane, PyTorch on a CPU has fast convolutions for batches only


class Economical:
    """A network's features and control points, as ``SITReg`` gives them, in less memory.

    One instance serves one pair of images.

    Args:
        encoder: of the network.
        heads: of the network, finest level first.
        hold_finest: hold the features of full resolution instead of computing them again.
        recompute: with gradients, keep no activation of the encoder or a head, and compute them again in the backward
            pass: a fraction of the memory for a little more time.
        view: what the network sees of an image, made when it is needed; None for the image itself.
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: nn.ModuleList,
        hold_finest: bool,
        recompute: bool,
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.encoder = encoder
        self.heads = heads
        self.hold_finest = hold_finest
        self.recompute = recompute and torch.is_grad_enabled()
        self.view = view if view is not None else _unchanged
        self.images: tuple[Tensor, ...] = ()  # whose finest features are to be computed again

    def features(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features of both images, finest level first, for :meth:`control_points` to take out of the lists."""
        encode = partial(recomputed, self._pyramids) if self.recompute else self._pyramids
        pyramids: tuple[list[Tensor], list[Tensor]] = encode(moving, fixed)
        if not self.hold_finest:
            self.images = moving, fixed
            pyramids[0][0] = pyramids[1][0] = moving.new_empty(0)
        return pyramids

    def control_points(
        self, level: int, features: tuple[list[Tensor], list[Tensor]], maps: Maps
    ) -> tuple[Tensor, Tensor]:
        """The update at ``level``; the features of that level are taken out of the lists, coarsest level first."""
        if level == 0 and not self.hold_finest:
            for own, image in zip(features, self.images, strict=True):
                own[0] = self.encoder.blocks[0](fastest_layout(self.encoder.projection(self.view(image))))
        head: Any = self.heads[level]
        compute = partial(recomputed, control_points_of) if self.recompute else control_points_of
        update: tuple[Tensor, Tensor] = compute(head, 2**level, features[0].pop(), features[1].pop(), maps)
        return update

    def _pyramids(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return pyramids_of(self.encoder, self.view(moving), self.view(fixed))


def _unchanged(image: Tensor) -> Tensor:
    return image


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Calls the function, and again in the backward pass instead of keeping what it computed on the way."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def slow_alone(volume: Tensor, channels: int) -> bool:
    """Whether single volumes ``(1, ..., X, Y, Z)`` of so many channels are convolved several times slower than two."""
    x, y = volume.shape[2:4]
    return volume.device.type == "cpu" and len(volume) == 1 and channels * x * y <= SLOW_ALONE


def pyramids_of(encoder: Encoder, first: Tensor, second: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The encoder's features of two images: full resolution one by one if they are large, all else in one batch."""
    pyramids: tuple[list[Tensor], list[Tensor]] = [], []
    batches = [first, second]
    if slow_alone(first, encoder.projection.out_channels):
        batches = [torch.cat(batches)]
    finest, skips = [], []
    for images in batches:
        skip = fastest_layout(encoder.projection(images))
        features = encoder.blocks[0](skip)
        finest.extend(features.chunk(2 // len(batches)))
        if encoder.downsamplings:
            skips.append(encoder.downsamplings[0](features, skip))
        del skip
    for own, features in zip(pyramids, finest, strict=True):
        own.append(features)
    if skips:  # from here on always in one batch: volumes are small
        skip = torch.cat(skips)
        for level, block in enumerate(encoder.blocks[1:], start=1):
            features = block(skip)
            for own, half in zip(pyramids, features.chunk(2), strict=True):
                own.append(half)
            if level < len(encoder.downsamplings):
                skip = encoder.downsamplings[level](features, skip)
    return pyramids


def control_points_of(
    head: ControlPointHead, factor: int, moving: Tensor, fixed: Tensor, maps: Maps
) -> tuple[Tensor, Tensor]:
    """The head's control points from features of a level with spacing ``factor``, which may be written over."""
    if maps.left_fwd is not None and maps.right_fwd is not None:
        moving = warp(moving, maps.left_fwd, factor)
        fixed = warp(fixed, maps.right_fwd, factor)
    parts = list(sum_and_difference(moving, fixed))
    del moving, fixed
    return from_sum_and_difference(head, parts)


def from_sum_and_difference(head: ControlPointHead, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The head's control points from ``[first + second, first - second]``, taken out of the list when they are used.

    The first convolution is linear and sees the difference beside the sum: its two halves give both orders.
    """
    convolution = head.block.convolutions[0]
    assert isinstance(convolution, Convolution)
    if slow_alone(parts[0], parts[0].shape[1]):
        return head.both_orders(*parts)
    of_difference, of_sum = convolution.weight.chunk(2, dim=1)
    odd = convolve(fastest_layout(parts.pop()), of_difference, padding=1)
    even = convolve(fastest_layout(parts.pop()), of_sum, convolution.bias, padding=1)
    if torch.is_grad_enabled():
        orders: Tensor = autograd.SumAndDifference.apply(even, odd)
        del even, odd
        raw, raw_reverse = head.final(head.block.after_first(orders)).chunk(2)
    else:  # one order after the other takes half the memory
        waiting = list(reversed(sum_and_difference(even, odd)))
        del even, odd
        raw, raw_reverse = (head.final(head.block.after_first(waiting.pop())) for _ in range(2))
    return head.bounded(raw), head.bounded(raw_reverse)


def sum_and_difference(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """``first + second`` and ``first - second``; where no gradient is asked for, both may be overwritten.

    Args:
        first: ``(B, C, X, Y, Z)``.
        second: of the same shape and type.
    """
    if torch.is_grad_enabled():
        return first + second, first - second
    alike = first.stride() == second.stride() and first.dtype == second.dtype
    dense = first.is_contiguous() or cpu_layers.channels_are_last(first)
    if not (alike and dense and compiled_on_cpu(first)):
        difference = first - second
        return first.add_(second), difference
    cpu_layers.write_sum_and_difference(first, second)
    return first, second
