"""Contrast transfer: the features that are compared, MIND channels, or intensities in the contrasts of both images.

Images are ``(1, 1, X, Y, Z)`` in [0, 1], masks ``(1, 1, X, Y, Z)``, fields ``(1, 3, X, Y, Z)`` in voxels.
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
from sitreg_lumir.losses import lncc
from sitreg_lumir.network.mind import Mind

Array = NDArray[Any]

_BINS = 32  # of the histogram of each image's intensities
_TAILS = (0.001, 0.999)  # quantiles of the brain's intensities at the centres of the first and the last bin
_LEAST_SHARE = 1e-4  # of all voxels that a bin must hold for its mean to be used
_LINEAR_SHARE = 0.8  # of the variance explained by a curve that a line must explain for contrasts to count as equal
_LEAST_VARIANCE = 1e-9  # bins squared, against division by 0
_PATCH_WEIGHT = 1e-3  # in a MIND patch, from which a voxel counts as part of it


class ComparedImage(NamedTuple):
    """The values of one image that are compared, ``(1, C, X, Y, Z)``, and where, bool, ``(1, 1, X, Y, Z)``."""

    values: Tensor
    mask: Tensor


def without_lesion(image: Tensor, mask: Tensor, lesion: Tensor | None, mind: Mind | None = None) -> ComparedImage:
    """Excludes a lesion from the comparison of an image.

    Args:
        image: ``(1, 1, X, Y, Z)``, in [0, 1]; not written to.
        mask: the brain, ``(1, 1, X, Y, Z)``, bool or 0/1.
        lesion: ``(1, 1, X, Y, Z)``, bool or 0/1, or None.
        mind: if given, its channels are compared, without the voxels whose patches reach into the lesion.

    Returns:
        the image or its MIND channels, and the brain without the lesion.
    """
    image, mask = image.detach().clone(), mask.bool().clone()  # clones, because inference tensors get no gradients
    if lesion is not None:
        lesion = lesion.bool()
        image[lesion] = 0
        reach = 0
        if mind is not None:  # the patch's radius, and one for the neighbour's patch
            reach = 1 + sum(weight >= _PATCH_WEIGHT for weight in patch_weights(mind.sigma, mind.radius)[1:])
        mask &= F.max_pool3d(lesion.float(), 2 * reach + 1, stride=1, padding=reach) == 0
    return ComparedImage(image if mind is None else mind(image), mask)


@torch.no_grad()
def same_contrast(fixed: ComparedImage, moving: ComparedImage, disp: Tensor, disp_inv: Tensor) -> bool:
    """Whether both images have one contrast: a rising line explains their intensities nearly as well as any curve.

    The squared correlation is compared with the larger of both correlation ratios.

    Args:
        fixed: of :func:`without_lesion`, one channel.
        moving: of :func:`without_lesion`, one channel.
        disp: ``(1, 3, X, Y, Z)``, voxels, fixed grid; a rough field is enough.
        disp_inv: ``(1, 3, X, Y, Z)``, voxels, moving grid.
    """
    counts, _ = _joint_counts(fixed, moving, disp, disp_inv)
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    if not rows.any():
        return True  # the brains do not overlap
    bins = np.arange(_BINS)
    of_fixed, of_moving = bins - np.average(bins, weights=rows), bins - np.average(bins, weights=columns)
    variances = [max(rows @ of_fixed**2, _LEAST_VARIANCE), max(columns @ of_moving**2, _LEAST_VARIANCE)]
    covariance = of_fixed @ counts @ of_moving
    line = covariance * abs(covariance) / (variances[0] * variances[1])
    curves = (
        ((counts @ of_moving) ** 2 / np.maximum(rows, 1)).sum() / variances[1],
        ((of_fixed @ counts) ** 2 / np.maximum(columns, 1)).sum() / variances[0],
    )
    return bool(line >= _LINEAR_SHARE * max(curves))


@torch.no_grad()
def transfer_contrasts(
    fixed: ComparedImage, moving: ComparedImage, disp: Tensor, disp_inv: Tensor
) -> tuple[ComparedImage, ComparedImage]:
    """Gives both images two channels, in one order: in the fixed image's contrast and in the moving image's.

    To bring an image into the contrast of the other image, each intensity is replaced by the mean intensity that the
    other image has where the fields match the two. Exchanging the images exchanges the results, to the last bit.

    Args:
        fixed: of :func:`without_lesion`, one channel.
        moving: of :func:`without_lesion`, one channel.
        disp: ``(1, 3, X, Y, Z)``, voxels, fixed grid.
        disp_inv: ``(1, 3, X, Y, Z)``, voxels, moving grid.

    Source: the regression of the correlation ratio: Roche et al., MICCAI 1998.
    """
    counts, scales = _joint_counts(fixed, moving, disp, disp_inv)
    as_moving = scales[0].mapped(fixed.values, _means(counts, scales[1]))
    as_fixed = scales[1].mapped(moving.values, _means(counts.T, scales[0]))
    channels = [(fixed.values, as_fixed * moving.mask), (as_moving * fixed.mask, moving.values)]
    if exact_sum(fixed.values) > exact_sum(
        moving.values
    ):  # the darker contrast first: an order that does not change with the images' roles
        channels.reverse()
    of_fixed, of_moving = (torch.cat(parts, dim=1) for parts in zip(*channels, strict=True))
    return ComparedImage(of_fixed, fixed.mask), ComparedImage(of_moving, moving.mask)


def channel_lncc(features_1: Tensor, features_2: Tensor, mask: Tensor, window: int) -> Tensor:
    """:func:`~sitreg_lumir.losses.lncc` of two feature maps, the mean over their channels.

    Args:
        features_1: ``(1, C, X, Y, Z)``.
        features_2: ``(1, C, X, Y, Z)``.
        mask: where they are compared, bool, ``(1, 1, X, Y, Z)``.
        window: width of the local windows, voxels.

    Returns:
        a scalar in [-1, 0].
    """
    values = [
        lncc(channel_1, channel_2, mask, None, window)
        for channel_1, channel_2 in zip(features_1.split(1, dim=1), features_2.split(1, dim=1), strict=True)
    ]
    return torch.stack(values).mean()


class _Scale(NamedTuple):
    """Intensities of an image in units of its bins: 0 at the first bin's centre, ``_BINS - 1`` at the last bin's."""

    low: float
    high: float

    @classmethod
    def of(cls, image: ComparedImage) -> "_Scale":
        inside = image.values[image.mask]
        if not inside.numel():
            return cls(0.0, 1.0)
        low, high = (float(torch.quantile(inside, tail)) for tail in _TAILS)
        return cls(low, high if high > low else low + 1.0)

    def positions(self, values: Tensor) -> Tensor:
        return ((values - self.low) * ((_BINS - 1) / (self.high - self.low))).clamp(0, _BINS - 1)

    @property
    def centres(self) -> Array:
        return np.linspace(self.low, self.high, _BINS)

    def mapped(self, values: Tensor, means: Array) -> Tensor:
        """Maps the values by a curve through the bins' centres and their means, piecewise linear."""
        curve = torch.from_numpy(means).to(values)
        positions = self.positions(values)
        first = positions.long().clamp(max=_BINS - 2)
        return torch.lerp(curve[first], curve[first + 1], positions - first)


