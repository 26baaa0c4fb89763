"""Lays registrations out as a BIDS derivatives data set: names with the entities of the scans.

The files are those of the registrations' own folders, which stay as they are in ``registrations/``: hard links, or
copies where the file system has no links.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitreg_lumir import __version__
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import reason_of, writing
from sitreg_lumir.io.json_file import read_json
from sitreg_lumir.io.maps import DESCRIPTION, MAP
from sitreg_lumir.io.other_formats import without_suffix
from sitreg_lumir.registration.outputs import (
    ALIGNMENTS,
    BRAINS,
    COMPOSITES_TO,
    IMAGES_TO,
    JACOBIANS,
    LOG_JACOBIANS,
    PICTURE,
    REPORT,
    SUMMARY,
    UNCERTAINTY,
    WARPED,
)
from sitreg_lumir.registration.scan import MNI152

REGISTRATIONS = "registrations"
"""Folder of the registrations' own folders in a BIDS data set."""
DATASET_DESCRIPTION = "dataset_description.json"
MNI152_SPACE = "MNI152NLin2009aSym"
"""BIDS' name of the template's space."""
_GENERATOR = "sitreg-lumir"
_IGNORED = (f"{REGISTRATIONS}/", "*_xfm.*", "*_map.*", "*_jacobian.nii.gz", "*_uncertainty.nii.gz", "*_report.html",
            "*_picture.png", "*_summary.json")  # fmt: skip
_ENTITY = re.compile(r"([a-zA-Z0-9]+)-([a-zA-Z0-9+]+)")
_DERIVED = ("space", "from", "to", "mode")  # entities that a derivative has anew


@dataclass(frozen=True)
class BidsName:
    """A scan's name: ``sub-01_ses-2_run-1_T1w`` has three entities and the suffix ``T1w``."""

    entities: tuple[tuple[str, str], ...]
    suffix: str

    @classmethod
    def of(cls, file: str | Path) -> "BidsName | None":
        """The parts of a file's name; None if it is not named as BIDS asks for."""
        *parts, suffix = without_suffix(Path(file).name).split("_")
        matches = [_ENTITY.fullmatch(part) for part in parts]
        entities = tuple((match[1], match[2]) for match in matches if match)
        if not entities or len(entities) < len(parts) or entities[0][0] != "sub" or not suffix.isalnum():
            return None
        return cls(entities, suffix)

    @property
    def folder(self) -> Path:
        """``sub-01/ses-2/anat``."""
        levels = [f"{key}-{value}" for key, value in self.entities if key in ("sub", "ses")]
        return Path(*levels, "anat")

    def derived(self, suffix: str, **more: str) -> str:
        """The stem of a derivative's name: this name's entities, then others, then a suffix."""
        kept = [(key, value) for key, value in self.entities if key not in (*_DERIVED, *more)]
        last = [(key, value) for key, value in kept if key == "desc"]
        ordered = [*(entity for entity in kept if entity not in last), *more.items(), *last]
        return "_".join([*(f"{key}-{value}" for key, value in ordered), suffix])

    def as_space_of(self, reference: "BidsName | None") -> str:
        """Names this scan as a space, in letters and digits: what tells it from another scan, and its suffix."""
        theirs = dict(reference.entities) if reference else {}
        same_subject = theirs.get("sub") == dict(self.entities)["sub"]
        own = [f"{key}{value}" for key, value in self.entities if not (same_subject and theirs.get(key) == value)]
        return re.sub(r"[^A-Za-z0-9]", "", "".join(own)) + self.suffix


@dataclass(frozen=True)
class _Derivative:
    """A file of a registration's folder, and its place in the data set.

    Attributes:
        source: name in the registration's folder.
        target: path in the data set.
        of_pair: whether it belongs to the pair alone, not to one of its scans.
        reference: for images, what they are aligned to.
    """

    source: str
    target: Path
    of_pair: bool = True
    reference: str = ""


def check_names(pairs: Sequence[tuple[str, str, str]]) -> None:
    """Refuses pairs that BIDS has no names for.

    Args:
        pairs: name, fixed and moving image of each.

    Raises:
        InputError: neither scan of a pair is named as BIDS asks for, or two pairs would get the same names.
    """
    taken: dict[Path, tuple[str, set[str]]] = {}
    for name, fixed, moving in pairs:
        if BidsName.of(fixed) is None and BidsName.of(moving) is None:
            raise InputError(
                f"{moving}: `bids` takes names from scans, and neither this one nor {Path(fixed).name} is named as in "
                "sub-01_T1w.nii.gz; rename one, or leave `bids` out"
            )
        for derivative in _derivatives(fixed, moving):
            earlier, scans = taken.setdefault(derivative.target, (name, {fixed, moving}))
            if derivative.of_pair and scans != {fixed, moving}:  # exchanged scans give the same results
                raise InputError(
                    f"the pairs {earlier} and {name} would both be {derivative.target}; leave one out, or give them "
                    "folders of their own"
                )


