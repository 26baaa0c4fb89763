"""The scans of a template: their names, each placed in the model's world, and what cannot be averaged."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sitreg_lumir.average.options import TemplateOptions
from sitreg_lumir.average.work import Arrays, WorkFolder, digest_of
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.resampling import resample
from sitreg_lumir.geometry.transforms import Matrix
from sitreg_lumir.io.checksum import file_entry
from sitreg_lumir.io.other_formats import without_suffix
from sitreg_lumir.io.read import Scan, read_image
from sitreg_lumir.preprocessing.intensity import Mask, conform
from sitreg_lumir.preprocessing.template import load_template
from sitreg_lumir.registration.model import Model
from sitreg_lumir.registration.scan import BUILT_IN, EXAMPLES, EXAMPLES_FOLDER, MNI152, ScanFiles, place_scan

_SMOOTH_MM = 4.0  # standard deviation, for coarse contrasts
_DEEP_MM = 8.0  # below the brain's surface, where its outline no longer counts
# Correlation with MNI152, a T1, so smoothed: 23 aligned T1 scans had 0.30 to 0.48 and three of patients 0.35 to 0.59,
# their T2 scans -0.24 to -0.49, their FLAIR 0.10 to 0.29.
_CONTRAST = 0.15


@dataclass(frozen=True, eq=False)
class Subject:
    """One scan of a template.

    Attributes:
        name: of its outputs, different for all scans.
        files: of the scan.
        entries: name and SHA-256 of ``image`` and, if there is one, ``mask``.
        key: all that its place depends on.
        prealign: ``(4, 4)``, the scan's world -> the model's world, RAS, mm.
        how: a few words on where ``prealign`` comes from.
        content: SHA-256 of the voxels and of where they lie.
        contrast: correlation of its coarse contrasts with those of MNI152, a T1.
    """

    name: str
    files: ScanFiles
    entries: dict[str, dict[str, str]]
    key: dict[str, Any]
    prealign: Matrix
    how: str
    content: str
    contrast: float


@dataclass(frozen=True, eq=False)
class PlacedImage:
    """A scan on the model's grid: ``image`` ``(X, Y, Z)`` float32, 0..255, and its ``brain``, bool."""

    image: NDArray[np.float32]
    brain: Mask


class Subjects:
    """All scans of a template, in an order that their content decides.

    Args:
        images: files of scans, or built-in names.
        masks: a brain mask for each image, in their order; or None.
        model: that registers them.
        options: of the template.
        work: where places are kept.

    Raises:
        InputError: there are fewer than two scans, two are the same, one cannot be used, or their contrasts differ.
    """

    def __init__(
        self,
        images: Sequence[str | Path],
        masks: Sequence[str | Path] | None,
        model: Model,
        options: TemplateOptions,
        work: WorkFolder,
    ) -> None:
        self.model, self.options, self.work = model, options, work
        self.files = list_files(images, masks, options)
        self.names = names_of(self.files)
        self.entries = [entries_of(files) for files in self.files]
        pairs = zip(self.files, self.entries, strict=True)
        refuse_equal([(str(files.image), entry["image"]["sha256"]) for files, entry in pairs])

    def place(self, number: int) -> Subject:
        """Places a scan, by its number among the images, unless that was done before."""
        files, entries = self.files[number], self.entries[number]
        key = {
            "files": {role: entry["sha256"] for role, entry in entries.items()},
            **{name: getattr(self.options, name) for name in ("align", "header", "assume_orientation", "strip")},
            "shape": list(self.model.shape),
            "affine": self.model.affine.tolist(),
        }
        placed = self.work.kept("place", key, lambda: self._place(files, entries["image"]["sha256"]))
        return Subject(
            self.names[number],
            files,
            entries,
            key,
            placed["prealign"],
            bytes(placed["how"]).decode(),
            bytes(placed["content"]).decode(),
            float(placed["contrast"][0]),
        )

    def image(self, subject: Subject) -> PlacedImage:
        """A scan on the model's grid."""
        placed = self._placed(subject)
        return PlacedImage(placed["image"], placed["brain"].astype(np.bool_))

    def original(self, subject: Subject) -> tuple[Scan, Mask]:
        """A scan as it is, and its brain."""
        scan = read_subject(subject.files, self.options)
        if _content(scan) != subject.content:
            raise _changed(subject.files)
        bits = np.unpackbits(self._placed(subject)["own_brain"], count=int(np.prod(scan.shape)))
        return scan, bits.reshape(scan.shape).astype(np.bool_)

    def _placed(self, subject: Subject) -> Arrays:
        checksum = subject.entries["image"]["sha256"]
        return self.work.kept("place", subject.key, lambda: self._place(subject.files, checksum))

    def _place(self, files: ScanFiles, checksum: str) -> Arrays:
        options = self.options
        try:
            scan = place_scan(files, options.align, options.header, options.assume_orientation)
            if scan.checksum is not None and str(files.image) not in BUILT_IN and scan.checksum != checksum:
                raise _changed(files)
        except InputError as error:
            raise InputError(_without_roles(str(error))) from None
        image, brain = conform(
            scan.data, scan.affine, scan.brain, scan.prealign, self.model.shape, self.model.affine, str(scan.path)
        )
        return {
            "image": image,
            "brain": brain.astype(np.uint8),
            "own_brain": np.packbits(scan.brain),
            "prealign": np.asarray(scan.prealign, np.float64),
            "how": np.frombuffer(scan.how.encode(), np.uint8),
            "content": np.frombuffer(_content(scan).encode(), np.uint8),
            "contrast": np.array([contrast_of(image, brain, self.model.affine)]),
        }


