"""Points through continuous B-spline updates and their inverses, in plain torch: the readable truth."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sitreg_lumir.deform.bspline import Coefficients, Steps

_LARGEST_RESIDUAL = 0.995  # of that before: otherwise a Newton step is replaced by one of the fixed-point iteration
_POINTS_AT_ONCE = 1 << 16  # bounds what is looked up at a time to some 200 MB


def move_points(
    points: Tensor, steps: Steps, coefficients: Coefficients, jacobians: bool, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor | None, bool]:
    """See :meth:`~sitreg_lumir.deform.splines.SplineUpdates.move`; also returns whether all inversions converged."""
    updates = _by_update(coefficients.flat, coefficients.sizes)
    moved, derivatives, settled = [], [], True
    for part in points.split(_POINTS_AT_ONCE, dim=1):
        position = part
        total = torch.eye(3, dtype=part.dtype, device=part.device)[..., None].expand(3, 3, part.shape[1])
        for index, inverted in steps:
            update = updates[index], coefficients.factors[index], coefficients.shape
            if inverted:
                position, converged = _invert(position, *update, tolerance, max_iterations)
                settled = settled and converged
            disp, gradients = look_up(position, *update)
            if not inverted:
                position = position + disp
            if jacobians:
                matrix = gradients + torch.eye(3, dtype=part.dtype, device=part.device)[..., None]
                matrix = matrix.movedim(-1, 0)
                total = (torch.linalg.inv(matrix) if inverted else matrix) @ total.movedim(-1, 0)
                total = total.movedim(0, -1)
        total = total.where(~part.isnan().any(dim=0), torch.nan)
        position = position.where(~part.isnan().any(dim=0), torch.nan)
        moved.append(position)
        derivatives.append(total)
    return torch.cat(moved, dim=1), torch.cat(derivatives, dim=-1) if jacobians else None, settled


def look_up(position: Tensor, coefficients: Tensor, factor: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The displacement of one update at positions ``(3, N)``, and its derivative ``(3, 3, N)``, voxels.

    Positions outside the grid look at its border; the derivative of that clamp is 0.
    """
    (x, y, z), weights, derivatives = _locate(position, factor, shape)
    values = coefficients[x[:, None, None], y[None, :, None], z[None, None, :], :3].to(
        position.dtype
    )  # (4, 4, 4, N, 3)
    spell = "in,jn,kn,ijknc->cn"
    disp = torch.einsum(spell, weights[:, 0], weights[:, 1], weights[:, 2], values)
    by = (
        torch.einsum(spell, derivatives[:, 0], weights[:, 1], weights[:, 2], values),
        torch.einsum(spell, weights[:, 0], derivatives[:, 1], weights[:, 2], values),
        torch.einsum(spell, weights[:, 0], weights[:, 1], derivatives[:, 2], values),
    )
    return disp, torch.stack(by, dim=1)


