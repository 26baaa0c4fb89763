"""One stage's update of the four maps of the symmetric state, with a gradient that keeps only what went in."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sitreg_lumir.deform.ops import backend_of, compose, copies_shared, invert, upsample_control_points


class Maps(NamedTuple):
    """Maps from the middle to both images and back, ``(B, 3, X, Y, Z)``, voxels; None before the first update.

    ``left`` belongs to the moving image, ``right`` to the fixed one.
    """

    left_fwd: Tensor | None = None
    right_fwd: Tensor | None = None
    left_inv: Tensor | None = None
    right_inv: Tensor | None = None


_FIRST_CHAINS = (("a", "b_inv"), ("b", "a_inv"))  # what left_fwd and right_fwd are composed of, the last applied first
_CHAINS = (
    ("left_fwd", "a", "b_inv"),
    ("right_fwd", "b", "a_inv"),
    ("b", "a_inv", "left_inv"),
    ("a", "b_inv", "right_inv"),
)


def update_maps(
    maps: Maps, control_points: Tensor, control_points_reverse: Tensor, factor: int, shape: Sequence[int],
    tolerance: float, forward_only: bool = False, last: bool = False,
) -> Maps:  # fmt: skip
    """Composes one stage's two updates into the maps.

    Args:
        maps: what is known so far.
        control_points: of the update of the moving side, ``(B, 3, ...)``, voxels of the level.
        control_points_reverse: of the fixed side, the same shape.
        factor: spacing of the level in full-resolution voxels.
        shape: ``(X, Y, Z)`` of the full-resolution grid.
        tolerance: of the inversions, voxels.
        forward_only: ``left_inv`` is not needed and stays None; no gradient.
        last: no stage follows; with ``forward_only``, ``right_fwd`` is then left as it is.

    Source: Honkamaa & Marttinen, SITReg, Machine Learning for Biomedical Imaging 2024.
    """
    if torch.is_grad_enabled() and not forward_only:
        found = _Update.apply(control_points, control_points_reverse, factor, tuple(shape), tolerance, *maps)
        return Maps(*found) if len(found) == 4 else Maps(found[0], found[1], found[1], found[0])
    with copies_shared(control_points):
        return _updated(maps, control_points, control_points_reverse, factor, shape, tolerance, forward_only, last)


def _updated(
    maps: Maps, control_points: Tensor, control_points_reverse: Tensor, factor: int, shape: Sequence[int],
    tolerance: float, forward_only: bool, last: bool,
) -> Maps:  # fmt: skip
    """:func:`update_maps` without gradient."""
    a = upsample_control_points(control_points, factor, shape)
    b = upsample_control_points(control_points_reverse, factor, shape)
    b_inv = invert(b, tolerance)
    if maps.left_fwd is None or maps.right_inv is None:
        left_fwd = right_inv = compose(a, b_inv)
    else:
        left_fwd, right_inv = compose(maps.left_fwd, a, b_inv), compose(a, b_inv, maps.right_inv)
    if last and forward_only:
        return Maps(left_fwd, maps.right_fwd, None, right_inv)
    del b_inv  # fields of full resolution: each is let go as soon as it can be
    a_inv = invert(a, tolerance)
    del a
    if maps.right_fwd is None:
        right_fwd = left_inv = compose(b, a_inv)
        return Maps(left_fwd, right_fwd, None if forward_only else left_inv, right_inv)
    right_fwd = compose(maps.right_fwd, b, a_inv)
    if forward_only or maps.left_inv is None:
        return Maps(left_fwd, right_fwd, None, right_inv)
    return Maps(left_fwd, right_fwd, compose(b, a_inv, maps.left_inv), right_inv)


class _Update(torch.autograd.Function):
    """:func:`update_maps`; it keeps the inverses of the updates, and upsamples these again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, control_points: Tensor, control_points_reverse: Tensor, factor: int, shape: tuple[int, ...],
        tolerance: float, *maps: Tensor | None,
    ) -> Any:  # fmt: skip
        with copies_shared(control_points):
            fields = _upsampled(control_points, control_points_reverse, factor, shape)
            a_inv, b_inv = (invert(fields[name], tolerance) for name in ("a", "b"))
            fields |= {"a_inv": a_inv, "b_inv": b_inv, **dict(zip(Maps._fields, maps, strict=True))}
            updated = tuple(compose(*(fields[name] for name in names)) for names in _chains(maps))
        ctx.save_for_backward(control_points, control_points_reverse, a_inv, b_inv, *maps)
        ctx.factor, ctx.shape = factor, shape
        return updated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        control_points, control_points_reverse, a_inv, b_inv, *maps = ctx.saved_tensors
        fields = _upsampled(control_points, control_points_reverse, ctx.factor, ctx.shape)
        fields |= {"a_inv": a_inv, "b_inv": b_inv, **dict(zip(Maps._fields, maps, strict=True))}
        needed = {"a", "b", "a_inv", "b_inv"}
        needed |= {name for name, need in zip(Maps._fields, ctx.needs_input_grad[-len(maps) :], strict=True) if need}
        with copies_shared(a_inv):
            totals = _gradients(fields, needed, _chains(maps), grads)
            through = []
            for name in ("a", "b"):
                inverse, backend = f"{name}_inv", backend_of(a_inv)
                total = totals[name].add_(backend.invert_adjoint(totals.pop(inverse), fields[name], fields[inverse]))
                through.append(backend.upsample_control_points_adjoint(total, ctx.factor))
        return (*through, None, None, None, *(totals.get(name) for name in Maps._fields))


def _gradients(
    fields: dict[str, Any], needed: set[str], chains: Sequence[Sequence[str]], grads: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Gradients of the needed fields, from those of the compositions of the chains."""
    totals: dict[str, Tensor] = {}
    for names, grad in zip(chains, grads, strict=True):
        parts = backend_of(grad).compose_adjoint(
            grad, [fields[name] for name in names], [name in needed for name in names]
        )
        for name, part in zip(names, parts, strict=True):
            if part is None:
                continue
            if name in totals:
                totals[name].add_(part)  # fresh from the backend, so nobody else sees it
            else:
                totals[name] = part
    return totals


def _upsampled(
    control_points: Tensor, control_points_reverse: Tensor, factor: int, shape: Sequence[int]
) -> dict[str, Any]:
    return {
        "a": upsample_control_points(control_points, factor, shape),
        "b": upsample_control_points(control_points_reverse, factor, shape),
    }


def _chains(maps: Sequence[Tensor | None]) -> tuple[tuple[str, ...], ...]:
    return _FIRST_CHAINS if maps[0] is None else _CHAINS
