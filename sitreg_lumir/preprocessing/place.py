"""Places a scan: finds its brain, checks it, aligns it to the template, and samples it on a model's grid.

`register` and `preprocess` share these steps.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.files.scans import Scan, read_image
from sitreg_lumir.preprocessing.align import Alignment, align_to_template
from sitreg_lumir.preprocessing.intensity import Mask, Matrix, conform, mask_on_grid, support_mask
from sitreg_lumir.preprocessing.skull_check import why_no_brain
from sitreg_lumir.preprocessing.template import Template

Refusal: TypeAlias = Callable[[Scan, str], InputError]
"""Makes the error for a scan whose mask shows more than a brain, from the reason."""


def refuse_head(scan: Scan, reason: str) -> InputError:
    """The error for a scan whose foreground is a whole head."""
    return InputError(
        f"{scan.path}: looks like a whole head, not a skull-stripped brain ({reason}); give the brain's mask "
        "(`fixed_mask` or `moving_mask`), or run `sitreg-lumir preprocess` first"
    )


def read_mask(path: Path, scan: Scan, header: str | None, assume_orientation: str | None) -> Mask:
    """Reads a mask and brings it to a scan's grid.

    Args:
        path: NIfTI file, above 0 inside, on any grid of the scan's world.
        scan: that the mask belongs to.
        header: ``sform`` or ``qform``: the one to use, whatever the other says.
        assume_orientation: letters such as ``RAS``, for headers that do not say where the axes point to.

    Returns:
        bool, ``(X, Y, Z)`` of the scan.

    Raises:
        InputError: the file cannot be used, or is empty on the scan's grid.
    """
    mask = read_image(path, header, assume_orientation, allow_constant=True)
    return mask_on_grid(mask.data, mask.affine, scan.shape, scan.affine, str(path))


def foreground(scan: Scan) -> Mask:
    """The brain of a skull-stripped scan, bool, ``(X, Y, Z)``.

    Raises:
        InputError: the scan shows nothing but background.
    """
    return support_mask(scan.data, scan.affine, str(scan.path))


def check_brain(scan: Scan, brain: Mask, prealign: Matrix | None, template: Template, refusal: Refusal) -> None:
    """Refuses a mask that shows more than a brain.

    Args:
        scan: that the mask belongs to.
        brain: bool, ``(X, Y, Z)``.
        prealign: ``(4, 4)``, the scan's world -> the template's world, RAS, mm; None before it is known: then only
            the size is checked.
        template: the MNI152 template.
        refusal: makes the error.

    Raises:
        InputError: the mask is too large, or has another shape than a brain.
    """
    reason = why_no_brain(brain, scan.affine, prealign, template)
    if reason:
        raise refusal(scan, reason)


def align_brain(scan: Scan, brain: Mask, template: Template, refusal: Refusal | None) -> Alignment:
    """Aligns a scan to the template by its brain.

    Args:
        scan: any contrast.
        brain: bool, ``(X, Y, Z)``.
        template: the MNI152 template.
        refusal: makes the error for a mask that shows more than a brain; None for a mask that is not checked.

    Raises:
        InputError: the mask shows more than a brain, or no plausible affine was found.
    """
    alignment = align_to_template(scan.data, scan.affine, brain, template, str(scan.path))
    if refusal is not None:
        check_brain(scan, brain, alignment.prealign, template, refusal)
    return alignment


def on_grid(
    scan: Scan, brain: Mask, prealign: Matrix, shape: Sequence[int], affine: Matrix
) -> tuple[NDArray[np.float32], Mask]:
    """Samples a placed scan on a model's grid, with normalised intensities.

    Args:
        scan: any contrast.
        brain: bool, ``(X, Y, Z)``.
        prealign: ``(4, 4)``, the scan's world -> the model's world, RAS, mm.
        shape: ``(X, Y, Z)`` of the model's grid.
        affine: ``(4, 4)`` voxel-to-world matrix of the model's grid, RAS, mm.

    Returns:
        float32 0..255, ``shape``, exactly 0 outside the brain; and the brain, bool, ``shape``.

    Raises:
        InputError: the scan is constant in the brain, or none of the brain lies in the model's grid.
    """
    return conform(scan.data, scan.affine, brain, prealign, shape, affine, str(scan.path))