def _locate(position: Tensor, factor: int, shape: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Of the four control points along each axis: indices ``(4, N)``, weights and their derivatives ``(4, 3, N)``."""
    last = torch.tensor([size - 1 for size in shape], dtype=position.dtype, device=position.device)[:, None]
    place = torch.minimum(position.nan_to_num(0.0).clamp(min=0), last)
    inside = ((position > 0) & (position <= last)).to(position.dtype)
    t = (place + 0.5) / factor + 1.5
    whole = t.floor()
    weights, derivatives = _weights(t - whole)  # (4, 3, N)
    derivatives = derivatives * inside / factor
    index = whole.long() - 1 + torch.arange(4, device=position.device)[:, None, None]
    return (index[:, 0], index[:, 1], index[:, 2]), weights, derivatives


def _weights(r: Tensor) -> tuple[Tensor, Tensor]:
    """Of the four control points around a place, ``r`` behind the second: the B-spline's weights and derivatives."""
    s = 1 - r
    weights = (s**3 / 6, (4 - 3 * r**2 * (1 + s)) / 6, (4 - 3 * s**2 * (1 + r)) / 6, r**3 / 6)
    derivatives = (-(s**2) / 2, r * (3 * r - 4) / 2, s * (4 - 3 * s) / 2, r**2 / 2)
    return torch.stack(weights), torch.stack(derivatives)


def _invert(
    wanted: Tensor,
    coefficients: Tensor,
    factor: int,
    shape: Sequence[int],
    tolerance: float,
    max_iterations: int,
    start: Tensor | None = None,
) -> tuple[Tensor, bool]:
    """Where an update brings to ``wanted``: Newton's method, and the fixed-point iteration where that goes astray."""
    position = kept = wanted if start is None else start
    before = torch.full_like(wanted[0], torch.inf)
    active = ~wanted.isnan().any(dim=0)
    for _ in range(max_iterations):
        if not active.any():
            return position, True
        disp, gradients = look_up(position, coefficients, factor, shape)
        rest = position + disp - wanted
        residual = rest.abs().amax(dim=0)
        astray = residual > _LARGEST_RESIDUAL * before
        matrix = (gradients + torch.eye(3, dtype=rest.dtype, device=rest.device)[..., None]).movedim(-1, 0)
        step = torch.linalg.solve(matrix, rest.T[..., None])[..., 0].T
        plain = wanted - look_up(kept, coefficients, factor, shape)[0] if astray.any() else position
        after = torch.where(astray, plain, position - step)
        kept = torch.where(active & ~astray, position, kept)
        before = torch.where(active, torch.where(astray, torch.inf, residual), before)
        position = torch.where(active, after, position)
        active = active & (astray | (step.abs().amax(dim=0) >= tolerance))
    return position, not bool(active.any())


def trace_points(
    points: Tensor, steps: Steps, coefficients: Coefficients, tolerance: float, max_iterations: int, path: Tensor
) -> tuple[Tensor, bool]:
    """Follows points ``(3, N)`` through continuous updates: their filled ``path``, and whether inversions converged.

    Args:
        points: float64, voxels.
        steps: in which order, and whether by their inverses.
        coefficients: of all updates.
        tolerance: of the inversions, voxels.
        max_iterations: upper limit of look-ups for one inversion.
        path: ``(S, 3, N)`` for ``S`` steps, of the coefficients' dtype, is filled with how far each step's end lies
            from the point. An inversion starts from what was there before, or where the step starts if that is NaN.
    """
    updates, settled = _by_update(coefficients.flat, coefficients.sizes), True
    for part in torch.arange(points.shape[1], device=points.device).split(_POINTS_AT_ONCE):
        begin = position = points[:, part]
        for step, (index, inverted) in enumerate(steps):
            update = updates[index], coefficients.factors[index], coefficients.shape
            if inverted:
                before = path[step][:, part]
                guess = torch.where(before.isnan(), position, begin + before)
                position, converged = _invert(position, *update, tolerance, max_iterations, guess)
                settled = settled and converged
            else:
                position = position + look_up(position, *update)[0]
            path[step][:, part] = (position - begin).to(path.dtype)
    return path, settled


def trace_points_adjoint(
    grad: Tensor, points: Tensor, steps: Steps, coefficients: Coefficients, path: Tensor, needed: Sequence[bool]
) -> Tensor:
    """Gradient of where points end with respect to the coefficients, 0 for updates that are not ``needed``.

    An inverse ``q`` of ``p`` solves ``q + u(q) = p``. With ``J`` the derivative of ``u`` at ``q``, the gradient
    ``g`` of ``q`` becomes ``lambda = (I + J)^-T g`` of ``p``, and ``-lambda`` of ``u`` at ``q``.

    Args:
        grad: ``(3, N)`` of where the points end.
        points: ``(3, N)`` float64, where they start, voxels.
        steps: in which order, and whether by their inverses.
        coefficients: of all updates.
        path: as :func:`trace_points` filled it.
        needed: of each update.
    """
    flat, sizes, factors, shape = coefficients
    updates, result = _by_update(flat, sizes), torch.zeros_like(flat)
    targets = _by_update(result, sizes)
    for part in torch.arange(points.shape[1], device=points.device).split(_POINTS_AT_ONCE):
        pulled = grad[:, part].to(points.dtype)
        for step, (index, inverted) in reversed(list(enumerate(steps))):
            looked = step if inverted else step - 1
            position = points[:, part] + path[looked][:, part] if looked >= 0 else points[:, part]
            matrix = look_up(position, updates[index], factors[index], shape)[1].movedim(-1, 0)
            matrix = matrix + torch.eye(3, dtype=points.dtype, device=points.device)
            by_update = pulled
            if inverted:
                pulled = torch.linalg.solve(matrix.mT, pulled.T[..., None])[..., 0].T
                by_update = -pulled
            else:
                pulled = (matrix.mT @ pulled.T[..., None])[..., 0].T
            if needed[index]:
                _add_where_looked(targets[index], by_update, position, factors[index], shape)
    return result


def _by_update(coefficients: Tensor, sizes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Views of the coefficients of each update, ``(X + 4, Y + 4, Z + 4, 4)``."""
    parts = coefficients.split([4 * x * y * z for x, y, z in sizes])
    return [part.view(*size, 4) for part, size in zip(parts, sizes, strict=True)]


def _add_where_looked(target: Tensor, values: Tensor, position: Tensor, factor: int, shape: Sequence[int]) -> None:
    """Adds ``values`` ``(3, N)`` to the control points around positions, in shares of their weights."""
    (x, y, z), weights, _ = _locate(position, factor, shape)
    shares = torch.einsum("in,jn,kn,cn->ijknc", weights[:, 0], weights[:, 1], weights[:, 2], values)
    index = (x[:, None, None] * target.shape[1] + y[None, :, None]) * target.shape[2] + z[None, None, :]
    added = torch.zeros(target[..., 0].numel(), 3, dtype=values.dtype, device=values.device)
    added.index_add_(0, index.flatten(), shares.flatten(0, 3))
    target[..., :3] += added.view(*target.shape[:3], 3).to(target.dtype)
