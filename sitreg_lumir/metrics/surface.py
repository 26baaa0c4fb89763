"""Distance between the surfaces of two binary masks, each surface element weighted by its area.

A surface element is a 2x2x2 neighbourhood of voxels that is neither empty nor full. Its 8 bits are a code of 0..255
(the bit of the corner ``(x, y, z)`` is ``7 - 4x - 2y - z``), and the marching-cubes surface inside it has an area.

Source: the definition of DeepMind's surface-distance; Lorensen & Cline, Marching cubes, SIGGRAPH 1987.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

Floats = NDArray[np.float64]
Codes = NDArray[np.uint8]
CORNERS = tuple(product((0, 1), repeat=3))


def robust_hausdorff(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    fraction: float = 0.95,
) -> float:
    """The larger of the two directed distances that ``fraction`` of a surface's area does not exceed.

    Args:
        first: ``(X, Y, Z)`` bool; voxels outside the array count as False.
        second: the same shape.
        spacing: voxel size of each axis; with ones the result is in voxels.
        fraction: of the area.

    Returns:
        a distance in the unit of ``spacing``; inf if exactly one mask is empty, nan if both are.

    Raises:
        ValueError: the masks' shapes differ, or ``spacing`` is not three positive numbers.
    """
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f"masks must be (X, Y, Z) alike, got {first.shape} and {second.shape}")
    size = np.asarray(spacing, dtype=np.float64)
    if size.shape != (3,) or not (size > 0).all():
        raise ValueError(f"spacing must be three positive numbers, got {spacing!r}")
    codes_1, codes_2 = _codes(first), _codes(second)
    if not first.any() or not second.any():
        return float("inf") if first.any() or second.any() else float("nan")
    return max(_directed(codes_1, codes_2, size, fraction), _directed(codes_2, codes_1, size, fraction))


def _directed(codes: Codes, target_codes: Codes, spacing: Floats, fraction: float) -> float:
    """The distance to the surface of ``target_codes`` within which ``fraction`` of the area of ``codes`` lies."""
    where, target = np.nonzero(_is_surface(codes)), _is_surface(target_codes)
    areas = area_table((float(spacing[0]), float(spacing[1]), float(spacing[2])))[codes[where]]
    distances = np.zeros(len(areas))
    apart = ~target[where]
    # the points lie on a lattice: a plain tree is built faster and is as quick to search
    tree = KDTree(np.argwhere(target) * spacing, compact_nodes=False, balanced_tree=False)
    distances[apart] = tree.query(np.stack(where, axis=1)[apart] * spacing)[0]
    order = np.lexsort((areas, distances))
    share = np.cumsum(areas[order]) / np.sum(areas[order])
    index = min(int(np.searchsorted(share, fraction)), len(order) - 1)
    return float(distances[order[index]])


def _codes(mask: NDArray[np.bool_]) -> Codes:
    """Code of each 2x2x2 neighbourhood, ``(X+1, Y+1, Z+1)``, zeros around the volume."""
    bits: Codes = np.pad(mask, 1).astype(np.uint8)
    lines: Codes = 2 * bits[:, :, :-1] + bits[:, :, 1:]
    planes: Codes = 4 * lines[:, :-1] + lines[:, 1:]
    codes: Codes = 16 * planes[:-1] + planes[1:]
    return codes


def _is_surface(codes: Codes) -> NDArray[np.bool_]:
    surface: NDArray[np.bool_] = (codes != 0) & (codes != 255)
    return surface


@lru_cache(maxsize=16)
def area_table(spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Floats:
    """Area of the surface in a 2x2x2 neighbourhood for each of the 256 codes, ``(256,)``, unit of spacing^2."""
    table = np.zeros(256)
    for code in range(256):
        inside = {corner for index, corner in enumerate(CORNERS) if code >> (7 - index) & 1}
        if len(inside) > 4:  # the surface belongs to whichever side has fewer corners
            inside = set(CORNERS) - inside
        while inside:
            part = {inside.pop()}
            while grown := {corner for corner in inside if any(_is_edge(corner, neighbour) for neighbour in part)}:
                part |= grown
                inside -= grown
            if len(part) < 8:
                table[code] += _loop_area(_loop(part), np.asarray(spacing))
    return table


def _is_edge(corner: tuple[int, ...], neighbour: tuple[int, ...]) -> bool:
    return sum(a != b for a, b in zip(corner, neighbour, strict=True)) == 1


def _loop(part: set[tuple[int, ...]]) -> Floats:
    """Midpoints of the cube's edges that leave a connected set of corners, in order around it, ``(N, 3)``."""
    rest = [
        (np.array(corner) + neighbour) / 2
        for corner in sorted(part)
        for neighbour in CORNERS
        if neighbour not in part and _is_edge(corner, neighbour)
    ]
    loop = [rest.pop()]
    while rest:  # the next midpoint lies on a common face of the cube
        index = next(
            i for i, point in enumerate(rest) if any(point[axis] == loop[-1][axis] != 0.5 for axis in range(3))
        )
        loop.append(rest.pop(index))
    return np.array(loop)


def _loop_area(loop: Floats, spacing: Floats) -> float:
    """Area of a loop cut into the fan of triangles that is largest at unit spacing (bent loops have several)."""
    fans = [np.roll(loop, -start, axis=0) for start in range(len(loop))]
    largest = max(fans, key=_fan_area)
    return _fan_area(largest * spacing)


def _fan_area(loop: Floats) -> float:
    edges = loop[1:] - loop[0]
    return float(np.linalg.norm(np.cross(edges[:-1], edges[1:]), axis=1).sum() / 2)
