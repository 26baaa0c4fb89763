"""What losses need of whole images and fields, in plain torch: the readable truth for other backends.

Part of ``torch_backend``, with the same conventions. Scalars are summed up in float64 and have the inputs' dtype.
"""

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.deform.jacobian import (
    COLUMNS,
    cross_product,
    gradients,
    neighbour,
    non_diffeomorphic_volume,
    triple_product,
)
from sitreg_lumir.deform.sums import exact_mean, exact_sum

_NEIGHBOURS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))  # the channels of MIND


def box_sum(values: Tensor, window: int) -> Tensor:
    """Sum over a ``window``-wide cube around each voxel, zeros outside; it is its own adjoint (odd windows).

    Doubling: sums over 1, 2, 4, ... voxels are added up, so no cumulative sum loses precision.
    """
    radius = window // 2
    for axis in (-3, -2, -1):
        size = values.shape[axis]
        padding = [0, 0] * 3
        padding[2 * (-1 - axis)] = padding[2 * (-1 - axis) + 1] = radius
        run = torch.nn.functional.pad(values, padding)
        total, covered, length = None, 0, 1  # `run` holds sums over `length` voxels from each position on
        while length <= window:
            if window & length:
                part = run.narrow(axis, covered, size)
                total = part if total is None else total + part
                covered += length
            if 2 * length <= window:
                count = run.shape[axis] - length
                run = run.narrow(axis, 0, count) + run.narrow(axis, length, count)
            length *= 2
        assert total is not None
        values = total
    return values


