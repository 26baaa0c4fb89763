"""Tells a skull-stripped brain from a whole head by its size and shape."""

from functools import lru_cache

import numpy as np
from scipy import ndimage

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.orientation import spacing_of
from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.prepare.conform import Mask, Matrix
from sitreg_lumir.prepare.frame import Frame

LARGEST_LITRES = 2.6
"""More is no brain: adults have up to 2.1 within the skull, heads 2.9 and more, even with the face and neck cut off."""
OUTSIDE_MM = 6.0
"""Distance from the template's brain beyond which a stripped brain shows next to nothing once it is aligned."""
OUTSIDE_SHARE = 0.03
"""Of a scan's foreground. Stripped brains have up to 0.005 there, also cropped ones or ones with a 12 mm rim; heads,
even a child's, cut below the brain or without a face, 0.11 and more."""


def check_stripped(mask: Mask, affine: Matrix, prealign: Matrix | None, frame: Frame, name: str) -> None:
    """Refuses a foreground that is a head's.

    Args:
        mask: bool, ``(X, Y, Z)``, the scan's foreground (``support_mask``).
        affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm.
        prealign: ``(4, 4)``, the scan's world -> the template's, RAS, mm; None before it is known: then only the size
            counts.
        frame: the template.
        name: of the image, for the error.

    Raises:
        InputError: too large, or of another shape than a brain.
    """
    litres = mask.sum() * spacing_of(affine).prod() / 1e6
    reason = f"{litres:.1f} litres" if litres > LARGEST_LITRES else ""
    if prealign is not None and not reason:
        outside = outside_share(mask, affine, prealign, frame)
        reason = f"{outside:.0%} of it lies outside a brain" if outside > OUTSIDE_SHARE else ""
    if reason:
        raise InputError(
            f"{name}: looks like a whole head, not a skull-stripped brain ({reason}); give the brain's mask "
            "(--fixed-mask, --moving-mask or --mask), or run `sitreg-lumir preprocess` first"
        )


def outside_share(mask: Mask, affine: Matrix, prealign: Matrix, frame: Frame) -> float:
    """Share of a scan's foreground that lies further than ``OUTSIDE_MM`` from the template's brain, 0..1."""
    near, near_affine = _near(frame)
    step = [max(1, round(3 / size)) for size in spacing_of(affine)]  # every 3 mm is enough
    thin = mask[:: step[0], :: step[1], :: step[2]]
    grid = affine @ np.diag([*step, 1.0])
    inside = resample(near, near_affine, prealign, thin.shape, grid, interpolation="nearest")
    return float((thin & ~inside).sum() / max(1, thin.sum()))


@lru_cache(maxsize=1)
def _near(frame: Frame) -> tuple[Mask, Matrix]:
    """Where the template's brain is no further than ``OUTSIDE_MM``, and the voxel-to-world matrix of that."""
    border = int(np.ceil(OUTSIDE_MM)) + 1  # voxels, the template has 1 mm
    affine = frame.affine.copy()
    affine[:3, 3] -= frame.affine[:3, :3].sum(axis=1) * border
    return ndimage.distance_transform_edt(~np.pad(frame.mask, border)) <= OUTSIDE_MM, affine
