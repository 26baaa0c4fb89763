"""Slices of one registered pair as small pictures: images, edges, deformed grid, Jacobian, disagreement."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from sitreg_lumir.report.colours import Array, Coloured, Mask, colour_jacobian, colour_mm, jpeg, lines, png
from sitreg_lumir.report.plots import PLANES

GRID_MM = 8.0  # between two lines of the grid
_LONGEST = 256  # pixels of a picture's longest side at most
_FINE = 448  # about as many for lines, which would look ragged at the images' size
_SAMPLE = 2_000_000  # voxels that decide on a window, about
_EDGE_MM = 1.2  # standard deviation of the smoothing before edges are looked for
_EDGE_GRADIENT = (0.045, 0.09)  # from where an edge starts to show to where it is drawn in full, window per mm
_THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_START = {0: 0.38, 1: 0.5, 2: 0.5}  # of the chosen slices, by axis; the mid-sagittal one shows the gap between halves


@dataclass(frozen=True, eq=False)
class Volumes:
    """The images and fields of one pair that are shown, all on the fixed grid, axes in RAS order and direction.

    Args:
        fixed: ``(X, Y, Z)``, background 0.
        moving: ``(X, Y, Z)``, as it was before registration, on the fixed grid.
        warped: ``(X, Y, Z)``, the moving image after registration.
        disp: ``(3, X, Y, Z)``, voxels, fixed grid.
        jac_det: ``(X, Y, Z)``, no unit; NaN where it is not known.
        disagreement: ``(X, Y, Z)``, mm.
        voxel_size: mm along each axis.

    Raises:
        ValueError: shapes differ, or a voxel size is not positive.
    """

    fixed: Array
    moving: Array
    warped: Array
    disp: Array
    jac_det: Array | None = None
    disagreement: Array | None = None
    voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        shape = np.shape(self.fixed)
        if len(shape) != 3 or min(shape) < 2:
            raise ValueError(f"fixed must be (X, Y, Z) with axes of 2 or more, got {shape}")
        for field in fields(self)[1:-1]:
            value = getattr(self, field.name)
            wanted = (3, *shape) if field.name == "disp" else shape
            if value is not None and np.shape(value) != wanted:
                raise ValueError(f"{field.name} must be {wanted}, got {np.shape(value)}")
        if len(self.voxel_size) != 3 or not min(self.voxel_size) > 0:
            raise ValueError(f"voxel_size must be three positive numbers, got {self.voxel_size}")


@dataclass(frozen=True)
class Plane:
    """One direction of view: for each layer one picture (a data URI) per slice.

    ``indices`` are the slices' places on their axis, voxels; ``size`` is width and height of the images in pixels,
    which are square; ``start`` the slice to show first.
    """

    name: str
    indices: list[int]
    start: int
    size: tuple[int, int]
    layers: dict[str, list[str]]


def render(volumes: Volumes, slices: int) -> tuple[list[Plane], dict[str, Coloured]]:
    """All pictures of a pair.

    Args:
        volumes: the images and fields of the pair.
        slices: of each plane, spread over the fixed image's foreground.

    Returns:
        the planes with layers ``fixed``, ``moving``, ``warped``, ``edges`` (the fixed image's), ``grid`` (a regular
        grid of the moving image, moved with it) and, where known, ``jacobian`` and ``disagreement``; and the
        colours of the last two.
    """
    mask = np.asarray(volumes.fixed) != 0
    if not mask.any():
        mask = np.ones_like(mask)
    window_of_moving = intensity_window(volumes.moving)
    images = {
        "fixed": (volumes.fixed, intensity_window(volumes.fixed)),
        "moving": (volumes.moving, window_of_moving),
        "warped": (volumes.warped, window_of_moving),
    }
    coloured: dict[str, Coloured] = {}
    if volumes.jac_det is not None:
        coloured["jacobian"] = colour_jacobian(volumes.jac_det, mask)
    if volumes.disagreement is not None:
        coloured["disagreement"] = colour_mm(volumes.disagreement, mask)
    planes = []
    for name, axis in reversed(PLANES):
        indices = _choose(mask, axis, slices)
        size, fine = sizes(mask.shape, volumes.voxel_size, axis)
        of_slice = partial(_layers, volumes, images, coloured, axis, size, fine)
        with ThreadPoolExecutor(_THREADS) as threads:  # drawing and encoding leave Python's lock to others
            slices_layers = list(threads.map(of_slice, indices))
        layers = {key: [pictures[key] for pictures in slices_layers] for key in slices_layers[0]}
        start = round(_START[axis] * (len(indices) - 1))
        planes.append(Plane(name, indices, start, size, layers))
    return planes, coloured


def _layers(
    volumes: Volumes,
    images: dict[str, tuple[Array, tuple[float, float]]],
    coloured: dict[str, Coloured],
    axis: int,
    size: tuple[int, int],
    fine: tuple[int, int],
    index: int,
) -> dict[str, str]:
    """All pictures of one slice, data URIs by layer; ``size`` is that of images, ``fine`` that of lines."""
    layers: dict[str, str] = {}
    for key, (image, window) in images.items():
        picture = scaled(slice_of(image, axis, index), window)
        layers[key] = jpeg(resized(picture, size))
        if key == "fixed":
            layers["edges"] = lines(_edges(picture, fine, volumes.voxel_size, axis), (255, 194, 61))
    layers["grid"] = lines(grid_lines(volumes, axis, index, fine), (106, 236, 210))
    for key, colours in coloured.items():
        indices = resized(slice_of(colours.indices, axis, index), size, Image.Resampling.NEAREST)
        layers[key] = png(indices, colours.palette)
    return layers


def _in_plane(axis: int) -> tuple[int, int]:
    """The two axes that a slice across ``axis`` shows."""
    across, along = (shown for shown in range(3) if shown != axis)
    return across, along


def _choose(mask: Mask, axis: int, slices: int) -> list[int]:
    """Indices of evenly spread slices through the foreground, without its rims, which show little."""
    filled = np.flatnonzero(mask.any(axis=_in_plane(axis)))
    low, high = int(filled[0]), int(filled[-1])
    rim = 0.08 * (high - low)
    return [int(index) for index in np.unique(np.rint(np.linspace(low + rim, high - rim, slices)))]


def sizes(
    shape: tuple[int, ...], voxel_size: tuple[float, float, float], axis: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of images and of lines, in square pixels; one pixel size for all three planes."""
    extent = [size * step for size, step in zip(shape, voxel_size, strict=True)]
    pixel = max(min(voxel_size), max(extent) / _LONGEST)
    factor = min(max(1, round(_FINE * pixel / max(extent))), 4)
    width, height = (max(1, round(extent[shown] / pixel)) for shown in _in_plane(axis))
    return (width, height), (width * factor, height * factor)