def lncc_and_gradients(
    image_1: Tensor, image_2: Tensor, mask: Tensor | None, window: int, need_1: bool, need_2: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean squared local correlation of two masked images, and its gradients (None where not needed).

    Both images ``(B, 1, X, Y, Z)`` are multiplied by ``mask`` (bool or None). With window sums ``S`` over ``N``
    voxels, ``c = S(I K) - S(I) S(K) / N`` and ``v, w`` the same of ``I I`` and ``K K``: ``cc = c^2 / (v w + 1e-5)``.
    The gradient by ``I(y)`` gathers from all windows ``x`` around ``y``, with ``K', I'`` the window's means:
    ``sum_x dcc/dc(x) (K(y) - K'(x)) + 2 dcc/dv(x) (I(y) - I'(x))``, three window sums of maps.
    """
    first, second = (image_1, image_2) if mask is None else (image_1 * mask, image_2 * mask)
    sums = box_sum(torch.cat([first, second, first * second, first.square(), second.square()], 1), window)
    sum_1, sum_2, sum_12, sum_11, sum_22 = sums.split(1, dim=1)
    mean_1, mean_2 = sum_1 / window**3, sum_2 / window**3
    cross = sum_12 - sum_1 * mean_2
    variance_1, variance_2 = sum_11 - sum_1 * mean_1, sum_22 - sum_2 * mean_2
    ratio = cross / (variance_1 * variance_2 + 1e-5)
    value = exact_mean(ratio * cross).to(image_1.dtype)

    def gradient(own: Tensor, second: Tensor, own_mean: Tensor, second_mean: Tensor, second_variance: Tensor) -> Tensor:
        by_cross, by_own = 2 * ratio, -2 * ratio.square() * second_variance
        maps = torch.cat([by_cross, by_own, by_cross * second_mean + by_own * own_mean], dim=1)
        from_cross, from_own, from_means = box_sum(maps, window).split(1, dim=1)
        by_own_image: Tensor = (from_cross * second + from_own * own - from_means) / own.numel()
        return by_own_image if mask is None else by_own_image * mask

    grad_1 = gradient(first, second, mean_1, mean_2, variance_2) if need_1 else None
    grad_2 = gradient(second, first, mean_2, mean_1, variance_1) if need_2 else None
    return value, grad_1, grad_2


def ndv_map(disp: Tensor) -> Tensor:
    """Volume folded around each inner voxel, ``(B, 1, X-2, Y-2, Z-2)``, voxels^3."""
    return non_diffeomorphic_volume(disp)


def ndv_sum_and_gradient(disp: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of :func:`ndv_map`, and its gradient (None if not needed).

    The derivative of a determinant by one of its columns is the cross product of the other two.
    """
    value = exact_sum(ndv_map(disp.detach())).to(disp.dtype)
    if not need_grad:
        return value, None
    grad = torch.zeros_like(disp)
    for name, columns in COLUMNS.items():
        columns_of_map = gradients(disp.detach(), name)
        folds = (triple_product(*columns_of_map) < 0).unsqueeze(1)
        for column, (step, sign) in enumerate(columns):
            normal = torch.stack(
                cross_product(columns_of_map[(column + 1) % 3], columns_of_map[(column + 2) % 3]), dim=1
            )
            share = normal * folds * (-sign / 12)
            neighbour(grad, step).add_(share)
            neighbour(grad, (0, 0, 0)).sub_(share)
    return value, grad


def diffusion(disp: Tensor, scales: Sequence[Sequence[float]]) -> Tensor:
    """Mean of the squared differences to the next voxel along each axis, times ``scales[axis][component]``.

    An axis of one voxel has no differences and adds nothing.
    """
    total = torch.zeros((), dtype=torch.float64, device=disp.device)
    for axis in range(3):
        differences = disp.diff(dim=axis + 2)
        sums = differences.square().sum(dim=(0, 2, 3, 4), dtype=torch.float64)
        count = max(differences.numel(), 1)  # of all three components: the mean over them is in it
        total = total + (sums * sums.new_tensor(scales[axis])).sum() / count
    return (total / 3).to(disp.dtype)


def diffusion_adjoint(grad_value: Tensor, disp: Tensor, scales: Sequence[Sequence[float]]) -> Tensor:
    """Gradient of :func:`diffusion` with respect to ``disp``."""
    grad = torch.zeros_like(disp)
    for axis in range(3):
        size = disp.shape[axis + 2] - 1
        differences = disp.diff(dim=axis + 2)
        weights = disp.new_tensor(scales[axis])[:, None, None, None] * (2 / 3 / max(differences.numel(), 1))
        share = differences * (weights * grad_value)
        grad.narrow(axis + 2, 1, size).add_(share)
        grad.narrow(axis + 2, 0, size).sub_(share)
    return grad


def mind(image: Tensor, sigma: float, radius: int) -> Tensor:
    """The MIND descriptor ``exp(-D_r / V)``: ``(B, 1, X, Y, Z)`` -> ``(B, 6, X, Y, Z)``; 1 where ``V <= 1e-6``."""
    distance, variance = mind_distances(image, sigma, radius)
    flat = variance <= 1e-6
    return torch.exp(-distance / variance.masked_fill(flat, 1)).masked_fill(flat, 1)


def mind_distances(image: Tensor, sigma: float, radius: int) -> tuple[Tensor, Tensor]:
    """Distances ``D_r`` of the six patches, and their mean ``V``.

    The image is replicated beyond its edge; patches are weighted with ``exp(-|p|^2 / sigma^2)``, not normalised.
    """
    padded = F.pad(image, (radius + 1,) * 6, mode="replicate")
    centre = padded[:, :, 1:-1, 1:-1, 1:-1]
    distances = []
    for shift in _NEIGHBOURS:
        slices = [slice(1 + step, size - 1 + step) for step, size in zip(shift, padded.shape[2:], strict=True)]
        distances.append(_sum_patches((centre - padded[:, :, *slices]).square(), sigma, radius))
    distance = torch.cat(distances, dim=1)
    return distance, distance.mean(dim=1, keepdim=True)


def _sum_patches(squares: Tensor, sigma: float, radius: int) -> Tensor:
    """Gaussian-weighted sum over the patch, one axis after the other; each shrinks by twice the radius."""
    weights = patch_weights(sigma, radius)
    for axis in (2, 3, 4):
        size = squares.shape[axis] - 2 * radius
        total = squares.narrow(axis, radius, size) * weights[0]
        for offset, sign in product(range(1, radius + 1), (-1, 1)):
            total = total.add(squares.narrow(axis, radius + sign * offset, size), alpha=weights[offset])
        squares = total
    return squares


def patch_weights(sigma: float, radius: int) -> list[float]:
    """MIND's weights along one axis, by distance from the patch's middle."""
    return [math.exp(-(offset**2) / sigma**2) for offset in range(radius + 1)]
