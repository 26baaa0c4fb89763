"""What of two images is compared: MIND channels, or intensities that are carried over to the other one's contrast.

Images are ``(1, 1, X, Y, Z)`` in [0, 1], masks the same shape, fields ``(1, 3, X, Y, Z)`` in voxels.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sitreg_lumir.deform.backends.torch.images import patch_weights
from sitreg_lumir.deform.ops import warp, warp_mask
from sitreg_lumir.deform.sums import exact_sum
from sitreg_lumir.measures.losses import lncc
from sitreg_lumir.network.mind import Mind

Array = NDArray[Any]

_BINS = 32  # of each image's intensities
_TAILS = (0.001, 0.999)  # quantiles of the brain that are the first and the last bin's centres
_FEWEST = 1e-4  # share of all voxels that a bin must hold for its mean to be used
_AS_GOOD = 0.8  # share of what a curve explains that a line must explain to do
_LITTLE = 1e-9  # below any spread
_SEEN = 1e-3  # weight in a MIND patch from which on a voxel counts as seen


class Compared(NamedTuple):
    """One image as it is compared: ``(1, C, X, Y, Z)``, intensities or features, and where they count, bool."""

    values: Tensor
    mask: Tensor


def outside_lesion(image: Tensor, mask: Tensor, lesion: Tensor | None, mind: Mind | None = None) -> Compared:
    """An image, or its MIND channels, and the brain without the lesion.

    Args:
        image: left as it is.
        mask: the brain, bool or 0/1.
        lesion: bool or 0/1, or None.
        mind: with it, voxels whose patches see the lesion are left out, too.
    """
    image, mask = image.detach().clone(), mask.bool().clone()  # clones: those made for inference get no gradients
    if lesion is not None:
        lesion = lesion.bool()
        image[lesion] = 0
        reach = 0
        if mind is not None:  # the patch, and that of the neighbour it is compared with
            reach = 1 + sum(weight >= _SEEN for weight in patch_weights(mind.sigma, mind.radius)[1:])
        mask &= F.max_pool3d(lesion.float(), 2 * reach + 1, stride=1, padding=reach) == 0
    return Compared(image if mind is None else mind(image), mask)


@torch.no_grad()
def of_one_contrast(fixed: Compared, moving: Compared, disp: Tensor, disp_inv: Tensor) -> bool:
    """Whether a rising line gives the one image's intensities from the other's nearly as well as any curve does.

    Compared are the squared correlation and the larger of both correlation ratios.

    Args:
        fixed: as :func:`outside_lesion` gives it, one channel.
        moving: the same.
        disp: of the fixed grid; it need not be good.
        disp_inv: of the moving grid.
    """
    counts, _ = _joint_counts(fixed, moving, disp, disp_inv)
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    if not rows.any():
        return True  # nothing meets
    places = np.arange(_BINS)
    here, there = places - np.average(places, weights=rows), places - np.average(places, weights=columns)
    spreads = [max(rows @ here**2, _LITTLE), max(columns @ there**2, _LITTLE)]
    along = here @ counts @ there
    line = along * abs(along) / (spreads[0] * spreads[1])
    curves = (
        ((counts @ there) ** 2 / np.maximum(rows, 1)).sum() / spreads[1],
        ((here @ counts) ** 2 / np.maximum(columns, 1)).sum() / spreads[0],
    )
    return bool(line >= _AS_GOOD * max(curves))


@torch.no_grad()
def in_both_contrasts(fixed: Compared, moving: Compared, disp: Tensor, disp_inv: Tensor) -> tuple[Compared, Compared]:
    """Two images of one channel, each with two: in the fixed image's contrast and in the moving image's, in one order.

    An intensity is replaced by the mean of what the other image shows at the same places, as far as the fields are
    known. Exchanging the images exchanges the results, to the last bit.

    Args:
        fixed: as :func:`outside_lesion` gives it.
        moving: the same.
        disp: of the fixed grid.
        disp_inv: of the moving grid.

    Source: the regression of the correlation ratio: Roche et al., MICCAI 1998.
    """
    counts, scales = _joint_counts(fixed, moving, disp, disp_inv)
    as_moving = scales[0].replaced(fixed.values, _means(counts, scales[1]))
    as_fixed = scales[1].replaced(moving.values, _means(counts.T, scales[0]))
    channels = [(fixed.values, as_fixed * moving.mask), (as_moving * fixed.mask, moving.values)]
    if exact_sum(fixed.values) > exact_sum(moving.values):  # the darker first: an order that exchanging does not change
        channels.reverse()
    of_fixed, of_moving = (torch.cat(each, dim=1) for each in zip(*channels, strict=True))
    return Compared(of_fixed, fixed.mask), Compared(of_moving, moving.mask)


def channel_lncc(features_1: Tensor, features_2: Tensor, mask: Tensor, window: int) -> Tensor:
    """:func:`~sitreg_lumir.measures.losses.lncc` of two feature maps, mean over the channels.

    Args:
        features_1, features_2: ``(1, C, X, Y, Z)``.
        mask: of both, bool, ``(1, 1, X, Y, Z)``.
        window: voxels.

    Returns:
        a scalar in [-1, 0].
    """
    values = [
        lncc(one, other, mask, None, window)
        for one, other in zip(features_1.split(1, dim=1), features_2.split(1, dim=1), strict=True)
    ]
    return torch.stack(values).mean()


class _Scale(NamedTuple):
    """An image's intensities on the scale of its bins: 0 at the first one's centre, ``_BINS - 1`` at the last one's."""

    low: float
    high: float

    @classmethod
    def of(cls, image: Compared) -> "_Scale":
        inside = image.values[image.mask]
        if not inside.numel():
            return cls(0.0, 1.0)
        low, high = (float(torch.quantile(inside, tail)) for tail in _TAILS)
        return cls(low, high if high > low else low + 1.0)

    def places(self, values: Tensor) -> Tensor:
        return ((values - self.low) * ((_BINS - 1) / (self.high - self.low))).clamp(0, _BINS - 1)

    @property
    def centres(self) -> Array:
        return np.linspace(self.low, self.high, _BINS)

    def replaced(self, values: Tensor, means: Array) -> Tensor:
        """The values, by the means of the bins, linearly between their centres."""
        curve = torch.from_numpy(means).to(values)
        places = self.places(values)
        first = places.long().clamp(max=_BINS - 2)
        return torch.lerp(curve[first], curve[first + 1], places - first)


