"""Images and label maps through transforms onto another grid, sampled once from the original, slab by slab.

A volume reaches half a voxel beyond its outermost voxel centres, as in ITK; further out is ``outside``.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.files.chain import Matrix, Points, Transform, as_list, inside, look_up, positions

Interpolation: TypeAlias = Literal["linear", "nearest"]


def resample(
    image: NDArray[Any],
    image_affine: Matrix,
    transforms: Transform | Sequence[Transform],
    shape: Sequence[int],
    affine: Matrix,
    *,
    interpolation: Interpolation = "linear",
    outside: float = 0.0,
) -> NDArray[Any]:
    """The moving image on a grid of the fixed world.

    Args:
        image: ``(X, Y, Z)``, or ``(X, Y, Z, T)`` frames that all move alike.
        image_affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm.
        transforms: fixed world -> moving world; of several the first is applied first to the grid's points.
        shape: ``(X, Y, Z)`` of the grid.
        affine: ``(4, 4)`` the grid's voxel-to-world matrix, RAS, mm.
        interpolation: ``linear`` or ``nearest``. Nothing is smoothed: on a coarser grid, smooth first.
        outside: the value where the moving image does not reach.

    Returns:
        ``shape``, or ``(*shape, T)``: float32 if ``linear``, else the image's type.

    Raises:
        ValueError: a shape, a matrix or ``interpolation`` is wrong.
    """
    source = _checked(image, interpolation)
    frames = 1 if source.ndim == 3 else source.shape[3]
    where = positions(as_list(transforms), shape, affine, image_affine, frames)
    extra = source.shape[3:]
    if interpolation == "nearest":
        result = np.empty((*shape, *extra), source.dtype)
        for part, at in where:
            result[part] = nearest_at(source, at, outside)
        return result
    channels = np.require(source.reshape(*source.shape[:3], frames).transpose(3, 0, 1, 2), np.float32, ["C", "W"])
    result = np.empty((*shape, frames), np.float32)
    for part, at in where:
        values = np.where(inside(at, source.shape[:3]), look_up(channels, at), np.float32(outside))
        result[part] = np.moveaxis(values, 0, -1)
    return result.reshape(*shape, *extra)


def resample_labels(
    labels: NDArray[Any],
    labels_affine: Matrix,
    transforms: Transform | Sequence[Transform],
    shape: Sequence[int],
    affine: Matrix,
    *,
    interpolation: Interpolation = "nearest",
) -> NDArray[Any]:
    """The moving label map on a grid of the fixed world; 0 where it does not reach.

    Args:
        labels: ``(X, Y, Z)``, any type; only equality of values counts.
        labels_affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm.
        transforms: as in :func:`resample`.
        shape: ``(X, Y, Z)`` of the grid.
        affine: ``(4, 4)`` the grid's voxel-to-world matrix, RAS, mm.
        interpolation: ``nearest``, or ``linear``: each label's own map is interpolated and the largest value wins,
            which gives smoother borders. Of labels that are equally large the smallest one wins.

    Returns:
        ``shape``, the type of ``labels``.

    Examples:
        >>> labels = np.arange(8).reshape(2, 2, 2)
        >>> shift = np.eye(4)
        >>> shift[0, 3] = 1.0  # from the fixed to the moving world, mm
        >>> sitreg_lumir.resample_labels(labels, np.eye(4), shift, (1, 2, 2), np.eye(4))[0]
        array([[4, 5],
               [6, 7]])
    """
    source = _checked(labels, interpolation)
    if source.ndim != 3:
        raise ValueError(f"labels must be (X, Y, Z), got {source.shape}")
    result = np.empty(tuple(shape), source.dtype)
    for part, at in positions(as_list(transforms), shape, affine, labels_affine):
        result[part] = nearest_at(source, at, 0) if interpolation == "nearest" else _most_of(source, at)
    return result


def _checked(image: NDArray[Any], interpolation: str) -> NDArray[Any]:
    array = np.asarray(image)
    if array.ndim not in (3, 4) or array.size == 0:
        raise ValueError(f"image must be (X, Y, Z) or (X, Y, Z, T), got {array.shape}")
    if interpolation not in ("linear", "nearest"):
        raise ValueError(f"interpolation must be linear or nearest, got {interpolation!r}")
    return array


def nearest_at(image: NDArray[Any], at: Points, outside: float) -> NDArray[Any]:
    """``(X, Y, Z, ...)`` at ``(3, ...)`` voxels, halves upwards."""
    last = np.array(image.shape[:3]).reshape(3, *(1,) * (at.ndim - 1)) - 1
    within = inside(at, image.shape[:3])
    index = np.clip(np.floor(np.where(within, at, 0) + 0.5).astype(np.intp), 0, last)
    values: NDArray[Any] = image[tuple(index)]
    values[~within] = outside
    return values


def _most_of(labels: NDArray[Any], at: Points) -> NDArray[Any]:
    """The label with the largest trilinear share at ``(3, ...)`` voxels, 0 outside."""
    result = np.zeros(at.shape[1:], labels.dtype)
    within = inside(at, labels.shape)
    last = np.array(labels.shape)[:, None] - 1
    place = np.clip(at[:, within], 0, last)
    lower = np.clip(np.floor(place).astype(np.intp), 0, np.maximum(last - 1, 0))
    upper = np.minimum(lower + 1, last)
    corners = [np.array(corner)[:, None] for corner in product((False, True), repeat=3)]
    found = np.stack([labels[tuple(np.where(corner, upper, lower))] for corner in corners])
    winner = found[0].copy()
    mixed = (found != found[0]).any(axis=0)  # elsewhere all eight corners agree
    found, weight = found[:, mixed], (place - lower)[:, mixed]
    weights = np.stack([np.where(corner, weight, 1 - weight).prod(axis=0) for corner in corners])
    best, most = found[0].copy(), np.full(found.shape[1], -1.0)
    for candidate in found:
        share = np.round((weights * (found == candidate)).sum(axis=0), 9)  # rounding must not decide between equals
        better = (share > most) | ((share == most) & (candidate < best))
        best, most = np.where(better, candidate, best), np.where(better, share, most)
    winner[mixed] = best
    result[within] = winner
    return result
