"""A pair's map as a function: cubic B-spline updates and their inverses, evaluated at any point, nothing sampled.

With ``w_k = a_k o b_k^-1``, coarsest update first, the map of the fixed grid into the moving image is
``w_1 o w_2 o ... o w_L o w_L o ... o w_1``, and its inverse is the same with all ``a`` and ``b`` exchanged. Within the
control point bound every ``x + a_k(x)`` is a contraction's sum with the identity, so its inverse exists, is unique, and
iterations converge to it. Network and training sample each product on their grid instead
(:mod:`~sitreg_lumir.deform.state`): faster, and inverse to each other up to interpolation only.

Source: Honkamaa & Marttinen, SITReg, Machine Learning for Biomedical Imaging 2024.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.deform.bspline import Coefficients, Steps, control_point_bound

ROLES = ("moving", "fixed")  # of the scans that control points belong to, in their order
BORDER = 2  # control points that repeat on each side of a level's grid
TOLERANCE = 1e-3  # voxels
_LARGEST_INTEGER = 2**15 - 1
MOST_LOOK_UPS = 2000  # for one inversion: contractions at the bound halve the distance in 70 at the latest


class NotInvertedError(ArithmeticError):
    """An inversion did not converge: control points lie beyond their bound, or are not finite."""


class Moved(NamedTuple):
    """Points ``(3, N)``, voxels, and the derivative ``(3, 3, N)`` of the map there, or None where not asked for."""

    points: Tensor
    jacobians: Tensor | None


@dataclass(frozen=True, eq=False)
class SplineUpdates:
    """All updates of a pair, coarsest first, on one full-resolution grid.

    Args:
        updates: of each stage the control points of the moving and of the fixed side, ``(3, ...)`` each, voxels of the
            level; those of stage ``k`` of ``L`` have the spacing ``2^(L - 1 - k)``.
        shape: ``(X, Y, Z)`` of the full-resolution grid. Beyond it, the displacement at its border holds.

    Raises:
        ValueError: shapes do not belong together, or values are not finite.
    """

    updates: Sequence[tuple[Tensor, Tensor]]
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if not self.updates or len(self.shape) != 3:
            raise ValueError(f"updates must not be empty and shape (X, Y, Z), got {len(self.updates)}, {self.shape}")
        for factor, pair in zip(self.factors, self.updates, strict=True):
            expected = (3, *(ceil(size / factor) for size in self.shape))
            for points in pair:
                if tuple(points.shape) != expected:
                    raise ValueError(f"control points of factor {factor} must be {expected}, got {tuple(points.shape)}")
                if not bool(torch.isfinite(points).all()):
                    raise ValueError("control points hold NaN or infinite values")

    @classmethod
    def rounded(cls, updates: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, int, int]) -> "SplineUpdates":
        """The updates of one pair as files keep them: multiples of 1/32767 of the bound, some 1e-5 voxel of a level.

        Args:
            updates: ``(1, 3, ...)`` each, on any device, within their bound; else as in the class.
            shape: ``(X, Y, Z)`` of the full-resolution grid.
        """
        exact = cls([(first[0].cpu(), second[0].cpu()) for first, second in updates], shape)
        return cls.of_integers(exact.integers(), len(updates), shape)

    @classmethod
    def of_integers(cls, integers: Mapping[str, Tensor], stages: int, shape: tuple[int, int, int]) -> "SplineUpdates":
        """The updates of so many stages that :meth:`integers` gave, or files hold; other names do not matter."""
        steps = [quantum(2**level) for level in reversed(range(stages))]
        updates = [
            tuple(from_integers(integers[f"{role}_{stage}"], step) for role in ROLES)
            for stage, step in enumerate(steps)
        ]
        return cls([(moving, fixed) for moving, fixed in updates], shape)

    def integers(self) -> dict[str, Tensor]:
        """Control points as files keep them: int16 multiples of :func:`quantum`, ``moving_0``, ``fixed_0``, ...

        Raises:
            ValueError: they lie beyond the bound.
        """
        return {
            f"{role}_{stage}": to_integers(points, quantum(factor))
            for stage, (factor, pair) in enumerate(zip(self.factors, self.updates, strict=True))
            for role, points in zip(ROLES, pair, strict=True)
        }

    @property
    def factors(self) -> tuple[int, ...]:
        """Spacing of each stage's control points, full-resolution voxels."""
        return tuple(2**level for level in reversed(range(len(self.updates))))

    def move(
        self,
        points: Tensor,
        *,
        inverse: bool = False,
        jacobians: bool = False,
        tolerance: float = TOLERANCE,
    ) -> Moved:
        """Moves points by the map of the fixed grid into the moving image, or by its inverse.

        Args:
            points: ``(3, N)`` float64, voxels of the full-resolution grid; NaN stays NaN.
            inverse: move points of the moving image into the fixed one.
            jacobians: also compute the map's derivative.
            tolerance: a Newton step below it ends an inversion, voxels. What is left after it is far smaller.

        Raises:
            NotInvertedError: an inversion did not converge.
            ValueError: ``points`` has another shape.
        """
        from sitreg_lumir.deform.backends import backend_of

        if points.ndim != 2 or len(points) != 3:
            raise ValueError(f"points must be (3, N), got {tuple(points.shape)}")
        backend = backend_of(self.coefficients.flat)
        moved, derivatives, settled = backend.move_points(
            points.double(), self.steps(inverse), self.coefficients, jacobians, tolerance, MOST_LOOK_UPS
        )
        if not settled:
            raise NotInvertedError(
                f"an inverse did not converge to {tolerance:g} voxel; control points lie beyond their bound"
            )
        return Moved(moved, derivatives)

    def steps(self, inverse: bool) -> Steps:
        """Which coefficients are applied in which order, and whether it is their inverse."""
        return steps_of(len(self.updates), inverse)

    @cached_property
    def coefficients(self) -> Coefficients:
        """The control points as backends take them."""
        return coefficients_of([(first.float(), second.float()) for first, second in self.updates], self.shape)

    def sample(self, *, inverse: bool = False, planes: int = 16) -> Tensor:
        """The map on its own full-resolution grid as a field ``(3, X, Y, Z)`` float32, voxels."""
        disp = torch.empty(3, *self.shape)
        y, z = (torch.arange(size, dtype=torch.float64) for size in self.shape[1:])
        for start in range(0, self.shape[0], planes):
            x = torch.arange(start, min(start + planes, self.shape[0]), dtype=torch.float64)
            points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"))
            moved = self.move(points.flatten(1), inverse=inverse).points
            disp[:, start : start + planes] = (moved.view_as(points) - points).float()
        return disp


