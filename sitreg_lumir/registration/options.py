"""The options of a registration, in one place for `register`, its table of pairs, and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sitreg_lumir.errors import InputError
from sitreg_lumir.preprocessing.strip import HeadStrip, check_strip
from sitreg_lumir.registration.linear import TRANSFORMS, TransformKind
from sitreg_lumir.registration.optimise import SIMILARITIES
from sitreg_lumir.registration.outputs import chosen_outputs
from sitreg_lumir.registration.scan import ALIGN, Align, ScanFiles


@dataclass(frozen=True)
class RegisterOptions:
    """The keyword arguments of :func:`~sitreg_lumir.registration.register.register`, which describes them.

    Raises:
        InputError: an option is out of range or unknown, or a lesion is given without ``refine``.
    """

    fixed_mask: str | Path | None = None
    moving_mask: str | Path | None = None
    align: Align = "auto"
    initial_transform: str | Path | None = None
    fixed_to_template: str | Path | None = None
    moving_to_template: str | Path | None = None
    refine: int = 0
    refine_similarity: str = "lncc"
    refine_mm: float | None = None
    fixed_lesion: str | Path | None = None
    moving_lesion: str | Path | None = None
    header: str | None = None
    assume_orientation: str | None = None
    padding_mm: float = 0.0
    uncertainty: bool = False
    report: bool = True
    overwrite: bool = False
    save: str | Sequence[str] | None = None
    transform: TransformKind = "deformable"
    strip: HeadStrip | None = None

    def __post_init__(self) -> None:
        if self.align not in ALIGN:
            raise InputError(f"`align` must be auto, each or none, got {self.align}")
        if self.refine < 0:
            raise InputError(f"`refine` must be 0 or more steps, got {self.refine}")
        if self.refine_similarity not in SIMILARITIES:
            raise InputError(f"`refine_similarity` must be lncc or mind, got {self.refine_similarity}")
        if self.refine == 0 and (self.fixed_lesion or self.moving_lesion):
            raise InputError(
                "`fixed_lesion` and `moving_lesion` need `refine=N`, the steps that leave a lesion out; add it"
            )
        if self.refine_mm is not None and not (self.refine and self.refine_mm > 0):
            raise InputError("`refine_mm` is a voxel size in mm, above 0, and needs `refine=N`, the steps; add it")
        if not 0 <= self.padding_mm < 1000:
            raise InputError(f"`padding_mm` must be 0 or more and below 1000 mm, got {self.padding_mm:g}")

        chosen_outputs(self.save)
        check_strip(self.strip)
        if self.transform not in TRANSFORMS:
            raise InputError(f"`transform` must be deformable, affine or rigid, got {self.transform}")
        if self.transform != "deformable" and (self.refine or self.uncertainty):
            option = "refine" if self.refine else "uncertainty"
            raise InputError(f"`{option}` is for `transform=deformable`; leave one of the two out")

    def scan_files(self, role: str, image: str | Path) -> ScanFiles:
        """The files of the ``fixed`` or ``moving`` scan, whose image is ``image``."""
        values = {kind: getattr(self, f"{role}_{kind}") for kind in ("mask", "lesion", "to_template")}
        paths = {kind: None if path is None else Path(path) for kind, path in values.items()}
        return ScanFiles(image, role, **paths, strip=self.strip)
