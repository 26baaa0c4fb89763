"""The fields that instance optimisation compares images by: samples of the exact map, or those of the network's loop.

Fields are ``(1, 3, X, Y, Z)``, voxels; control points ``(1, 3, ...)``, voxels of their level. ``finest`` are the
updates that are optimised, coarsest first; those of coarser levels stay as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.deform.splines import FollowedPoints, SplineUpdates
from sitreg_lumir.deform.state import SymmetricState
from sitreg_lumir.deform.update import Maps

AROUND = 1
"""Voxels around the brains where the exact map is followed: differences between neighbours reach that far."""

Updates = Sequence[tuple[Tensor, Tensor]]


class SampledFields:
    """The fields as the network composes them: each product sampled on the grid, and interpolated.

    Args:
        updates: of all stages, coarsest first.
        kept: how many of the coarsest stages stay as they are.
        shape: ``(X, Y, Z)`` of the full-resolution grid.
        tolerance: of the inversions, voxels.
    """

    def __init__(self, updates: Updates, kept: int, shape: tuple[int, ...], tolerance: float) -> None:
        self.shape, self.tolerance, self.stages = shape, tolerance, len(updates)
        self.start = Maps()
        with torch.no_grad():
            self.start = self._composed(updates[:kept], len(updates)).maps

    def __call__(self, finest: Updates) -> tuple[Tensor, Tensor]:
        """The fields both ways, with gradients to the control points."""
        disp, disp_inv = self._composed(finest, len(finest)).fields()
        assert disp_inv is not None
        return disp, disp_inv

    def _composed(self, updates: Updates, levels: int) -> SymmetricState:
        """The state after the updates of the coarsest of ``levels`` levels."""
        state = SymmetricState(self.shape, self.tolerance)
        state.maps = self.start
        for level, update in zip(reversed(range(levels - len(updates), levels)), updates, strict=True):
            state.update(*update, 2**level)
        return state


class ExactFields:
    """The exact map both ways in and next to the brains; further out the fields stay as they are.

    Args:
        updates: of all stages, coarsest first.
        kept: how many of the coarsest stages stay as they are.
        outside: the fields both ways that hold further out.
        brains: the fixed and the moving brain, bool, ``(1, 1, X, Y, Z)``.
        tolerance: a Newton step below it ends an inversion, voxels; it leaves a far smaller error.
    """

    def __init__(
        self, updates: Updates, kept: int, outside: Sequence[Tensor], brains: Sequence[Tensor], tolerance: float
    ) -> None:
        plain = [(first.detach()[0], second.detach()[0]) for first, second in updates]
        self.outside = outside
        self.index: list[Tensor] = []
        self.points: list[FollowedPoints] = []
        width = 2 * AROUND + 1
        for brain, inverse in zip(brains, (False, True), strict=True):
            near = F.max_pool3d(brain.float(), width, stride=1, padding=AROUND)[0, 0] > 0
            x, y, z = near.shape
            at = near.nonzero().T.double().contiguous()
            self.points.append(FollowedPoints(at, plain, kept, (x, y, z), inverse=inverse, tolerance=tolerance))
            self.index.append(near.flatten().nonzero()[:, 0])

    def __call__(self, finest: Updates) -> tuple[Tensor, Tensor]:
        """The fields both ways, with gradients to the control points."""
        updates = [(first[0], second[0]) for first, second in finest]
        disp, disp_inv = (
            outside[0].flatten(1).index_copy(1, index, points(updates)).view_as(outside)
            for outside, index, points in zip(self.outside, self.index, self.points, strict=True)
        )
        return disp, disp_inv


@torch.no_grad()
def exact_samples(updates: Updates) -> tuple[Tensor, Tensor]:
    """The exact map of all stages' updates, coarsest first, sampled on the whole grid both ways."""
    x, y, z = updates[-1][0].shape[2:]
    exact = SplineUpdates([(first[0], second[0]) for first, second in updates], (x, y, z))
    device = updates[-1][0].device
    return exact.sample()[None].to(device), exact.sample(inverse=True)[None].to(device)
