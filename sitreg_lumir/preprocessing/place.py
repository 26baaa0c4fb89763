"""Places a scan: brings its brain's mask to its grid, and aligns it to the template by a brain that is checked.

`register` and `preprocess` share these steps; :func:`~sitreg_lumir.preprocessing.intensity.conform` is the next one.
"""

from pathlib import Path

from sitreg_lumir.io.read import Scan, read_image
from sitreg_lumir.preprocessing.align import Alignment, align_to_template
from sitreg_lumir.preprocessing.brain_mask import check_mask, inside_of, refuse_inverted
from sitreg_lumir.preprocessing.intensity import Mask, mask_on_grid
from sitreg_lumir.preprocessing.skull_check import Refusal, check_brain
from sitreg_lumir.preprocessing.template import Template


def read_mask(path: Path, scan: Scan, header: str | None, assume_orientation: str | None) -> Mask:
    """Reads any mask, of a lesion, say, and brings it to a scan's grid.

    Args:
        path: of a volume on any grid of the scan's world; see :func:`~.brain_mask.inside_of` for its values.
        scan: that the mask belongs to.
        header: ``sform`` or ``qform``: the one to use, whatever the other says.
        assume_orientation: letters such as ``RAS``, for headers that do not say where the axes point to.

    Returns:
        bool, ``(X, Y, Z)`` of the scan.

    Raises:
        InputError: the file cannot be used, is no mask, or is empty on the scan's grid.
    """
    return _read_mask(path, scan, header, assume_orientation, of_brain=False)


def read_brain_mask(path: Path, scan: Scan, header: str | None, assume_orientation: str | None) -> Mask:
    """Reads the mask of a scan's brain as :func:`read_mask` does, and checks that it can be that.

    Raises:
        InputError: as ``read_mask``; or the mask is inverted, too large, too small, or cuts through tissue.
    """
    brain = _read_mask(path, scan, header, assume_orientation, of_brain=True)
    check_mask(scan, brain, str(path))
    return brain


def _read_mask(path: Path, scan: Scan, header: str | None, assume_orientation: str | None, *, of_brain: bool) -> Mask:
    mask = read_image(path, header, assume_orientation, allow_constant=True)
    inside = inside_of(mask.data, str(path))
    if of_brain:
        refuse_inverted(inside, mask.affine, str(path))
    return mask_on_grid(inside, mask.affine, scan.shape, scan.affine, str(path))


def align_brain(scan: Scan, brain: Mask, template: Template, refusal: Refusal | None) -> Alignment:
    """Aligns a scan to the template by its brain.

    Args:
        scan: any contrast.
        brain: bool, ``(X, Y, Z)`` of the scan.
        template: the MNI152 template.
        refusal: makes the error for a mask that shows more than a brain; None for a mask that is not checked.

    Raises:
        InputError: the mask shows more than a brain, or no plausible affine was found.
    """
    alignment = align_to_template(scan.data, scan.affine, brain, template, str(scan.path))
    if refusal is not None:
        check_brain(scan, brain, alignment.prealign, template, refusal)
    return alignment
