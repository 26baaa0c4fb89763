"""Look-ups of images, features and fields in compiled loops, and their gradients; any layout."""

import torch
from torch import Tensor

from sitreg_lumir.deform.backends.cpu import features, grids, lookups, scatter
from sitreg_lumir.deform.backends.cpu.arrays import array, empty, flat, rows, run_tiles, zeros
from sitreg_lumir.deform.backends.cpu.threads import run

_CHANNELS_PER_TASK = 8


def interpolate(values: Tensor, points: Tensor) -> Tensor:
    """``values`` at ``points``: ``(B, C, X, Y, Z)``, ``(B, 3, I, J, K)`` in voxels -> ``(B, C, I, J, K)``."""
    return look_up(values, points.expand(len(values), *(-1,) * 4), relative=False)


def interpolate_adjoint(
    grad: Tensor, values: Tensor, points: Tensor, need_values: bool = True, need_points: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`interpolate` with respect to ``values`` and to ``points`` (None where not needed)."""
    points = points.expand(len(values), *(-1,) * 4)
    return look_up_adjoint(grad, values, points, False, need_values, need_points)


def mask_at(mask: Tensor, points: Tensor, relative: bool) -> Tensor:
    """Where ``mask`` (bool), trilinear with zeros outside, is at least 1 - 1e-3 at ``points``; bool ``(B, 1, ...)``."""
    points = points.expand(len(mask), *(-1,) * 4)
    shape, grid = tuple(mask.shape[2:]), tuple(points.shape[2:])
    kept = torch.empty(len(mask), 1, *grid, dtype=torch.bool)
    args = (shape, flat(mask.view(torch.int8)), flat(points), grid, relative, flat(kept))
    run(lookups.inside_mask, rows(points), *args)
    return kept


def warp(values: Tensor, disp: Tensor, factor: int) -> Tensor:
    """``values`` of the level with spacing ``factor``, pulled through the full-resolution field ``disp``."""
    if factor == 1:
        return look_up(values, disp, relative=True)
    return look_up(values, _level_points(disp, factor, values), relative=False)


def warp_adjoint(
    grad: Tensor, values: Tensor, disp: Tensor, factor: int, need_values: bool, need_disp: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`warp` with respect to ``values`` and ``disp`` (None where not needed)."""
    if factor == 1:
        return look_up_adjoint(grad, values, disp, True, need_values, need_disp)
    points = _level_points(disp, factor, values)
    grad_values, grad_points = look_up_adjoint(grad, values, points, False, need_values, need_disp)
    if grad_points is None:
        return grad_values, None
    grad_disp = zeros(disp)
    tasks = len(disp) * values.shape[2]
    run(grids.level_points_adjoint, tasks, array(grad_points), factor, array(grad_disp))
    return grad_values, grad_disp


def _level_points(disp: Tensor, factor: int, values: Tensor) -> Tensor:
    points = disp.new_empty(len(disp), 3, *values.shape[2:])
    run(grids.level_points, len(disp) * values.shape[2], array(disp), factor, array(points))
    return points


def look_up(values: Tensor, points: Tensor, relative: bool) -> Tensor:
    """``values`` at ``points``, which count from their own grid index if they are ``relative``; in the same layout."""
    channels, shape, grid = values.shape[1], tuple(values.shape[2:]), tuple(points.shape[2:])
    last = _channels_are_last(values)
    out = _new_values(values, grid, last)
    args = (shape, flat(values, last), channels, flat(points), grid, relative, flat(out, last))
    run((features if last else lookups).lookup, rows(points), *args)
    return out


def look_up_adjoint(
    grad: Tensor, values: Tensor, points: Tensor, relative: bool, need_values: bool, need_points: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`look_up` with respect to ``values`` and to ``points``, None where not needed."""
    channels, shape, grid = values.shape[1], tuple(values.shape[2:]), tuple(points.shape[2:])
    last = _channels_are_last(values)
    flat_grad, flat_points = flat(grad, last), flat(points)
    grad_values = grad_points = None
    if need_values:
        grad_values = _new_values(values, shape, last).zero_()
        target = flat(grad_values, last)
        rest = (flat_points, grid, relative, flat_grad, target)
        if last:
            run_tiles(features.scatter_lookup, [flat_points], points.shape, shape, relative, 1, shape, channels, *rest)
        else:
            parts = -(-channels // _CHANNELS_PER_TASK)
            run_tiles(
                scatter.scatter_lookup, [flat_points], points.shape, shape, relative, parts,
                shape, channels, parts, *rest,
            )  # fmt: skip
    if need_points:
        grad_points = empty(points)
        run(
            (features if last else lookups).lookup_gradient, rows(points),
            shape, flat(values, last), channels, flat_points, grid, relative, flat_grad, flat(grad_points),
        )  # fmt: skip
    return grad_values, grad_points


def _channels_are_last(values: Tensor) -> bool:
    """Whether a feature map has its channels innermost, so that it need not be copied to be read that way."""
    return not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last_3d)


def _new_values(like: Tensor, shape: tuple[int, ...], last: bool) -> Tensor:
    """An empty feature map on a grid of ``shape``."""
    layout = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty((*like.shape[:2], *shape), dtype=like.dtype, memory_format=layout)
