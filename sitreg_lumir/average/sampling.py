"""Scans brought onto a template's grid by exact maps, each sampled once from the original."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sitreg_lumir.average.intensities import MEDIAN
from sitreg_lumir.geometry.orientation import spacing_of
from sitreg_lumir.geometry.transforms import Matrix, Points, Transform, inside, look_up, map_points, transform_by
from sitreg_lumir.io.read import Scan
from sitreg_lumir.preprocessing.intensity import Mask, inverse, normalise, smoothing

_REACH_MM = 8.0  # around the last round's brain, where the next one's can lie
_AT_ONCE = 1 << 18  # points


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid of the template's world.

    Attributes:
        shape: ``(X, Y, Z)``.
        affine: ``(4, 4)`` voxel-to-world matrix, RAS, mm.
        to_model: ``(4, 4)``, the template's world -> the model's world, RAS, mm.
    """

    shape: tuple[int, int, int]
    affine: Matrix
    to_model: Matrix

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Voxel size, mm."""
        return spacing_of(self.affine)


def region_of(brain: Mask, model_affine: Matrix, grid: Grid) -> Mask:
    """The voxels of a grid in and around a brain that lies on the model's grid."""
    spacing = spacing_of(model_affine)
    near = ndimage.distance_transform_edt(np.pad(~brain, 1, constant_values=True), sampling=spacing)[1:-1, 1:-1, 1:-1]
    to_voxels = inverse(model_affine) @ grid.to_model @ grid.affine
    at = transform_by(to_voxels, np.indices(grid.shape, dtype=np.float64))
    index = np.rint(at).astype(np.intp)
    last = np.array(brain.shape).reshape(3, 1, 1, 1) - 1
    within = ((index >= 0) & (index <= last)).all(axis=0)
    region: Mask = within & (near <= _REACH_MM)[tuple(np.clip(index, 0, last))]
    return region


def grid_points(grid: Grid, region: Mask) -> NDArray[np.float64]:
    """``(N, 3)``: the voxels of a region in the model's world, RAS, mm."""
    return transform_by(grid.to_model @ grid.affine, np.argwhere(region).T.astype(np.float64)).T


def sample_scan(
    scan: Scan, brain: Mask, prealign: Matrix, transforms: Sequence[Transform], grid: Grid, points: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A scan's intensities at points of the model's world that maps lead into it.

    Its brain's robust range becomes 0..255, then its median 128. The scan is smoothed first where the grid is coarser;
    scan and brain are sampled separately and divided, so that the background does not darken the brain's rim.

    Args:
        scan: the scan.
        brain: bool, ``(X, Y, Z)`` of the scan.
        prealign: ``(4, 4)``, the scan's world -> the model's world, RAS, mm.
        transforms: the model's world -> the scan's world; the first is applied first.
        grid: that the points lie on.
        points: ``(N, 3)``, RAS, mm, of the model's world.

    Returns:
        ``(N,)`` float32, NaN where the scan shows no brain; and ``(N, 3)``: where each point lies in the scan, as its
        alignment brings that to the model's world.
    """
    values = normalise(scan.data, brain, str(scan.path))
    values *= MEDIAN / max(float(np.median(values[brain])), 1.0)
    to_image = inverse(scan.affine) @ inverse(prealign) @ grid.to_model @ grid.affine
    sigma = smoothing(to_image)
    channels = np.stack([np.where(brain, values, np.float32(0)), brain.astype(np.float32)])
    for channel in channels:
        channel[...] = ndimage.gaussian_filter(channel, sigma, mode="nearest")
    to_voxels = inverse(scan.affine)
    sampled, places = np.full(len(points), np.nan, np.float32), np.empty_like(points)
    for start in range(0, len(points), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        world: Points = map_points(transforms, points[part]).T
        places[part] = transform_by(prealign, world).T
        at = transform_by(to_voxels, world)
        looked_up = np.where(inside(at, scan.shape), look_up(channels, at), np.float32(0))
        shown = looked_up[1] >= 0.5
        sampled[part] = np.divide(looked_up[0], looked_up[1], out=np.full(len(shown), np.nan, np.float32), where=shown)
    return sampled, places
