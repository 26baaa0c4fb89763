"""Left and right exchanged: of images, of fields, and of what a network does."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from sitreg_lumir.deform.update import Maps
from sitreg_lumir.errors import InputError
from sitreg_lumir.network.memory import Economical
from sitreg_lumir.network.sitreg import Pyramids, SITReg, StageNetwork, UpdateNetwork

_MIND_CHANNELS = 6  # two per axis, of the neighbours before and behind
_TOLERANCE = 1.0  # voxels, by which a mirrored grid may lie beside itself: less than brains differ by


def left_right_axis(affine: ArrayLike, shape: Sequence[int], where: str) -> int:
    """The axis of voxels that runs between left and right, along which a reversed grid lies on itself.

    Args:
        affine: ``(4, 4)`` voxel-to-world matrix, RAS, mm; its x = 0 is taken for the brain's middle.
        shape: ``(X, Y, Z)`` of the grid.
        where: begins the message of an error.

    Raises:
        InputError: there is no such axis, or the grid's middle is over half a voxel beside x = 0.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    reflected = np.linalg.inv(matrix) @ np.diag([-1.0, 1.0, 1.0, 1.0]) @ matrix  # voxel to voxel
    corners = np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)])
    mirrored = corners @ reflected.T
    for axis in range(3):
        expected = corners.copy()
        expected[:, axis] = shape[axis] - 1 - corners[:, axis]
        if np.abs(mirrored - expected).max() <= _TOLERANCE:
            return axis
    raise InputError(
        f"{where}: mirroring needs a grid with an axis from left to right and its middle at x = 0 mm; leave it out"
    )


def mirrored_field(disp: Tensor, axis: int) -> Tensor:
    """The field between mirrored images.

    Args:
        disp: ``(B, 3, X, Y, Z)``, voxels; displacements, or control points of a spline.
        axis: 0, 1 or 2: the axis of voxels that is reversed.
    """
    signs = disp.new_ones(3, 1, 1, 1)
    signs[axis] = -1
    return disp.flip(axis + 2) * signs


class MirroredNetwork:
    """A network that sees mirrored images and whose answer is mirrored back, to be averaged with itself.

    Together with the network it makes an ensemble that does to mirrored images the mirrored thing, up to rounding and
    the tolerance of the inversions. Stages run it like any member: symmetric and inverse consistent.

    Args:
        network: whose weights it uses.
        axis: 0, 1 or 2: the axis of voxels that runs between left and right.

    Raises:
        ValueError: inputs that are neither intensities nor MIND's six channels.
    """

    def __init__(self, network: SITReg, axis: int) -> None:
        self.network, self.axis = network, axis
        self.architecture, self.inversion_tolerance = network.architecture, network.inversion_tolerance
        channels = network.architecture["in_channels"]
        if channels not in (1, _MIND_CHANNELS):
            raise ValueError(f"only intensities and MIND can be mirrored, the network has {channels} input channels")
        self.order = list(range(channels))
        if channels == _MIND_CHANNELS:  # a neighbour on the left is on the right in the mirror
            self.order[2 * axis], self.order[2 * axis + 1] = 2 * axis + 1, 2 * axis

    @property
    def levels(self) -> int:
        """Number of stages."""
        return self.network.levels

    def features(self, moving: Tensor, fixed: Tensor) -> Pyramids:
        """As :meth:`SITReg.features`, of mirrored images."""
        return self.network.features(self.view(moving), self.view(fixed))

    def control_points(self, level: int, features: Pyramids, maps: Maps) -> tuple[Tensor, Tensor]:
        """As :meth:`SITReg.control_points`: features of mirrored images, but maps and control points of the images."""
        return _mirrored_update(self.network, self.axis, level, features, maps)

    def economical(self, hold_finest: bool, recompute: bool) -> UpdateNetwork:
        """As :meth:`SITReg.economical`."""
        encoder, heads = self.network.encoder, self.network.heads
        return _MirroredUpdates(Economical(encoder, heads, hold_finest, recompute, self.view), self.axis)

    def view(self, image: Tensor) -> Tensor:
        """The mirrored image ``(B, in_channels, X, Y, Z)``."""
        size, spacing = image.shape[self.axis + 2], 2 ** (self.levels - 1)
        if size % spacing:
            raise ValueError(f"an axis of {size} voxels cannot be mirrored: it must divide by {spacing}")
        return image.flip(self.axis + 2)[:, self.order]


@dataclass(frozen=True, eq=False)
class _MirroredUpdates:
    """Updates of a network that mirrors its images itself, mirrored back."""

    network: UpdateNetwork
    axis: int

    def features(self, moving: Tensor, fixed: Tensor) -> Pyramids:
        return self.network.features(moving, fixed)

    def control_points(self, level: int, features: Pyramids, maps: Maps) -> tuple[Tensor, Tensor]:
        return _mirrored_update(self.network, self.axis, level, features, maps)


def _mirrored_update(
    network: UpdateNetwork, axis: int, level: int, features: Pyramids, maps: Maps
) -> tuple[Tensor, Tensor]:
    """The update from features of mirrored images and the images' own maps, for the images themselves."""
    if maps.left_fwd is not None and maps.right_fwd is not None:
        maps = Maps(mirrored_field(maps.left_fwd, axis), mirrored_field(maps.right_fwd, axis))
    first, second = network.control_points(level, features, maps)
    return mirrored_field(first, axis), mirrored_field(second, axis)


def with_mirrored(networks: Sequence[SITReg], affine: ArrayLike, shape: Sequence[int]) -> list[StageNetwork]:
    """The networks and their mirrored twins, an ensemble of twice as many.

    Args:
        networks: of one architecture.
        affine: ``(4, 4)`` voxel-to-world matrix of their grid, RAS, mm.
        shape: of their grid.

    Raises:
        InputError: the grid cannot be mirrored.
    """
    axis = left_right_axis(affine, shape, "`flip`")
    spacing = 2 ** (networks[0].levels - 1)
    if shape[axis] % spacing:
        raise InputError(f"`flip`: {shape[axis]} voxels from left to right must divide by {spacing}; leave it out")
    return [*networks, *(MirroredNetwork(network, axis) for network in networks)]
