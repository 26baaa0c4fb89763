"""The images of a data set, and its pairs: their names, and what lies beside them."""

from pathlib import Path
from typing import NamedTuple

from sitreg_lumir.data.groups import Group


class Image(NamedTuple):
    """One image file, ``LUMIRMRI_<subject>_<modality>.nii.gz`` or of any other name.

    A named tuple, since Lightning refuses frozen dataclasses in a batch.

    Attributes:
        path: of the file.
        subject: names the image in fields' names; of files that are not named as LUMIR's, by :func:`~.names.parts_of`.
        modality: LUMIR's code, such as ``0000``, or another contrast's name.
        person: who is shown, where the JSON or BIDS entities say it; empty where ``subject`` does.
    """

    path: Path
    subject: str
    modality: str
    person: str = ""

    @property
    def name(self) -> str:
        """For example ``0100_0000``."""
        return f"{self.subject}_{self.modality}"

    @property
    def who(self) -> str:
        """Who is shown; training pairs are of different people."""
        return self.person or self.subject

    @property
    def labels(self) -> Path | None:
        """Its label map in ``labelsXx`` beside ``imagesXx``, if that file exists."""
        return self._beside("labels")

    @property
    def landmarks(self) -> Path | None:
        """Its landmark volume in ``landmarksXx`` beside ``imagesXx``, if that file exists."""
        return self._beside("landmarks")

    def _beside(self, kind: str) -> Path | None:
        folder = self.path.parent
        if not folder.name.startswith("images"):
            return None
        path = folder.with_name(folder.name.replace("images", kind, 1)) / self.path.name
        return path if path.is_file() else None


class Pair(NamedTuple):
    """A fixed and a moving image.

    Attributes:
        fixed: the image on whose grid fields live.
        moving: the other one.
        contrasts: of both, fixed first, for example ``T1-T2``.
        listed: what the challenge's lists or the dataset JSON say of the pair; None if they say nothing.
    """

    fixed: Image
    moving: Image
    contrasts: str
    listed: Group | None = None

    @property
    def named_group(self) -> str:
        """The group that a list or the dataset JSON puts the pair in, for example ``in-domain``; empty if none does."""
        return self.listed.name if self.listed else ""

    @property
    def group(self) -> str:
        """What the pair is counted under: its group, or its contrasts if it has none."""
        return self.named_group or self.contrasts

    @property
    def metrics(self) -> tuple[str, ...] | None:
        """Those of ``dsc``, ``hd95``, ``tre``, ``ndv`` that are scored; None: all that its files allow."""
        return self.listed.metrics if self.listed else None

    def labels_to_score(self, own: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """The labels for Dice and HD95: the data set's ``own``, else those of the pair's list; None: those found."""
        return own if own is not None or self.listed is None else self.listed.labels

    @property
    def name(self) -> str:
        """LUMIR's name of the pair, ``<fixed>_<moving>``, for example ``0100_0101``."""
        return f"{self.fixed.subject}_{self.moving.subject}"

    @property
    def long_name(self) -> str:
        """The name with modalities, for example ``0100_0000_0101_0001``."""
        return f"{self.fixed.name}_{self.moving.name}"
