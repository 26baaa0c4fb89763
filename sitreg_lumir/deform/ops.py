"""Operations on deformations and images: what they take and give, and the checks of that.

Fields are ``(B, 3, X, Y, Z)``, voxels, channel = array axis; a field ``u`` stands for the map ``x + u(x)``. Look-ups
are trilinear with the look-up coordinate clamped to the volume, while positions may leave it. Half precision is
computed in float32 and given back in the input's dtype; scalars are summed up in float64. ``autograd`` holds the
gradients, ``backends`` the arithmetic.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from math import ceil
from typing import Any

import torch
from torch import Tensor

from sitreg_lumir.deform import autograd
from sitreg_lumir.deform.backends import backend_of
from sitreg_lumir.deform.backends.torch import backend as torch_backend

HALF = (torch.float16, torch.bfloat16)


def in_float(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Outside autocast, half precision tensors in float32, the result in the first tensor's dtype."""

    @wraps(operation)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        half = any(isinstance(arg, Tensor) and arg.dtype in HALF for arg in args)
        if half:
            args = tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)
        with torch.autocast(first.device.type, enabled=False):
            result = operation(*args, **kwargs)
        return result.to(first.dtype) if half else result

    return wrapped


@in_float
def upsample_control_points(control_points: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """The field of cubic B-spline control points, at full resolution (no prefilter: it also smooths).

    Args:
        control_points: ``(B, 3, ceil(X / factor), ...)``, voxels of their level.
        factor: spacing of the level in full-resolution voxels.
        shape: ``(X, Y, Z)`` of the full-resolution grid.

    Returns:
        ``(B, 3, X, Y, Z)``, full-resolution voxels.

    Raises:
        ValueError: the shapes do not belong together.
    """
    check_control_points(control_points, factor, shape)
    result: Tensor = autograd.Upsample.apply(control_points, factor, tuple(shape))
    return result


@in_float
def invert(disp: Tensor, tolerance: float = 1e-2, max_iterations: int = 50) -> Tensor:
    """The inverse of ``x + disp(x)`` by fixed-point iteration, with the exact implicit gradient.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels; must be a contraction (control points within their bound).
        tolerance: the iteration ends when no voxel's inverse moves further than this, voxels.
        max_iterations: upper limit of look-ups.

    Returns:
        ``(B, 3, X, Y, Z)``, voxels.

    Source: Honkamaa & Marttinen, SITReg, Machine Learning for Biomedical Imaging 2024.
    """
    _check_field(disp, "disp")
    result: Tensor = autograd.Invert.apply(disp, tolerance, max_iterations)
    return result


@in_float
def compose(*disps: Tensor) -> Tensor:
    """The field of ``disps[0] o disps[1] o ...``, the last one applied first, resampled once at the end.

    Args:
        disps: two or more fields ``(B, 3, X, Y, Z)``, voxels, on one grid.

    Returns:
        ``(B, 3, X, Y, Z)``, voxels, on the same grid.
    """
    if len(disps) < 2:
        raise ValueError(f"compose needs two fields or more, got {len(disps)}")
    for disp in disps:
        _check_field(disp, "disp")
        if disp.shape != disps[0].shape:
            raise ValueError(f"fields differ in shape: {tuple(disps[0].shape)} and {tuple(disp.shape)}")
    result: Tensor = autograd.Compose.apply(*disps)
    return result


@in_float
def warp(values: Tensor, disp: Tensor, factor: int = 1) -> Tensor:
    """``values`` pulled through a field: ``warped(x) = values(x + disp(x))``, border values outside.

    Args:
        values: ``(B, C, ...)`` on the grid of ``disp`` (images), or on the level grid with spacing ``factor``
            (features), whose voxel ``k`` lies at ``factor * (k + 1/2) - 1/2``.
        disp: ``(B, 3, X, Y, Z)``, full-resolution voxels.
        factor: spacing of the level in full-resolution voxels.

    Returns:
        ``(B, C, ...)``, on the grid of ``values``.

    Examples:
        >>> image, disp = torch.arange(5.0).reshape(1, 1, 5, 1, 1), torch.zeros(1, 3, 5, 1, 1)
        >>> disp[:, 0] = 0.5
        >>> sitreg_lumir.warp(image, disp).flatten()
        tensor([0.5000, 1.5000, 2.5000, 3.5000, 4.0000])
    """
    _check_field(disp, "disp")
    expected = tuple(ceil(size / factor) for size in disp.shape[2:])
    if values.ndim != 5 or tuple(values.shape[2:]) != expected or len(values) != len(disp):
        raise ValueError(
            f"values must be ({len(disp)}, C, {', '.join(map(str, expected))}) for factor {factor}, "
            f"got {tuple(values.shape)}"
        )
    result: Tensor = autograd.Warp.apply(values, disp, factor)
    return result


def warp_mask(mask: Tensor, disp: Tensor) -> Tensor:
    """Where a warped mask still holds: trilinear with zeros outside, kept from 1 - 1e-3 on; no gradient.

    Args:
        mask: ``(B, 1, X, Y, Z)``, bool or 0/1.
        disp: ``(B, 3, X, Y, Z)``, voxels.

    Returns:
        bool ``(B, 1, X, Y, Z)``.
    """
    _check_field(disp, "disp")
    return mask_at(mask, disp, relative=True)


@torch.no_grad()
def mask_at(mask: Tensor, points: Tensor, relative: bool = False) -> Tensor:
    """:func:`warp_mask` at ``points`` ``(B, 3, X, Y, Z)``, voxels, instead of through a field.

    ``relative`` points count from their own voxel.
    """
    points = points.float() if points.dtype in HALF else points
    kept: Tensor = backend_of(points).mask_at(mask.bool(), points, relative)
    return kept


@torch.no_grad()
def warp_labels(labels: Tensor, disp: Tensor) -> Tensor:
    """Labels pulled through a field by nearest neighbour; 0 where the position leaves the volume at all.

    Args:
        labels: ``(B, C, X, Y, Z)``, any dtype.
        disp: ``(B, 3, X, Y, Z)``, voxels.

    Returns:
        the same shape and dtype as ``labels``.
    """
    _check_field(disp, "disp")
    points = torch_backend.grid_points(disp) + disp
    last = torch.tensor([size - 1 for size in labels.shape[2:]], device=disp.device)[:, None, None, None]
    inside = ((points >= 0) & (points <= last)).all(dim=1, keepdim=True)
    nearest = torch.floor(points + 0.5).long().clamp(min=torch.zeros_like(last), max=last)
    _, size_y, size_z = labels.shape[2:]
    index = (nearest[:, 0] * size_y + nearest[:, 1]) * size_z + nearest[:, 2]
    picked = labels.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, labels.shape[1], -1))
    return torch.where(inside, picked.view_as(labels), torch.zeros((), dtype=labels.dtype, device=labels.device))


