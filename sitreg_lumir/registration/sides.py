"""One scan of a pair: read, masked, and placed in the model's world, by itself."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from sitreg_lumir.data.examples import EXAMPLES, FOLDER
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import Matrix
from sitreg_lumir.io.checksum import file_entry
from sitreg_lumir.io.itk import load_affine
from sitreg_lumir.io.read import Scan, read_image
from sitreg_lumir.io.write import plain_header
from sitreg_lumir.prepare.align import Alignment, align_to_frame
from sitreg_lumir.prepare.conform import Mask, mask_on_grid, support_mask
from sitreg_lumir.prepare.frame import TEMPLATE, load_frame
from sitreg_lumir.prepare.stripped import check_stripped

MNI152 = "MNI152"
"""Given instead of a file: the template."""
BUILT_IN = (MNI152, *EXAMPLES)
"""What may be given instead of files: the template, and the scans that come with the package."""

Align: TypeAlias = Literal["auto", "each", "none"]
ALIGN = ("auto", "each", "none")


@dataclass(frozen=True)
class Given:
    """What a user gives of one scan.

    Attributes:
        image: NIfTI file, or one of :data:`BUILT_IN`.
        role: ``fixed`` or ``moving``, for messages.
        mask: file of the brain's mask, on any grid of the same world; None for a skull-stripped scan.
        lesion: file of a mask of what has no counterpart in the other scan.
        to_template: file of an ITK affine that takes the scan's world to the template's, instead of an alignment.
    """

    image: str | Path
    role: str
    mask: Path | None = None
    lesion: Path | None = None
    to_template: Path | None = None


@dataclass(frozen=True, eq=False)
class Side(Scan):
    """One scan, ready to be registered; the template counts as one.

    Attributes:
        brain: bool, ``(X, Y, Z)``.
        lesion: bool, ``(X, Y, Z)``, or None.
        prealign: ``(4, 4)``, the scan's world -> the model's world, RAS, mm: what is used.
        alignment: what aligning found, used or not; None if it was not asked for.
        how: why ``prealign`` is what it is, a few words.
        checksum: SHA-256 of the file; None for the template.
    """

    brain: Mask
    lesion: Mask | None
    prealign: Matrix
    alignment: Alignment | None
    how: str
    checksum: str | None

    @property
    def name(self) -> str:
        """Of the file, without its folder, or of the template."""
        return self.path.name


def read_side(given: Given, align: Align, header: str | None, assume_orientation: str | None) -> Side:
    """Reads one scan, finds its brain and its place in the template's world.

    Args:
        given: the files.
        align: ``auto`` (only if it is needed), ``each`` or ``none``.
        header: ``sform`` or ``qform``: the one to use, whatever the other says.
        assume_orientation: letters such as ``RAS``, for headers that say nothing.

    Raises:
        InputError: a file cannot be used, the scan shows a whole head, or it finds no place in the template's world.
    """
    frame = load_frame()
    if str(given.image) == MNI152:
        plain = plain_header(frame.image.shape, frame.affine, np.float32)
        return Side(Path(TEMPLATE), frame.image, frame.affine, "template", plain, frame.mask, None, np.eye(4), None,
                    "the template itself", None)  # fmt: skip
    built_in = EXAMPLES.get(str(given.image))
    scan = read_image(FOLDER / built_in if built_in else Path(given.image), header, assume_orientation)
    name = str(scan.path)
    if given.mask is not None:
        brain = _read_mask(given.mask, scan.shape, scan.affine, header, assume_orientation)
    else:
        brain = support_mask(scan.data, scan.affine, name)
        check_stripped(brain, scan.affine, None, frame, name)
    lesion = None
    if given.lesion is not None:
        lesion = _read_mask(given.lesion, scan.shape, scan.affine, header, assume_orientation)
    alignment = None
    if given.to_template is not None:
        prealign, how = load_affine(given.to_template), f"by {given.to_template.name}"
    elif align == "none":
        prealign, how = np.eye(4), "as the header places it"
    else:
        alignment = align_to_frame(scan.data, scan.affine, brain, frame, name)
        if given.mask is None:
            check_stripped(brain, scan.affine, alignment.prealign, frame, name)
        moved = f"{alignment.moved_mm:.1f} mm"
        if align == "each" or alignment.needed:
            prealign, how = alignment.prealign, f"aligned to MNI152, moved by {moved}"
        else:
            prealign, how = np.eye(4), f"in the MNI152 frame already (aligning would move it by {moved}): left as it is"
    return Side(
        **vars(scan),
        brain=brain,
        lesion=lesion,
        prealign=prealign,
        alignment=alignment,
        how=how,
        checksum=file_entry(scan.path)["sha256"],
    )


def _read_mask(path: Path, shape: tuple[int, int, int], affine: Matrix, header: str | None, assume: str | None) -> Mask:
    mask = read_image(path, header, assume, allow_constant=True)
    return mask_on_grid(mask.data, mask.affine, shape, affine, str(path))


def meet_half_way(fixed: Matrix, moving: Matrix, initial: Matrix) -> tuple[Matrix, Matrix]:
    """Alignments that agree with a given affine between the two scans, each changed by half of what is missing.

    Exchanging the scans, and inverting the affine, exchanges the results: that keeps a registration symmetric.

    Args:
        fixed: ``(4, 4)``, fixed world -> model world, RAS, mm.
        moving: ``(4, 4)``, moving world -> model world.
        initial: ``(4, 4)``, fixed world -> moving world.

    Returns:
        both alignments, with ``inv(moving) @ fixed = initial``.

    Raises:
        InputError: the affine mirrors the scan or turns it half round, so that there is no half of it.
    """
    missing = moving @ initial @ np.linalg.inv(fixed)  # model world -> model world, the identity if they agree
    half = _square_root(missing)
    return half @ fixed, np.linalg.inv(half) @ moving


def _square_root(matrix: Matrix) -> Matrix:
    """The principal square root of an affine, by the Denman-Beavers iteration.

    Source: Denman & Beavers, The matrix sign function and computations in systems, 1976.
    """
    root, inverse = matrix.copy(), np.eye(4)
    with suppress(np.linalg.LinAlgError):
        for _ in range(50):
            root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
            if np.abs(root @ root - matrix).max() < 1e-12 * np.abs(matrix).max():
                break
    if not np.abs(root @ root - matrix).max() < 1e-6 or np.linalg.det(root[:3, :3]) <= 0:
        raise InputError(
            "--initial-transform: too far from the alignment of each scan (mirrored, or turned half round); check "
            "its direction (fixed to moving, as ANTs writes it), or use --align none"
        )
    return root
