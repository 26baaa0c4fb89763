"""One stage's update of the four maps of the symmetric state, with a gradient that keeps only what went in."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sitreg_lumir.deform import autograd
from sitreg_lumir.deform.backends import backend_of
from sitreg_lumir.deform.ops import HALF, check_control_points, compose, invert, upsample_control_points

_MAX_ITERATIONS = 50  # of an inversion


class Maps(NamedTuple):
    """Maps from the middle to both images and back, ``(B, 3, X, Y, Z)``, voxels; None before the first update.

    ``left`` belongs to the moving image, ``right`` to the fixed one.
    """

    left_fwd: Tensor | None = None
    right_fwd: Tensor | None = None
    left_inv: Tensor | None = None
    right_inv: Tensor | None = None


def update_maps(
    maps: Maps,
    control_points: Tensor,
    control_points_reverse: Tensor,
    factor: int,
    shape: Sequence[int],
    tolerance: float,
    forward_only: bool = False,
    last: bool = False,
) -> Maps:
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
    both = (control_points, control_points_reverse)
    for points in both:
        check_control_points(points, factor, shape)
    points, reverse = (part.float() if part.dtype in HALF else part for part in both)
    with torch.autocast(points.device.type, enabled=False):
        if torch.is_grad_enabled() and not forward_only:
            updated = autograd.Update.apply(points, reverse, factor, tuple(shape), tolerance, _MAX_ITERATIONS, *maps)
            return Maps(*updated) if len(updated) == 4 else Maps(updated[0], updated[1], updated[1], updated[0])
        with backend_of(points).copies_shared():
            return _updated(maps, points, reverse, factor, shape, tolerance, forward_only, last)


def _updated(
    maps: Maps,
    control_points: Tensor,
    control_points_reverse: Tensor,
    factor: int,
    shape: Sequence[int],
    tolerance: float,
    forward_only: bool,
    last: bool,
) -> Maps:
    """:func:`update_maps` without gradient."""
    a = upsample_control_points(control_points, factor, shape)
    b = upsample_control_points(control_points_reverse, factor, shape)
    b_inv = invert(b, tolerance, _MAX_ITERATIONS)
    if maps.left_fwd is None or maps.right_inv is None:
        left_fwd = right_inv = compose(a, b_inv)
    else:
        left_fwd, right_inv = compose(maps.left_fwd, a, b_inv), compose(a, b_inv, maps.right_inv)
    if last and forward_only:
        return Maps(left_fwd, maps.right_fwd, None, right_inv)
    del b_inv  # fields of full resolution: each is let go as soon as it can be
    a_inv = invert(a, tolerance, _MAX_ITERATIONS)
    del a
    if maps.right_fwd is None:
        right_fwd = left_inv = compose(b, a_inv)
        return Maps(left_fwd, right_fwd, None if forward_only else left_inv, right_inv)
    right_fwd = compose(maps.right_fwd, b, a_inv)
    if forward_only or maps.left_inv is None:
        return Maps(left_fwd, right_fwd, None, right_inv)
    return Maps(left_fwd, right_fwd, compose(b, a_inv, maps.left_inv), right_inv)