def ordered(subjects: Sequence[Subject]) -> list[Subject]:
    """The scans in the order of their content's SHA-256, so that the order of the files changes nothing.

    Raises:
        InputError: two scans are the same, or their contrasts differ.
    """
    refuse_equal([(str(subject.files.image), subject.content) for subject in subjects])
    low = min(subjects, key=lambda subject: subject.contrast)
    high = max(subjects, key=lambda subject: subject.contrast)
    if low.contrast < -_CONTRAST and high.contrast > _CONTRAST:
        like_t1 = sum(subject.contrast > 0 for subject in subjects)
        raise InputError(
            f"{low.files.image}: shows another contrast than {Path(high.files.image).name} ({like_t1} of "
            f"{len(subjects)} scans look like T1); average scans of one contrast"
        )
    return sorted(subjects, key=lambda subject: subject.content)


def list_files(
    images: Sequence[str | Path], masks: Sequence[str | Path] | None, options: TemplateOptions
) -> list[ScanFiles]:
    """The files of each scan.

    Raises:
        InputError: there are fewer than two, or not as many masks.
    """
    if isinstance(images, str | Path):
        images = [images]
    if len(images) < 2:
        named = f" ({images[0]})" if images else ""
        raise InputError(f"`images` names {len(images)} scan{named}; an average needs two or more")
    if masks is not None and len(masks) != len(images):
        raise InputError(f"`masks` names {len(masks)} files for {len(images)} images; give a mask for each, in order")
    paired = zip(images, [None] * len(images) if masks is None else masks, strict=True)
    return [
        ScanFiles(image, "image", mask=None if mask is None else Path(mask), strip=options.strip)
        for image, mask in paired
    ]


def names_of(files: Sequence[ScanFiles]) -> list[str]:
    """A name for each scan: its file's, with as many folders before it as make all names different, or a number.

    Raises:
        InputError: a file is named twice.
    """
    paths = [Path(str(scan.image)).absolute() for scan in files]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: is named twice; name each scan once")
    names: list[str] = []
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["_".join([*path.parts[1:][-count:-1], without_suffix(path.name)]) for path in paths]
        if len({name.casefold() for name in names}) == len(names):
            return names
    ranks = {path: rank for rank, path in enumerate(sorted(paths), start=1)}  # such as a.nii and a.nii.gz
    return [f"{without_suffix(path.name)}_{ranks[path]}" for path in paths]


def entries_of(files: ScanFiles) -> dict[str, dict[str, str]]:
    """Name and SHA-256 of a scan's files; a built-in name stands for itself.

    Raises:
        InputError: a file cannot be read.
    """
    if str(files.image) in BUILT_IN:
        image = {"name": str(files.image), "sha256": str(files.image)}
    else:
        image = file_entry(Path(files.image))
    return {"image": image} if files.mask is None else {"image": image, "mask": file_entry(files.mask)}


def refuse_equal(scans: Sequence[tuple[str, str]]) -> None:
    """Refuses scans of equal content, which would count twice.

    Args:
        scans: file and SHA-256 of each.
    """
    first: dict[str, str] = {}
    for file, digest in scans:
        if digest in first:
            raise InputError(f"{file}: is the same scan as {first[digest]}; name each scan once")
        first[digest] = file


def read_subject(files: ScanFiles, options: TemplateOptions) -> Scan:
    """A scan as it is."""
    if str(files.image) == MNI152:
        return place_scan(files, "none", None, None)
    built_in = EXAMPLES.get(str(files.image))
    path = EXAMPLES_FOLDER / built_in if built_in else Path(files.image)
    return read_image(path, options.header, options.assume_orientation)


def contrast_of(image: NDArray[np.float32], brain: Mask, affine: Matrix) -> float:
    """Correlation of an aligned brain's coarse contrasts with those of MNI152, a T1; 0 if little of it is deep."""
    template = load_template()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    reference = resample(template.image, template.affine, np.eye(4), image.shape, affine)
    both = brain & (reference > 0)
    deep = ndimage.distance_transform_edt(np.pad(both, 1), sampling=spacing)[1:-1, 1:-1, 1:-1] > _DEEP_MM
    if deep.sum() < 100:
        return 0.0
    smooth = [ndimage.gaussian_filter(values, _SMOOTH_MM / spacing)[deep] for values in (image, reference)]
    correlation = float(np.corrcoef(*smooth)[0, 1])
    return correlation if np.isfinite(correlation) else 0.0


def _content(scan: Scan) -> str:
    """SHA-256 of the voxels and of where they lie, however a file stores them."""
    return digest_of(scan.data.astype(np.float32), scan.affine)


def _changed(files: ScanFiles) -> InputError:
    return InputError(f"{files.image}: changed while the template was made; start again once it stays as it is")


def _without_roles(message: str) -> str:
    """An error of one scan of a pair for one of many: masks are named by `masks`."""
    message = re.sub(r"\s*\(?`fixed_mask` or `moving_mask`\)?", " with `masks`", message)
    return re.sub(r"`(?:fixed|moving|image)_mask`", "`masks`", message)