def _joint_counts(
    fixed: Compared, moving: Compared, disp: Tensor, disp_inv: Tensor
) -> tuple[Array, tuple[_Scale, _Scale]]:
    """``(bins, bins)``: how often an intensity of the fixed image, a row, meets one of the moving image, on both grids.

    Also the scales of both.
    """
    scales = _Scale.of(fixed), _Scale.of(moving)
    counts = _counts(fixed, moving, disp, *scales) + _counts(moving, fixed, disp_inv, *scales[::-1]).T
    return counts, scales


def _counts(here: Compared, there: Compared, disp: Tensor, scale: _Scale, other: _Scale) -> Array:
    both = warp_mask(there.mask, disp) & here.mask
    rows = scale.places(here.values[both]).round().long()
    columns = other.places(warp(there.values, disp)[both]).round().long()
    counts: Array = torch.bincount(rows * _BINS + columns, minlength=_BINS**2).reshape(_BINS, _BINS).cpu().numpy()
    return counts


def _means(counts: Array, other: _Scale) -> Array:
    """``(bins,)``: for each row the mean intensity of the columns, over three rows; between rows of use, linear."""
    padded = np.pad(np.ascontiguousarray(counts), ((1, 1), (0, 0)), mode="edge")  # one order of sums
    smooth = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    total = smooth.sum(axis=1)
    used = total > _FEWEST * total.sum()
    if not used.any():
        return other.centres  # nothing meets
    means: Array = np.interp(np.arange(_BINS), np.flatnonzero(used), (smooth @ other.centres)[used] / total[used])
    return means
