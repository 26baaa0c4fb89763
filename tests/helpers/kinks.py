"""Comparing gradients in float32 where a function has kinks: float64 decides, and places on a kink are left out.

At a kink (the zero of a ReLU or of a determinant, the border of a trilinear cell or of the volume, the threshold of a
mask) the gradients of both sides are right, and rounding chooses one. The rule: a place counts as at a kink where
float64 and float32 take different sides, or where float64 is closer to the kink than the two precisions are to each
other (or than a few roundings). Such places must be few and next to the kink. They are left out in both precisions, and
everything else is compared at the stated tolerance, so that no tolerance has to make room for them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.deform.backends.cpu import backend as cpu_backend
from sitreg_lumir.deform.backends.torch import backend as torch_backend
from sitreg_lumir.deform.backends.torch.backend import grid_points, interpolate
from sitreg_lumir.deform.jacobian import COLUMNS, determinant
from sitreg_lumir.network.head import ControlPointHead
from sitreg_lumir.network.layers import ConvBlock
from sitreg_lumir.network.sitreg import SITReg

MASK_THRESHOLD = 1 - 1e-3  # of an interpolated mask
_ROUNDINGS = 4 * torch.finfo(torch.float32).eps  # relative to the largest coordinate


def relative_l2(value: Tensor, expected: Tensor, where: Tensor | None = None) -> float:
    """Norm of the difference over norm of ``expected``, both where ``where`` holds."""
    difference, scale = value.double() - expected.double(), expected.double()
    if where is not None:
        difference, scale = difference * where, scale * where
    return float(difference.norm() / scale.norm())


@dataclass(frozen=True)
class LookUp:
    """Positions ``(B, 3, X, Y, Z)`` at which a volume of ``shape`` was interpolated, voxels."""

    points: Tensor
    shape: tuple[int, ...]

    def at_kink(self, second: Tensor | None = None) -> Tensor:
        """Where a position lies at the border of a cell or of the volume, bool ``(B, 1, X, Y, Z)``.

        Closer to it than to the position ``second`` that float32 found, or than a few roundings.
        """
        points = self.points.double()
        last = torch.tensor([size - 1.0 for size in self.shape], dtype=torch.float64)[:, None, None, None]
        reach = torch.full_like(points, _ROUNDINGS * max(self.shape))
        if second is not None:
            reach = reach + (points - second.double()).abs()
        inside = (points > -reach) & (points < last + reach) & (last > 0)
        return ((points - points.round()).abs().le(reach) & inside).any(dim=1, keepdim=True)


def composition_look_ups(disps: Sequence[Tensor]) -> list[LookUp]:
    """The look-ups of ``disps[0] o disps[1] o ...`` (the last one first), in the order they are made."""
    points = grid_points(disps[-1]) + disps[-1]
    look_ups = []
    for index in reversed(range(len(disps) - 1)):
        look_ups.append(LookUp(points, tuple(disps[index].shape[2:])))
        points = points + interpolate(disps[index], points)
    return look_ups


def warp_look_up(values: Tensor, disp: Tensor, factor: int) -> LookUp:
    """The look-up of features of a level with spacing ``factor`` through a full-resolution field."""
    level = grid_points(disp.new_empty(1, 1, *values.shape[2:]))
    full = (factor * (level + 0.5) - 0.5).expand(len(disp), *(-1,) * 4)
    return LookUp((full + interpolate(disp, full) + 0.5) / factor - 0.5, tuple(values.shape[2:]))


class LookUpGradients:
    """The look-ups of one backward pass in order, and a way to stop the gradients that enter them at some voxels.

    ``blocked``: one mask per adjoint operation, or None to record what is looked up.
    """

    _OPERATIONS = ("compose_adjoint", "invert_adjoint", "warp_adjoint")

    def __init__(self) -> None:
        self.look_ups: list[list[LookUp]] = []  # of each adjoint operation
        self.blocked: list[Tensor] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Stands between autograd and both backends within the block."""
        self._count = 0
        with pytest.MonkeyPatch.context() as patch:
            for backend in (torch_backend, cpu_backend):
                for name in self._OPERATIONS:
                    patch.setattr(backend, name, self._watched(name, getattr(backend, name)))
            yield

    def _watched(self, name: str, operation: Any) -> Any:
        def stopped(grad: Tensor, *args: Any) -> Any:
            if self.blocked is None:
                self.look_ups.append(self._look_ups_of(name, args))
            else:
                grad = grad.masked_fill(self.blocked[self._count], 0)
            self._count += 1
            return operation(grad, *args)

        return stopped

    @staticmethod
    def _look_ups_of(name: str, args: Any) -> list[LookUp]:
        if name == "compose_adjoint":
            return composition_look_ups(args[0])
        if name == "invert_adjoint":
            disp, inverse = args
            return [LookUp(grid_points(disp) + inverse, tuple(disp.shape[2:]))]
        values, disp, factor = args[:3]
        return [warp_look_up(values, disp, factor)]


class Activations:
    """What the ReLUs of a network give in one forward pass, and a way to stop gradients at chosen units.

    Reads what leaves each block and what enters each later convolution: it does not matter how normalisation and ReLU
    are computed. ``blocked`` is looked up in the backward pass: one mask per recorded tensor, or None.
    """

    def __init__(self, network: SITReg) -> None:
        self.values: list[Tensor] = []
        self.blocked: list[Tensor] | None = None
        self._handles = []
        for module in network.modules():
            entered = list(module.convolutions)[1:] if isinstance(module, ConvBlock) else []
            if isinstance(module, ControlPointHead):
                entered.append(module.final)
            self._handles += [module.register_forward_pre_hook(self._entering) for module in entered]
        self._handles += [block.register_forward_hook(self._leaving) for block in network.encoder.blocks]

    def _entering(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        self._record(inputs[0])

    def _leaving(self, _: Any, __: Any, output: Tensor) -> None:
        self._record(output)

    def _record(self, value: Tensor) -> None:
        index = len(self.values)
        self.values.append(value.detach().clone())
        value.register_hook(lambda grad: grad if self.blocked is None else grad.masked_fill(self.blocked[index], 0))

    def remove(self) -> None:
        """Ends the recording; gradients can still be stopped."""
        for handle in self._handles:
            handle.remove()


def mask_weights(mask: Tensor, points: Tensor) -> Tensor:
    """A 0/1 mask interpolated with zeros outside at ``points``, in float64: ``(B, 1, X, Y, Z)``."""
    size = torch.tensor(mask.shape[2:], dtype=torch.float64)
    padded = F.pad(mask.double(), (1,) * 6)  # one voxel of zeros, so that one rule of interpolation serves
    grid = ((points.double().movedim(1, -1) + 1) * 2 / (size + 1) - 1).flip(-1)
    return F.grid_sample(padded, grid, mode="bilinear", padding_mode="border", align_corners=True)


def folds_at_kink(disp: Tensor) -> Tensor:
    """Components of a field on which a determinant next to zero depends, bool, of the shape of ``disp``.

    Their part of the gradient of the folded volume hangs on the determinant's sign.
    """
    disp = disp.detach().double().requires_grad_()
    margin = _ROUNDINGS * max(1.0, float(disp.detach().abs().max())) ** 3
    near = disp.new_zeros(())
    for name in COLUMNS:
        value = determinant(disp, name)
        near = near + (value * (value.detach().abs() < margin)).sum()
    return torch.autograd.grad(near, disp)[0] != 0
