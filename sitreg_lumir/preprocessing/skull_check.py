"""Distinguishes a skull-stripped brain from a whole head by its size and shape."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from scipy import ndimage

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.orientation import spacing_of
from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.io.read import Scan
from sitreg_lumir.preprocessing.intensity import Mask, Matrix
from sitreg_lumir.preprocessing.template import Template, computed_once

Refusal: TypeAlias = Callable[[Scan, str], InputError]
"""Makes the error for a scan whose mask shows more than a brain, from the reason."""

LARGEST_LITRES = 2.6
"""A larger foreground is no brain: adults have up to 2.1 litres within the skull, heads 2.9 and more, even without face
and neck."""
_LARGEST_HEAD_LITRES = 20.0  # a head with neck and shoulders has less: a larger foreground has other units
OUTSIDE_MM = 6.0
"""Distance from the template's brain, mm, beyond which an aligned, skull-stripped brain shows next to nothing."""
OUTSIDE_SHARE = 0.03
"""Largest share of a brain's voxels that lies beyond that distance. Stripped brains have up to 0.005 there, also
cropped ones or ones with a 12 mm rim; heads, even a child's, cut below the brain or without a face, 0.11 and more."""


def refuse_head(scan: Scan, reason: str) -> InputError:
    """The error for a scan whose foreground is a whole head."""
    return InputError(
        f"{scan.path}: looks like a whole head, not a skull-stripped brain ({reason}); give the brain's mask "
        "(`fixed_mask` or `moving_mask`), or add `strip=deepbet`"
    )


def refuse_mask(scan: Scan, reason: str, *, mask: str) -> InputError:
    """The error for the mask of a scan that shows more than a brain."""
    return InputError(f"{mask}: is no mask of the brain alone of {scan.path.name} ({reason}); give such a mask")


def check_brain(
    scan: Scan, brain: Mask, prealign: Matrix | None, template: Template, refusal: Refusal = refuse_head
) -> None:
    """Refuses a mask that shows more than a brain.

    Args:
        scan: that the mask belongs to.
        brain: bool, ``(X, Y, Z)`` of the scan.
        prealign: ``(4, 4)``, the scan's world -> the template's world, RAS, mm; None before it is known: then only
            the size is checked.
        template: the MNI152 template.
        refusal: makes the error.

    Raises:
        InputError: the mask is too large, or has another shape than a brain.
    """
    litres = brain.sum() * scan.spacing.prod() / 1e6
    if litres > _LARGEST_HEAD_LITRES:
        spacing = " x ".join(f"{size:g}" for size in scan.spacing)
        raise InputError(
            f"{scan.path}: {litres:.0f} litres are too many for a head; correct the voxel size in the header "
            f"({spacing} mm)"
        )
    if litres > LARGEST_LITRES:
        raise refusal(scan, f"{litres:.1f} litres")
    outside = 0.0 if prealign is None else outside_share(brain, scan.affine, prealign, template)
    if outside > OUTSIDE_SHARE:
        raise refusal(scan, f"{outside:.0%} of it lies outside a brain")


def outside_share(mask: Mask, affine: Matrix, prealign: Matrix, template: Template) -> float:
    """Share of a scan's foreground that lies further than ``OUTSIDE_MM`` from the template's brain, 0..1."""
    neighbourhood, its_affine = _neighbourhood(template)
    step = [max(1, round(3 / size)) for size in spacing_of(affine)]  # a sample every 3 mm
    thin = mask[:: step[0], :: step[1], :: step[2]]
    grid = affine @ np.diag([*step, 1.0])
    inside = resample(neighbourhood, its_affine, prealign, thin.shape, grid, interpolation="nearest")
    return float((thin & ~inside).sum() / max(1, thin.sum()))


@computed_once
def _neighbourhood(template: Template) -> tuple[Mask, Matrix]:
    """The voxels within ``OUTSIDE_MM`` of the template's brain, and their ``(4, 4)`` voxel-to-world matrix."""
    border = int(np.ceil(OUTSIDE_MM)) + 1  # voxels of 1 mm
    affine = template.affine.copy()
    affine[:3, 3] -= template.affine[:3, :3].sum(axis=1) * border
    return ndimage.distance_transform_edt(~np.pad(template.mask, border)) <= OUTSIDE_MM, affine
