"""One scan of a pair: its files, and the scan with its brain and its place in the model's world."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import Matrix
from sitreg_lumir.io.bounded import recorded_checksums
from sitreg_lumir.io.itk import load_affine
from sitreg_lumir.io.read import Scan, read_image
from sitreg_lumir.io.write import plain_header
from sitreg_lumir.preprocessing.align import Alignment
from sitreg_lumir.preprocessing.intensity import Mask, support_mask
from sitreg_lumir.preprocessing.place import align_brain, read_brain_mask, read_mask
from sitreg_lumir.preprocessing.skull_check import Refusal, check_brain, refuse_head, refuse_mask
from sitreg_lumir.preprocessing.strip import HeadStrip, strip_head
from sitreg_lumir.preprocessing.template import TEMPLATE, load_template

if TYPE_CHECKING:
    from sitreg_lumir.registration.placed_scans import KeptOnDisk

MNI152 = "MNI152"
"""Names the template, wherever a scan's file is asked for."""
EXAMPLES = {"EXAMPLE-T1": "example_t1.nii.gz", "EXAMPLE-T2": "example_t2.nii.gz"}
"""Names of the scans that come with the package, and their files in :data:`EXAMPLES_FOLDER`."""
EXAMPLES_FOLDER = Path(__file__).resolve().parents[1] / "examples"
BUILT_IN = (MNI152, *EXAMPLES)
"""Names that stand for the template and for the scans that come with the package."""

Align: TypeAlias = Literal["auto", "each", "none"]
ALIGN = ("auto", "each", "none")


@dataclass(frozen=True)
class ScanFiles:
    """The files of one scan.

    Attributes:
        image: NIfTI file, or one of :data:`BUILT_IN`.
        role: ``fixed`` or ``moving``, for messages.
        mask: file of the brain's mask, on any grid of the scan's world; None for a skull-stripped scan.
        lesion: file of a mask of what has no counterpart in the other scan, or None.
        to_template: file of an ITK affine from the scan's world to the template's, used instead of an alignment.
        strip: how the brain of a whole head is told from the rest where there is no mask; None refuses heads.

    Raises:
        InputError: the template comes with files of its own.
    """

    image: str | Path
    role: str
    mask: Path | None = None
    lesion: Path | None = None
    to_template: Path | None = None
    strip: HeadStrip | None = None

    def __post_init__(self) -> None:
        if str(self.image) == MNI152 and (self.mask or self.lesion or self.to_template):
            raise InputError(f"`{self.role}` is MNI152, which has its mask and place; leave the options for it out")


@dataclass(frozen=True, eq=False)
class PlacedScan(Scan):
    """One scan, or the template, ready to be registered.

    Attributes:
        brain: bool, ``(X, Y, Z)``.
        lesion: bool, ``(X, Y, Z)``, or None.
        prealign: ``(4, 4)``, the scan's world -> the model's world, RAS, mm, as used.
        alignment: the alignment that was computed, used or not; None if there is none.
        how: a few words on where ``prealign`` comes from.
        checksum: SHA-256 of the file as it was read; None for the template.
        stripped_by: what made the brain's mask of a whole head; None where a mask or the scan itself showed it.
    """

    brain: Mask
    lesion: Mask | None
    prealign: Matrix
    alignment: Alignment | None
    how: str
    checksum: str | None
    stripped_by: str | None = None

    @property
    def name(self) -> str:
        """Name of the file without its folder, or of the template."""
        return self.path.name


def place_scan(
    files: ScanFiles,
    align: Align,
    header: str | None,
    assume_orientation: str | None,
    kept: "KeptOnDisk | None" = None,
) -> PlacedScan:
    """Reads one scan, finds its brain, and aligns it to the template if asked to.

    Args:
        files: of the scan.
        align: ``auto`` (only if it is needed), ``each`` or ``none``.
        header: ``sform`` or ``qform``: the one to use, whatever the other says.
        assume_orientation: letters such as ``RAS``, for headers that do not say where the axes point to.
        kept: what was computed of this scan before; None computes all.

    Raises:
        InputError: a file cannot be used, the scan shows a whole head, or it cannot be aligned.
    """
    if str(files.image) == MNI152:
        return _placed_template()
    built_in = EXAMPLES.get(str(files.image))
    path = EXAMPLES_FOLDER / built_in if built_in else Path(files.image)
    with recorded_checksums() as read:
        scan = read_image(path, header, assume_orientation)
    checksum = read[os.path.abspath(path)]
    template = load_template()
    refusal: Refusal
    stripped_by = None
    if files.mask is None and files.strip is not None:
        strip = partial(strip_head, scan, files.strip, template, mask=f"{files.role}_mask")
        brain, stripped_by = strip() if kept is None else kept.brain(strip)
        refusal = refuse_head
    elif files.mask is None:
        brain, refusal = support_mask(scan.data, scan.affine, str(scan.path)), refuse_head
        check_brain(scan, brain, None, template)
    else:
        brain = read_brain_mask(files.mask, scan, header, assume_orientation)
        refusal = partial(refuse_mask, mask=str(files.mask))
    lesion = None if files.lesion is None else read_mask(files.lesion, scan, header, assume_orientation)
    prealign, alignment = np.eye(4), None
    if files.to_template is not None:
        prealign, how = load_affine(files.to_template), f"by {files.to_template.name}"
    elif align == "none":
        how = "as the header places it"
    else:
        compute = partial(align_brain, scan, brain, template, refusal)
        alignment = compute() if kept is None else kept.alignment(compute)
        moved = f"{alignment.moved_mm:.1f} mm"
        if align == "each" or alignment.needed:
            prealign, how = alignment.prealign, f"aligned to MNI152, moved by {moved}{alignment.remark}"
        else:
            how = f"in the MNI152 frame already (aligning would move it by {moved}): left as it is"
    return PlacedScan(
        **vars(scan),
        brain=brain,
        lesion=lesion,
        prealign=prealign,
        alignment=alignment,
        how=how,
        checksum=checksum,
        stripped_by=stripped_by,
    )


def _placed_template() -> PlacedScan:
    template = load_template()
    return PlacedScan(
        path=Path(TEMPLATE),
        data=template.image,
        affine=template.affine,
        source="template",
        header=plain_header(template.image.shape, template.affine, np.float32),
        brain=template.mask,
        lesion=None,
        prealign=np.eye(4),
        alignment=None,
        how="the template itself",
        checksum=None,
    )
