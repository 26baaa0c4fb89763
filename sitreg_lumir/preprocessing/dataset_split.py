"""Which subjects of a data set are validated on, and the JSON that lists its volumes and pairs."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sitreg_lumir import __version__
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing

_SPLIT = 4  # the first word of the seed sequence, which tells this draw from those of training
_USUAL_SHARE = 0.1  # of the subjects that are validated on unless a number is given
_USUAL_LEAST, _USUAL_MOST = 2, 12
_LEAST_TRAINING = 2  # subjects


class ListedVolume(NamedTuple):
    """A volume of a data set: its path in the folder, who it shows, and ``training`` or ``validation``."""

    image: str
    subject: str
    split: str


def draw_validation(subjects: Sequence[str], wanted: int | None, seed: int, source: str) -> set[str]:
    """Draws the subjects that are validated on.

    A subject is drawn by a number of its own, which depends on the seed and its name: whoever is added to a data set
    takes the place of one subject at most.

    Args:
        subjects: all of them, each once.
        wanted: how many; None for a tenth of them, 2 to 12.
        seed: of the draw.
        source: what errors name.

    Raises:
        InputError: there are too few subjects.
    """
    count = wanted
    if count is None:
        usual = min(_USUAL_MOST, max(_USUAL_LEAST, round(_USUAL_SHARE * len(subjects))))
        count = usual if len(subjects) >= usual + _LEAST_TRAINING else 0
    if count == 1 or (count and len(subjects) - count < _LEAST_TRAINING):
        raise InputError(
            f"{source}: `validation` {count} of {len(subjects)} subjects: a pair needs 2 of them, and "
            f"{_LEAST_TRAINING} have to be left for training; 0 validates on none"
        )
    return set(_in_order(subjects, seed)[:count])


def write_listing(path: Path, volumes: Sequence[ListedVolume], shape: tuple[int, int, int], seed: int) -> int:
    """Writes the dataset JSON: all volumes that are trained on, and the pairs that are validated on.

    The first scan of each validation subject is registered onto that of the next subject, in the order of the draw.

    Args:
        path: of the JSON.
        volumes: that are there.
        shape: ``(X, Y, Z)`` of their grid.
        seed: of the draw.

    Returns:
        the number of pairs.
    """
    firsts: dict[str, str] = {}
    for volume in volumes:
        if volume.split == "validation":
            firsts.setdefault(volume.subject, volume.image)
    ring = _in_order([*firsts], seed)
    pairs = [
        {"fixed": firsts[fixed], "moving": firsts[moving]}
        for fixed, moving in zip(ring[1:] + ring[:1], ring, strict=True)
        if fixed != moving
    ]
    training = [{"image": volume.image, "subject": volume.subject} for volume in volumes if volume.split == "training"]
    content = {
        "name": path.absolute().parent.name,
        "description": f"T1 scans prepared by sitreg-lumir {__version__}; validation subjects drawn with seed {seed}",
        "tensorImageShape": {"0": list(shape)},
        "modality": {"0": "T1w"},
        "numTraining": len(training),
        "training": training,
        "validation": pairs,
    }
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return len(pairs)


def _in_order(subjects: Sequence[str], seed: int) -> list[str]:
    """The subjects in the order in which a seed draws them."""
    return sorted(subjects, key=lambda subject: (_number(subject, seed), subject))


def _number(subject: str, seed: int) -> int:
    """The number, uniform over 64 bits, that a seed draws for a subject."""
    digest = hashlib.sha256(subject.encode("utf-8", "surrogateescape")).digest()[:8]
    sequence = np.random.SeedSequence((_SPLIT, seed, int.from_bytes(digest, "big")))
    return int(sequence.generate_state(1, np.uint64)[0])
