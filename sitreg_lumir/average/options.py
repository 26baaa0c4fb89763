"""The options of a template, in one place for `build_template` and the command line."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from sitreg_lumir.errors import InputError
from sitreg_lumir.preprocessing.strip import HeadStrip, check_strip
from sitreg_lumir.registration.scan import ALIGN, Align

Average: TypeAlias = Literal["trimmed", "mean", "median"]
AVERAGES: tuple[Average, ...] = get_args(Average)
SAVED = ("maps", "warped")
"""What can be written of each scan: its exact map to the template, and the scan on the template's grid."""
_MOST_ROUNDS = 20
_SPACINGS = (0.5, 4.0)  # mm


@dataclass(frozen=True)
class TemplateOptions:
    """The keyword arguments of :func:`~sitreg_lumir.average.build.build_template`, which describes them.

    Raises:
        InputError: an option is out of range or unknown.
    """

    rounds: int = 3
    tolerance_mm: float = 0.1
    average: Average = "trimmed"
    sharpen: float = 0.5
    spacing_mm: float | None = None
    refine: int = 0
    align: Align = "each"
    header: str | None = None
    assume_orientation: str | None = None
    strip: HeadStrip | None = None
    save: str | Sequence[str] = "maps"

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= _MOST_ROUNDS:
            raise InputError(f"`rounds` must be 1 to {_MOST_ROUNDS}, got {self.rounds}")
        if not 0 <= self.tolerance_mm < 100:
            raise InputError(f"`tolerance_mm` must be 0 or more and below 100 mm, got {self.tolerance_mm:g}")
        if self.average not in AVERAGES:
            raise InputError(f"`average` must be trimmed, mean or median, got {self.average}")
        if not 0 <= self.sharpen <= 2:
            raise InputError(f"`sharpen` must be 0 (off) to 2, got {self.sharpen:g}")
        if self.spacing_mm is not None and not _SPACINGS[0] <= self.spacing_mm <= _SPACINGS[1]:
            raise InputError(f"`spacing_mm` must be {_SPACINGS[0]:g} to {_SPACINGS[1]:g} mm, got {self.spacing_mm:g}")
        if self.refine < 0:
            raise InputError(f"`refine` must be 0 or more steps, got {self.refine}")
        if self.align not in ALIGN:
            raise InputError(f"`align` must be auto, each or none, got {self.align}")
        check_strip(self.strip)
        _ = self.saved

    @property
    def saved(self) -> frozenset[str]:
        """What is written of each scan: names of :data:`SAVED`."""
        texts = [self.save] if isinstance(self.save, str) else list(self.save)
        names = {name.strip() for text in texts for name in text.split(",") if name.strip()}
        known = (*SAVED, "all", "none")
        unknown = next((name for name in sorted(names) if name not in known), None)
        if unknown is not None or not names or ("none" in names and len(names) > 1):
            problem = f" {unknown}: no such output" if unknown is not None else ": names no output, or none with others"
            raise InputError(f"`save`{problem}; choose from {', '.join(known)}")
        return frozenset(SAVED) if "all" in names else frozenset(names - {"none"})

    @property
    def of_results(self) -> dict[str, Any]:
        """Plain values, as a provenance holds them."""
        return {**asdict(self), "save": sorted(self.saved)}