def steps_of(stages: int, inverse: bool) -> Steps:
    """Which coefficients of so many stages are applied in which order, and whether it is their inverse."""
    first, second = (1, 0) if not inverse else (0, 1)
    order = (*range(stages), *reversed(range(stages)))
    return [step for k in order for step in ((2 * k + first, True), (2 * k + second, False))]


def coefficients_of(updates: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int]) -> Coefficients:
    """Control points of all stages down to level 0 as backends take them; gradients go through it.

    Args:
        updates: ``(3, ...)`` each, voxels of their level.
        shape: ``(X, Y, Z)`` of the full-resolution grid.
    """
    parts, factors = [], []
    for level, pair in zip(reversed(range(len(updates))), updates, strict=True):
        for points in pair:
            padded = F.pad(points[None] * 2**level, [BORDER] * 6, mode="replicate")[0]
            parts.append(F.pad(padded.movedim(0, -1), (0, 1)))
            factors.append(2**level)
    sizes = [(part.shape[0], part.shape[1], part.shape[2]) for part in parts]
    return Coefficients(torch.cat([part.flatten() for part in parts]), sizes, factors, shape)


class FollowedPoints:
    """Where the map brings points that stay the same, while the control points of its finest stages change.

    Each call starts inversions from the last one's results. Gradients are those of the exact map: an inversion's is
    that of the equation which it solves. No other call may come between a call and its backward pass.

    Args:
        points: ``(3, N)`` float64, voxels of the full-resolution grid.
        updates: control points of all stages, ``(3, ...)`` each, coarsest first.
        kept: how many of the coarsest stages stay as they are.
        shape: ``(X, Y, Z)`` of the full-resolution grid.
        inverse: follow points of the moving image into the fixed one.
        tolerance: a Newton step below it ends an inversion, voxels.
    """

    def __init__(
        self,
        points: Tensor,
        updates: Sequence[tuple[Tensor, Tensor]],
        kept: int,
        shape: tuple[int, int, int],
        *,
        inverse: bool = False,
        tolerance: float = TOLERANCE,
    ) -> None:
        from sitreg_lumir.deform.backends import backend_of

        steps = steps_of(len(updates), inverse)
        self.coarse = [(first.detach(), second.detach()) for first, second in updates[:kept]]
        self.shape, self.tolerance, self.points = shape, tolerance, points
        coefficients = coefficients_of(updates, shape)
        coefficients = coefficients._replace(flat=coefficients.flat.detach())
        self.begin, _, _ = backend_of(coefficients.flat).move_points(
            points, steps[: 2 * kept], coefficients, False, tolerance, MOST_LOOK_UPS
        )
        self.steps = steps[2 * kept :]
        self.path = torch.full(
            (len(self.steps), *points.shape), torch.nan, dtype=coefficients.flat.dtype, device=points.device
        )

    def __call__(self, finest: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The displacement of each point, ``(3, N)``, voxels, with gradients to the control points.

        Args:
            finest: control points of the stages that change, ``(3, ...)`` each, coarsest first.

        Raises:
            NotInvertedError: an inversion did not converge.
        """
        from sitreg_lumir.deform import autograd  # it brings the compiled loops along

        coefficients = coefficients_of([*self.coarse, *finest], self.shape)
        needed = [index >= 2 * len(self.coarse) for index in range(len(coefficients.sizes))]
        detached = coefficients._replace(flat=coefficients.flat.detach())
        args = self.begin, self.steps, detached, self.path, needed, self.tolerance, MOST_LOOK_UPS
        followed: tuple[Tensor, Tensor] = autograd.Follow.apply(coefficients.flat, *args)
        moved, settled = followed
        if not settled:
            raise NotInvertedError(f"an inverse did not converge to {self.tolerance:g} voxel")
        displacement: Tensor = moved + (self.begin - self.points).to(moved.dtype)
        return displacement


def quantum(factor: int) -> float:
    """The smallest difference between control points of a spacing in files, voxels of the level."""
    return control_point_bound((factor,) * 3) / _LARGEST_INTEGER


def to_integers(points: Tensor, step: float) -> Tensor:
    """Control points ``(3, ...)`` as int16 multiples of ``step``, on the CPU.

    Raises:
        ValueError: they lie beyond the bound, or are not finite.
    """
    multiples = (points.detach().double().cpu() / step).round()
    if not bool((multiples.abs() <= _LARGEST_INTEGER).all()):
        raise ValueError("control points lie beyond their bound, or are not finite")
    return multiples.to(torch.int16)


def from_integers(integers: Tensor, step: float) -> Tensor:
    """What :func:`to_integers` does, backwards, float32."""
    return (integers.double() * step).float()
