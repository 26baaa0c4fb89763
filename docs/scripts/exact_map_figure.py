"""Draws what the exact map gives over the network's sampled fields: called by `figures.py`."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from numpy.typing import NDArray
from torch import Tensor

from sitreg_lumir import load_model, map_points
from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.geometry.spline_map import SplineMap
from sitreg_lumir.geometry.transforms import AlignedMap, CompositeTransform, Points, swap, transform_by

FINE = 0.25  # mm
DETAIL = 24.0  # mm
ERRORS = LogNorm(1e-8, 3, clip=True)  # mm


def draw_exact_map(fixed: Tensor, moving: Tensor, path: Path) -> None:
    """Inverse error in a slice, and volume change in a detail of it at 0.25 mm: sampled fields, and the exact map.

    Args:
        fixed: ``(1, 1, X, Y, Z)``, intensity in [0, 1], on the grid of the shipped members.
        moving: ``(1, 1, X, Y, Z)``, intensity in [0, 1].
        path: of the picture.
    """
    model = load_model(device="cpu")
    (stage,) = model.run(fixed=fixed, moving=moving)
    matrices = np.eye(4), np.eye(4), model.affine
    field = CompositeTransform(*matrices, stage.disp[0].float().numpy())
    brains = ((image[0, 0] > 0).numpy() for image in (fixed, moving))
    exact = SplineMap(*matrices, SplineUpdates.rounded(stage.updates, model.shape), *brains)
    ways: tuple[tuple[str, AlignedMap, AlignedMap], ...] = (
        (f"fields at {model.spacing:g} mm", field, swap(field, stage.disp_inv[0].float().numpy())),
        ("the exact map", exact, exact.inverse),
    )
    figure, panels = plt.subplots(2, 2, figsize=(8, 8.4), layout="constrained")
    level = fixed.shape[4] // 2
    size = fixed.shape[2:4]
    place = steepest_place(exact, level)
    half = DETAIL / model.spacing / 2
    for column, (name, forward, backward) in enumerate(ways):
        errors = inverse_error(forward, backward, exact, level, model.affine)
        drawn = panels[0, column].imshow(errors.T, origin="lower", norm=ERRORS, extent=extent((0, 0), size))
        corner = place - half
        panels[0, column].add_patch(plt.Rectangle(tuple(corner), 2 * half, 2 * half, fill=False, color="red"))
        panels[0, column].set_title(f"inverse error, {name}")
        volume = determinant(forward, corner, 2 * half, level, model.affine)
        change = panels[1, column].imshow(
            volume.T, origin="lower", cmap="RdBu_r", vmin=0, vmax=2, extent=extent(corner, corner + 2 * half)
        )
        panels[1, column].set_title(f"volume change, {name}")
    for axes in panels.flat:
        bare(axes)
    figure.colorbar(drawn, ax=panels[0], label="mm", shrink=0.8)
    figure.colorbar(change, ax=panels[1], label="mm³ per mm³", shrink=0.8)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    print(path)


def steepest_place(exact: SplineMap, level: int) -> NDArray[np.float64]:
    """Where in the brain's part of a slice, voxels, the map changes volume most."""
    voxels = np.argwhere(exact.brain[:, :, level])
    at = np.c_[voxels, np.full(len(voxels), level)]
    values = exact.jacobian_determinant(transform_by(exact.model_affine, at.T.astype(np.float64)))
    return voxels[int(values.argmin())].astype(np.float64)


def inverse_error(
    forward: AlignedMap, backward: AlignedMap, exact: SplineMap, level: int, affine: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance, mm, of points of a slice to where both maps in turn bring them, four to a voxel; NaN outside."""
    x, y = exact.grid_shape[:2]
    points = slice_points((-0.25, -0.25), (2 * x, 2 * y), 0.5, level + 0.25, affine)
    mapped = map_points(forward, points.reshape(3, -1).T)
    apart = np.linalg.norm(map_points(backward, mapped) - points.reshape(3, -1).T, axis=1).reshape(2 * x, 2 * y)
    return np.where(np.kron(exact.brain[:, :, level], np.ones((2, 2))) > 0, apart, np.nan)


def determinant(
    forward: AlignedMap, corner: NDArray[np.float64], width: float, level: int, affine: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Volume change in a square of a slice: of the exact map its own derivative, of a field central differences."""
    step = FINE / float(np.linalg.norm(affine[:3, 0]))
    count = round(width / step)
    points = slice_points(corner + step / 2, (count, count), step, level + 0.25, affine)
    if isinstance(forward, SplineMap):
        return forward.jacobian_determinant(points).astype(np.float64)
    flat, small = points.reshape(3, -1).T, FINE / 10
    columns = [
        (map_points(forward, flat + small * unit) - map_points(forward, flat - small * unit)) / (2 * small)
        for unit in np.eye(3)
    ]
    values: NDArray[np.float64] = np.linalg.det(np.stack(columns, axis=-1)).reshape(count, count)
    return values


def slice_points(
    first: tuple[float, float] | NDArray[np.float64],
    count: tuple[int, int],
    step: float,
    level: float,
    affine: NDArray[np.float64],
) -> Points:
    """World points ``(3, X, Y)`` of a regular grid in a slice, RAS, mm; ``first``, ``step``, ``level`` in voxels."""
    x, y = (start + step * np.arange(size) for start, size in zip(first, count, strict=True))
    at = np.stack([*np.meshgrid(x, y, indexing="ij"), np.full(count, level)])
    return transform_by(affine, at)


def extent(low: tuple[float, ...] | NDArray[np.float64], high: torch.Size | NDArray[np.float64]) -> tuple[float, ...]:
    """Of an image in voxels, for matplotlib: voxel centres at whole numbers where the grid begins at 0."""
    shift = -0.5 if isinstance(high, torch.Size) else 0.0
    return low[0] + shift, high[0] + shift, low[1] + shift, high[1] + shift


def bare(axes: Axes) -> None:
    """Without ticks."""
    axes.set(xticks=[], yticks=[])