def _joint_counts(
    fixed: ComparedImage, moving: ComparedImage, disp: Tensor, disp_inv: Tensor
) -> tuple[Array, tuple[_Scale, _Scale]]:
    """The joint histogram of fixed (rows) and moving (columns) intensities, summed over both grids, and both scales."""
    scales = _Scale.of(fixed), _Scale.of(moving)
    counts = _counts(fixed, moving, disp, *scales) + _counts(moving, fixed, disp_inv, *scales[::-1]).T
    return counts, scales


def _counts(
    fixed: ComparedImage, moving: ComparedImage, disp: Tensor, fixed_scale: _Scale, moving_scale: _Scale
) -> Array:
    both = warp_mask(moving.mask, disp) & fixed.mask
    rows = fixed_scale.positions(fixed.values[both]).round().long()
    columns = moving_scale.positions(warp(moving.values, disp)[both]).round().long()
    counts: Array = torch.bincount(rows * _BINS + columns, minlength=_BINS**2).reshape(_BINS, _BINS).cpu().numpy()
    return counts


def _means(counts: Array, columns: _Scale) -> Array:
    """``(bins,)``: for each row the columns' mean intensity, smoothed over three rows; linear over sparse rows."""
    ordered = np.ascontiguousarray(counts)  # so that sums have one order
    padded = np.pad(ordered, ((1, 1), (0, 0)), mode="edge")
    smooth = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    total = smooth.sum(axis=1)
    used = total > _LEAST_SHARE * total.sum()
    if not used.any():
        return columns.centres  # the brains do not overlap
    means: Array = np.interp(np.arange(_BINS), np.flatnonzero(used), (smooth @ columns.centres)[used] / total[used])
    return means