def prepare_dataset(root: Path) -> None:
    """Makes the data set's folder, with its description.

    Raises:
        InputError: it holds another data set, or cannot be written.
    """
    path = root / DATASET_DESCRIPTION
    if path.exists():
        with suppress(InputError, AttributeError, TypeError):
            made_by = read_json(path, "a description", "").get("GeneratedBy", [])
            if any(generator.get("Name") == _GENERATOR for generator in made_by):
                return
        raise InputError(
            f"{path}: is of another BIDS data set; name a folder of its own for the results, such as "
            "derivatives/sitreg-lumir"
        )
    content = {
        "Name": "Registrations by sitreg-lumir",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": _GENERATOR, "Version": __version__}],
    }
    with writing(root / ".bidsignore") as temporary:
        temporary.write_text("\n".join(_IGNORED) + "\n")
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def lay_out(root: Path, folder: Path, fixed: str | Path, moving: str | Path) -> None:
    """Gives the files of a registration their places in the data set.

    Args:
        root: of the data set; see :func:`prepare_dataset`.
        folder: of the registration, whole.
        fixed: the fixed scan's file.
        moving: the moving scan's file.

    Raises:
        InputError: a file cannot be written, or the summary is damaged.
    """
    verdict = read_json(folder / SUMMARY, "a summary", "register the pair again").get("verdict")
    for derivative in _derivatives(fixed, moving):
        source, target = folder / derivative.source, root / derivative.target
        sidecar = target.with_name(without_suffix(target.name) + ".json")
        if not source.is_file():
            if derivative.of_pair:
                target.unlink(missing_ok=True)
            continue
        _link(source, target)
        if derivative.reference:
            images = Path(moving), Path(fixed)
            content: dict[str, Any] = {"SpatialReference": derivative.reference}
            content |= {"Sources": [image.name for image in images], "RegistrationVerdict": verdict}
            with writing(sidecar) as temporary:
                temporary.write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n")


def _derivatives(fixed: str | Path, moving: str | Path) -> Iterator[_Derivative]:
    """The files of a registration that have a name in BIDS, whether they are there or not."""
    names = {"fixed": BidsName.of(fixed), "moving": BidsName.of(moving)}
    files = {"fixed": fixed, "moving": moving}
    for role, partner in (("moving", "fixed"), ("fixed", "moving")):
        own = names[role]
        if own is None:
            continue
        space = _space(files[partner], own)
        image = f"{own.derived(own.suffix, space=space)}.nii.gz"
        yield _Derivative(WARPED[partner], own.folder / image, reference=Path(files[partner]).name)
        template = own.derived("xfm", **{"from": own.suffix, "to": MNI152_SPACE, "mode": "points"})
        yield _Derivative(ALIGNMENTS[role], own.folder / f"{template}.tfm", of_pair=False)
        yield _Derivative(BRAINS[role], own.folder / f"{own.derived('mask', desc='brain')}.nii.gz", of_pair=False)
    role = "fixed" if names["moving"] is None else "moving"
    own, partner = names[role], "moving" if role == "fixed" else "fixed"
    if own is None:
        return
    space = _space(files[partner], own)
    for to, ends in ((partner, (own.suffix, space)), (role, (space, own.suffix))):
        transform = own.derived("xfm", **{"from": ends[0], "to": ends[1], "mode": "image"})
        yield _Derivative(COMPOSITES_TO[to], own.folder / f"{transform}.h5")
        yield _Derivative(IMAGES_TO[to], own.folder / f"{transform}.nii.gz")
    for source, suffix, description, ending in (
        (MAP, "map", "exact", ".safetensors"),
        (DESCRIPTION, "map", "exact", ".json"),
        (SUMMARY, "summary", "registration", ".json"),
        (REPORT, "report", "registration", ".html"),
        (PICTURE, "picture", "registration", ".png"),
        (JACOBIANS[0], "jacobian", "whole", ".nii.gz"),
        (JACOBIANS[1], "jacobian", "deformation", ".nii.gz"),
        (LOG_JACOBIANS[0], "jacobian", "logWhole", ".nii.gz"),
        (LOG_JACOBIANS[1], "jacobian", "logDeformation", ".nii.gz"),
        (UNCERTAINTY, "uncertainty", "mm", ".nii.gz"),
    ):
        more = {"space": space, "desc": description}
        if role == "fixed" and suffix in ("jacobian", "uncertainty"):  # which lie on the fixed grid
            more = {"desc": f"{description}To{space}"}
        yield _Derivative(source, own.folder / (own.derived(suffix, **more) + ending))


def _space(image: str | Path, own: BidsName) -> str:
    """Names the space of a scan in letters and digits, seen from another scan."""
    if str(image) == MNI152:
        return MNI152_SPACE
    name = BidsName.of(image)
    if name is not None:
        return name.as_space_of(own)
    return re.sub(r"[^A-Za-z0-9]", "", without_suffix(Path(image).name)) or "other"


def _link(source: Path, target: Path) -> None:
    """A further name of a file, or a copy where there are no links; replaces what had the name."""
    with suppress(OSError):
        if target.samefile(source):
            return
    temporary = target.with_name(f".{secrets.token_hex(8)}.{target.name}"[:200])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links, or with too many of this file
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({reason_of(error)}); choose a folder with space and access"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
