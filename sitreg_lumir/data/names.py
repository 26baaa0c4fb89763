"""What the names of files that are not LUMIR's say: who is shown, in which scan, in which contrast."""

import re
from pathlib import Path
from typing import NamedTuple

from sitreg_lumir.io.other_formats import without_suffix

_SUBJECT = re.compile(r"sub-([A-Za-z0-9]+)")
_ENTITY = re.compile(r"([A-Za-z0-9]+)-([A-Za-z0-9+]+)")
_CODES = {"T1w": "0000", "T2w": "0001"}


class NameParts(NamedTuple):
    """Parts of a name.

    Attributes:
        subject: names the image, without underscores; of BIDS files the subject and other entities, of others all of
            the name, with its folders below that of the images.
        modality: LUMIR's code for T1 and T2, which is also that of files that say nothing; of BIDS files of other
            contrasts their suffix.
        person: who is shown, of BIDS files; empty where names do not say it.
    """

    subject: str
    modality: str
    person: str


def parts_of(path: Path) -> NameParts:
    """Reads the name of an image.

    Args:
        path: from the data set's folder.

    Examples:
        >>> parts_of(Path("sub-01/ses-2/anat/sub-01_ses-2_run-1_T1w.nii.gz"))
        NameParts(subject='01-ses2-run1', modality='0000', person='01')
        >>> parts_of(Path("images/anna_t1.nii.gz"))
        NameParts(subject='anna-t1', modality='0000', person='')
    """
    stem = without_suffix(path.name)
    parts = stem.split("_")
    named = _SUBJECT.fullmatch(parts[0])
    if named:
        entities = [match for part in parts[1:] if (match := _ENTITY.fullmatch(part))]
        own = "-".join([named[1], *(f"{entity[1]}{entity[2]}" for entity in entities)])
        suffix = parts[-1] if len(parts) > 1 and "-" not in parts[-1] else "T1w"
        return NameParts(own, _CODES.get(suffix, suffix), named[1])
    folders = [part for part in path.parts[:-1] if not part.startswith("images")]
    return NameParts(re.sub(r"[\s_]+", "-", "-".join([*folders, stem])), _CODES["T1w"], "")
