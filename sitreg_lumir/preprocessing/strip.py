"""Finds the brain in a scan of a whole head: by deepbet, or as the template's brain."""

from typing import Literal, TypeAlias, get_args

import nibabel
import numpy as np

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.io.read import Scan
from sitreg_lumir.preprocessing.align import Alignment, align_to_template
from sitreg_lumir.preprocessing.intensity import Mask, support_mask
from sitreg_lumir.preprocessing.skull_check import LARGEST_LITRES, OUTSIDE_SHARE, outside_share
from sitreg_lumir.preprocessing.template import Template

HeadStrip: TypeAlias = Literal["deepbet", "template"]
HEAD_STRIPS: tuple[HeadStrip, ...] = get_args(HeadStrip)

_INSTALL = "pip install 'sitreg-lumir[strip]'"


def check_strip(method: str | None) -> None:
    """Refuses a way of stripping heads that there is not; None is for scans that show brains alone."""
    if method not in (None, *HEAD_STRIPS):
        raise InputError(f"`strip` must be deepbet or template, got {method}")


def strip_head(scan: Scan, method: HeadStrip, template: Template, *, mask: str) -> tuple[Mask, str | None]:
    """The brain of a scan that may show a whole head.

    Args:
        scan: T1 for ``deepbet``, any contrast for ``template``.
        method: ``deepbet``; or ``template``, whose brain, moved by an affine, is some millimetres off.
        template: the MNI152 template.
        mask: the argument that takes a mask instead, for errors.

    Returns:
        bool, ``(X, Y, Z)``; and the method, or None for a scan that shows the brain alone already.

    Raises:
        InputError: there is no brain, or deepbet is not installed.
    """
    shown = support_mask(scan.data, scan.affine, str(scan.path))
    if shown.sum() * scan.spacing.prod() / 1e6 <= LARGEST_LITRES:  # a brain, or a head that is cut
        prealign = align_to_template(scan.data, scan.affine, shown, template, str(scan.path)).prealign
        if outside_share(shown, scan.affine, prealign, template) <= OUTSIDE_SHARE:
            return shown, None
    if method == "deepbet":
        return deepbet_mask(scan, f"or give `{mask}`, or `strip=template`"), method
    return template_mask(scan, template)[0], method


def template_mask(scan: Scan, template: Template) -> tuple[Mask, Alignment]:
    """The template's brain on the grid of a head scan, and the alignment that brings it there."""
    alignment = align_to_template(scan.data, scan.affine, None, template, str(scan.path))
    share = resample(template.mask.astype(np.float32), template.affine, alignment.prealign, scan.shape, scan.affine)
    return share >= 0.5, alignment


def deepbet_mask(scan: Scan, remedy: str) -> Mask:
    """The brain of a T1 scan, bool, on its grid, by the network deepbet.

    Args:
        scan: of a head.
        remedy: what errors say to do instead.

    Raises:
        InputError: deepbet is not installed, or finds no brain.

    Source: Fisch et al., deepbet: fast brain extraction of T1-weighted MRI using convolutional neural networks,
    Comput. Biol. Med. 2024.
    """
    try:
        from deepbet import BrainExtraction
    except ImportError as error:
        raise InputError(f"{scan.path}: skull stripping needs deepbet ({error}): {_INSTALL}; {remedy}") from None
    image = nibabel.Nifti1Image(scan.data.astype(np.float32), scan.affine)
    try:
        _, mask, _ = BrainExtraction(no_gpu=True).run(image)  # some ten seconds on a CPU
    except (AssertionError, ValueError) as error:  # deepbet saw no foreground, or several pieces
        reason = " ".join(str(error).split())
        raise InputError(f"{scan.path}: deepbet found no brain ({reason}); it knows T1 only; {remedy}") from None
    brain = np.asarray(mask.dataobj) > 0
    if not brain.any():
        raise InputError(f"{scan.path}: deepbet found no brain; it knows T1 only; {remedy}")
    return np.asarray(brain, dtype=np.bool_)