@torch.no_grad()
def interpolate(values: Tensor, points: Tensor) -> Tensor:
    """Values at points, trilinear, border values outside; no gradient.

    Args:
        values: ``(B, C, X, Y, Z)``.
        points: ``(B, 3, I, J, K)`` or ``(1, 3, I, J, K)``, voxels of the grid of ``values``; they may be more exact
            than ``values``.

    Returns:
        ``(B, C, I, J, K)``, of the dtype of ``values``.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if values.ndim != 5 or points.ndim != 5 or points.shape[1] != 3 or len(points) not in (1, len(values)):
        raise ValueError(
            f"values must be (B, C, X, Y, Z) and points (B, 3, I, J, K), got {tuple(values.shape)} and "
            f"{tuple(points.shape)}"
        )
    return backend_of(points).interpolate(values, points)


@in_float
def lncc(image_1: Tensor, image_2: Tensor, mask: Tensor | None = None, window: int = 11) -> Tensor:
    """Mean squared local correlation of two images, over all voxels and the batch, in [0, 1].

    Both images are multiplied by the mask; masked voxels and the outside enter the windows as zeros. The loss being a
    scalar, its gradient is computed along with it, and only scaled later on.

    Args:
        image_1: ``(B, 1, X, Y, Z)``.
        image_2: the same shape.
        mask: ``(B, 1, X, Y, Z)``, bool or 0/1, or None.
        window: width of the cube, voxels, odd.

    Returns:
        a scalar.

    Raises:
        ValueError: the shapes do not belong together, or the window is even.

    Source: Avants et al., Symmetric diffeomorphic image registration with cross-correlation, MedIA 2008.
    """
    if image_1.ndim != 5 or image_1.shape[1] != 1 or image_2.shape != image_1.shape:
        raise ValueError(f"images must be (B, 1, X, Y, Z) alike, got {tuple(image_1.shape)} and {tuple(image_2.shape)}")
    if mask is not None and mask.shape != image_1.shape:
        raise ValueError(f"mask must be {tuple(image_1.shape)}, got {tuple(mask.shape)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, got {window}")
    mask = None if mask is None else mask.bool()
    result: Tensor = autograd.Lncc.apply(image_1, image_2, mask, window, torch.is_grad_enabled())
    return result


@in_float
def ndv_sum(disp: Tensor) -> Tensor:
    """Volume that the map ``x + disp(x)`` folds, summed over all inner voxels and the batch, with its gradient.

    The sum of :func:`~sitreg_lumir.deform.jacobian.non_diffeomorphic_volume`.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels, each axis at least 3 long.

    Returns:
        a scalar, voxels^3, never negative.

    Raises:
        ValueError: ``disp`` has another form.

    Source: Liu et al., On finite difference Jacobian computation, IJCV 2024.
    """
    _check_field(disp, shortest=3)
    result: Tensor = autograd.NdvSum.apply(disp, torch.is_grad_enabled())
    return result


@torch.no_grad()
@in_float
def ndv_map(disp: Tensor) -> Tensor:
    """:func:`~sitreg_lumir.deform.jacobian.non_diffeomorphic_volume` in one pass, without gradient."""
    _check_field(disp, shortest=3)
    volume: Tensor = backend_of(disp).ndv_map(disp)
    return volume


@in_float
def diffusion(disp: Tensor, voxel_size: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Mean squared gradient of a field, by forward differences; an axis of one voxel has none.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels.
        voxel_size: of each axis; only ratios matter.

    Returns:
        a scalar, no unit.

    Raises:
        ValueError: ``disp`` has another form, or a voxel has no size.
    """
    _check_field(disp, shortest=1)
    if len(voxel_size) != 3 or min(voxel_size) <= 0:
        raise ValueError(f"voxel_size must be three positive numbers, got {tuple(voxel_size)}")
    scales = tuple(tuple((own / step) ** 2 for own in voxel_size) for step in voxel_size)
    result: Tensor = autograd.Diffusion.apply(disp, scales)
    return result