def slice_of(volume: Array, axis: int, index: int) -> Array:
    """Rows from top to bottom: towards the feet or the back; columns from left to right: to the right or the front."""
    shown: Array = np.take(volume, index, axis).T[::-1]
    return shown


def resized(picture: Array, size: tuple[int, int], how: Image.Resampling = Image.Resampling.BICUBIC) -> Array:
    """``picture`` with ``size`` (width, height); the pixels' outer border stays where it is."""
    if picture.shape == size[::-1]:
        return picture
    resized: Array = np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize(size, how))
    return resized


def intensity_window(image: Array) -> tuple[float, float]:
    """The range of intensities that is worth showing; 0, the background, belongs to it."""
    known = np.asarray(image).ravel()
    known = known[:: 1 + known.size // _SAMPLE].astype(np.float32)
    known = known[np.isfinite(known) & (known != 0)]
    low, high = np.percentile(known, (0.5, 99.5)) if known.size else (0.0, 1.0)
    return min(float(low), 0.0), float(high)


def scaled(picture: Array, window: tuple[float, float]) -> NDArray[np.float32]:
    """``picture`` with the window as 0..1; unknown values are as dark as the window's lower end."""
    low, high = window
    scaled = (np.nan_to_num(picture.astype(np.float32), nan=low) - low) / max(high - low, 1e-12)
    clipped: NDArray[np.float32] = np.clip(scaled, 0, 1, dtype=np.float32)
    return clipped


def _edges(picture: Array, size: tuple[int, int], voxel_size: tuple[float, float, float], axis: int) -> Array:
    """How much of each pixel an edge covers, 0..1: where the gradient has a maximum along its direction, and is large.

    Source: Marr & Hildreth, Theory of edge detection, Proc. R. Soc. B 1980.
    """
    across, _ = _in_plane(axis)
    pixel = picture.shape[1] * voxel_size[across] / size[0]  # mm
    smooth = resized(picture, size).astype(np.float32)
    sigma = _EDGE_MM / pixel
    gradient = ndimage.gaussian_gradient_magnitude(smooth, sigma) / pixel
    strength = np.clip((gradient - _EDGE_GRADIENT[0]) / (_EDGE_GRADIENT[1] - _EDGE_GRADIENT[0]), 0, 1)
    curvature = ndimage.gaussian_laplace(smooth, sigma)
    covered: Array = _cover(curvature, curvature, 1.6) * strength
    return covered


def grid_lines(volumes: Volumes, axis: int, index: int, size: tuple[int, int]) -> Array:
    """How much of each pixel a line of the moving image's grid covers, 0..1.

    A line lies where ``x + disp(x)`` is a multiple of the lines' distance: exact also where the field leaves the
    plane, since planes of the moving image are cut, not lines projected.
    """
    covered = np.zeros(size[::-1], dtype=np.float32)
    across, along = _in_plane(axis)
    for direction, length in ((across, size[0]), (along, size[1])):
        voxels = volumes.fixed.shape[direction]
        position = (np.arange(length, dtype=np.float32) + 0.5) * voxels / length - 0.5
        position = position[None, :] if direction == across else position[::-1, None]
        shift = resized(slice_of(volumes.disp[direction], axis, index).astype(np.float32), size)
        line = (position + shift) * (volumes.voxel_size[direction] / GRID_MM)
        covered = np.maximum(covered, _cover(line - np.rint(line), line, 1.5))
    return covered


def _cover(value: Array, smooth: Array, width: float) -> Array:
    """Share of each pixel, 0..1, covered by a line ``width`` pixels wide along ``value`` = 0.

    Args:
        value: ``(rows, columns)``, perhaps with jumps far from 0.
        smooth: ``(rows, columns)``, ``value`` up to a constant but without jumps, for the gradient.
        width: pixels.
    """
    down, right = np.gradient(smooth)
    distance = np.abs(value) / np.maximum(np.hypot(down, right), 1e-6)
    covered: Array = np.clip((width + 1) / 2 - distance, 0, 1)
    return covered
