"""Local volume change of a field, and the volume where it folds.

Fields are ``(B, 3, X, Y, Z)`` in voxels and stand for the map ``x + disp(x)``.
"""

from itertools import product

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Column = tuple[tuple[int, int, int], int]  # (step to a neighbour in voxels, sign of the difference)


def _columns() -> dict[str, tuple[Column, Column, Column]]:
    """The three one-sided differences of each of the ten determinants that fill a voxel's neighbourhood."""
    axes = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    columns = {}
    for signs in product((1, -1), repeat=3):
        name = "".join("p" if sign > 0 else "m" for sign in signs)
        steps = [tuple(sign * unit for unit in axis) for sign, axis in zip(signs, axes, strict=True)]
        columns[name] = tuple(zip(steps, signs, strict=True))
    columns["star_1"] = (((-1, -1, 0), 1), ((-1, 0, -1), 1), ((0, -1, -1), 1))
    columns["star_2"] = (((1, 1, 0), 1), ((0, 1, 1), 1), ((1, 0, 1), 1))
    return columns  # type: ignore[return-value]


COLUMNS = _columns()  # "ppp" .. "mmm" (forward or backward difference along each axis), "star_1", "star_2"


def jacobian_determinant(disp: Tensor) -> Tensor:
    """Local volume change of the map ``x + disp(x)``, by central differences.

    Positive values do not prove that nothing folds; :func:`non_diffeomorphic_volume` tests that.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels, each axis at least 3 long.

    Returns:
        ``(B, X-2, Y-2, Z-2)``, no unit; the outermost voxels have no central difference.

    Raises:
        ValueError: ``disp`` has another form.

    Source: Liu et al., On finite difference Jacobian computation, IJCV 2024.
    """
    _check(disp)
    columns = []
    for axis in range(3):
        step = [int(axis == moved_axis) for moved_axis in range(3)]
        gradient = (neighbour(disp, step) - neighbour(disp, [-unit for unit in step])) / 2
        columns.append(_add(gradient, step))
    return triple_product(*columns)


def determinant(disp: Tensor, name: str) -> Tensor:
    """One of the ten finite-difference determinants that together decide whether a voxel folds.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels, each axis at least 3 long.
        name: ``p`` (forward) or ``m`` (backward difference) for each axis, such as ``"pmp"``, or ``"star_1"``,
            ``"star_2"``: the tetrahedra between diagonal neighbours.

    Returns:
        ``(B, X-2, Y-2, Z-2)``, no unit: 1 for the identity, 2 for the two stars.

    Raises:
        ValueError: ``disp`` has another form, or there is no such determinant.

    Source: Liu et al., On finite difference Jacobian computation, IJCV 2024.
    """
    _check(disp)
    if name not in COLUMNS:
        raise ValueError(f"no determinant {name!r}; there are {', '.join(COLUMNS)}")
    return _determinant(disp, name)


def non_diffeomorphic_volume(disp: Tensor) -> Tensor:
    """Volume that the map ``x + disp(x)`` folds around each inner voxel; 0 exactly where nothing folds.

    The ten determinants are taken one after the other; with gradients each is computed again in the backward
    pass, so that only ``disp`` is kept.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels, each axis at least 3 long.

    Returns:
        ``(B, 1, X-2, Y-2, Z-2)``, voxels^3, never negative.

    Raises:
        ValueError: ``disp`` has another form.

    Source: Liu et al., On finite difference Jacobian computation, IJCV 2024.
    """
    _check(disp)
    keep = torch.is_grad_enabled() and disp.requires_grad
    volume = disp.new_zeros(())
    for name in COLUMNS:
        if keep:
            folded = checkpoint(_folded, disp, name, use_reentrant=False, preserve_rng_state=False)
        else:
            folded = _folded(disp, name)
        volume = volume + folded
    return volume.unsqueeze(1) / 12


def _folded(disp: Tensor, name: str) -> Tensor:
    return -_determinant(disp, name).clamp(max=0)


def _determinant(disp: Tensor, name: str) -> Tensor:
    return triple_product(*gradients(disp, name))


def gradients(disp: Tensor, name: str) -> list[list[Tensor]]:
    """The three columns of a determinant, each a list of components ``(B, X-2, Y-2, Z-2)``, no unit.

    Differences of ``disp`` plus the step are more exact in float32 than differences of positions.
    """
    centre = neighbour(disp, (0, 0, 0))
    columns = []
    for step, sign in COLUMNS[name]:
        difference = neighbour(disp, step) - centre
        columns.append(_add(difference if sign > 0 else -difference, [sign * unit for unit in step]))
    return columns


def neighbour(disp: Tensor, step: tuple[int, int, int] | list[int]) -> Tensor:
    """``disp(x + step)`` at the inner voxels, a view."""
    for axis, offset in enumerate(step, start=2):
        disp = disp.narrow(axis, 1 + offset, disp.shape[axis] - 2)
    return disp


def _add(gradient: Tensor, step: list[int]) -> list[Tensor]:
    """Gradient of the map from the gradient of its displacement, by component; ``gradient`` is ``(B, 3, X, Y, Z)``."""
    return [gradient[:, axis] + unit if unit else gradient[:, axis] for axis, unit in enumerate(step)]


def triple_product(first: list[Tensor], second: list[Tensor], third: list[Tensor]) -> Tensor:
    """Determinant of the matrix with these columns, each a list of three components."""
    normal = cross_product(second, third)
    return first[0] * normal[0] + first[1] * normal[1] + first[2] * normal[2]


def cross_product(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Derivative of :func:`triple_product` by the column before these two, by components."""
    pairs = ((1, 2), (2, 0), (0, 1))
    return [first[i] * second[k] - first[k] * second[i] for i, k in pairs]


def _check(disp: Tensor) -> None:
    if disp.ndim != 5 or disp.shape[1] != 3 or min(disp.shape[2:]) < 3:
        raise ValueError(f"disp must be (B, 3, X, Y, Z) with axes of 3 or more, got {tuple(disp.shape)}")