@in_float
def mind(image: Tensor, sigma: float, radius: int) -> Tensor:
    """The MIND descriptor of :class:`~sitreg_lumir.network.mind.Mind`.

    Args:
        image: ``(B, 1, X, Y, Z)``. An image that is to get a gradient is left to plain torch.
        sigma: of the patch's Gaussian, voxels.
        radius: of the patch, voxels.

    Returns:
        ``(B, 6, X, Y, Z)``, no unit, in (0, 1].

    Raises:
        ValueError: ``image`` has another form, or the patch has no size.
    """
    if image.ndim != 5 or image.shape[1] != 1:
        raise ValueError(f"image must be (B, 1, X, Y, Z), got {tuple(image.shape)}")
    if sigma <= 0 or radius < 1:
        raise ValueError(f"MIND needs sigma > 0 and radius >= 1, got {sigma} and {radius}")
    learning = torch.is_grad_enabled() and image.requires_grad
    descriptor: Tensor = (torch_backend if learning else backend_of(image)).mind(image, sigma, radius)
    return descriptor


def check_control_points(control_points: Tensor, factor: int, shape: Sequence[int]) -> None:
    """Raises a ValueError unless control points ``(B, 3, ...)`` belong to a grid of ``shape`` at this spacing."""
    _check_field(control_points, "control_points")
    expected = tuple(ceil(size / factor) for size in shape)
    if tuple(control_points.shape[2:]) != expected:
        raise ValueError(
            f"control_points of factor {factor} on {tuple(shape)} must be {expected}, "
            f"got {tuple(control_points.shape[2:])}"
        )


def _check_field(disp: Tensor, name: str = "disp", shortest: int = 0) -> None:
    if disp.ndim != 5 or disp.shape[1] != 3 or min(disp.shape[2:]) < shortest:
        axes = f" with axes of {shortest} or more" if shortest else ""
        raise ValueError(f"{name} must be (B, 3, X, Y, Z){axes}, got {tuple(disp.shape)}")
