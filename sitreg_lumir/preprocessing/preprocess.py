"""A raw head as a LUMIR-like volume: skull-stripped, without bias field, aligned to MNI152, on LUMIR's grid, 0..255.

The brain mask and the applied affine are written beside the volume, so that results on such volumes can be brought back
to the raw scans.
"""

import os
import shlex
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import writing_together
from sitreg_lumir.io.itk import save_affine_tfm
from sitreg_lumir.io.nifti_stream import writing_planes
from sitreg_lumir.io.read import Scan, read_image
from sitreg_lumir.io.temporary import clean_leftovers
from sitreg_lumir.io.write import plain_header
from sitreg_lumir.preprocessing.align import Alignment
from sitreg_lumir.preprocessing.intensity import Mask, Matrix, conform, support_mask
from sitreg_lumir.preprocessing.place import align_brain, read_brain_mask
from sitreg_lumir.preprocessing.skull_check import Refusal, check_brain
from sitreg_lumir.preprocessing.strip import deepbet_mask, strip_head, template_mask
from sitreg_lumir.preprocessing.template import SPACINGS, TEMPLATE, load_template, lumir_grid

Strip: TypeAlias = Literal["deepbet", "template", "none"]

TRANSFORM = "_points-raw-to-template.tfm"
"""End of the affine's name: it maps the points of the raw scan's world to the template's world."""
MASK = "_mask.nii.gz"
RAW_MASK = "_raw-mask.nii.gz"
"""End of the name of the brain's mask on the raw scan's grid."""

_N4_MM = 4.0  # voxels on which the bias field is fitted; its control points are some 30 mm apart in the end
_N4_ITERATIONS = (50, 50, 50, 50)
_LEAST_OVERLAP = 0.85  # Dice coefficient of an aligned brain and the template's; miniLUMIR's have 0.95 and more
_INSTEAD = "or give `mask`, or `strip=none` for a scan without skull"
itk: Any = SimpleITK  # has no type information


@dataclass(frozen=True)
class VolumeFiles:
    """The volume, and what is written with it."""

    volume: Path
    mask: Path
    raw_mask: Path
    transform: Path

    @classmethod
    def beside(cls, volume: Path) -> "VolumeFiles":
        """All files beside a volume.

        Raises:
            InputError: it is not named as one.
        """
        ending = next((suffix for suffix in (".nii.gz", ".nii") if volume.name.endswith(suffix)), "")
        stem = volume.name.removesuffix(ending)
        if not ending or not stem:
            raise InputError(f"{volume}: the name must end in .nii.gz or .nii")
        return cls(volume, *(volume.with_name(stem + end) for end in (MASK, RAW_MASK, TRANSFORM)))

    @property
    def registration(self) -> Path:
        """A folder that is not there yet, for a registration of the volume."""
        stem = self.mask.name.removesuffix(MASK)
        names = (
            self.volume.with_name(f"{stem}_to-MNI152{number}") for number in ("", *(f"_{n}" for n in range(2, 10**6)))
        )
        return next(path for path in names if not path.exists())


def preprocess(
    raw: str | Path,
    out: str | Path,
    *,
    mask: str | Path | None = None,
    strip: Strip | None = None,
    bias_correction: bool = True,
    header: str | None = None,
    assume_orientation: str | None = None,
    spacing: float = 1.0,
) -> None:
    """Makes a LUMIR-like volume of a head scan, and prints what was done and written.

    Written are ``out`` (uint8, RAS, 160 x 224 x 192 voxels of 1 mm, or its field of view in voxels of ``spacing``,
    exactly 0 outside the brain and 1..255 inside), the brain on the same grid (``<out>_mask.nii.gz``) and on the raw
    scan's (``<out>_raw-mask.nii.gz``), and the affine (``<out>_points-raw-to-template.tfm``); none of them unless all
    could be made. Files of these names are replaced.

    Args:
        raw: the scan, any orientation and voxel size.
        out: ``.nii.gz`` or ``.nii``.
        mask: the brain, on any grid of the scan's world: the mask of a co-registered T1, say. Soft masks are cut at
            half of their maximum.
        strip: how the brain is found without ``mask``: by ``deepbet`` (T1 only; the default); as the
            ``template``'s brain, moved by the affine, which is rough; or ``none``: the scan shows the brain alone.
        bias_correction: whether to remove a bias field.
        header: ``sform`` or ``qform``: the one to use in every file.
        assume_orientation: for files whose header does not say where the axes point to.
        spacing: voxel size, mm: 1, 2 or 4; LUMIR's field of view in any case.

    Raises:
        InputError: a file cannot be used, the options contradict each other, deepbet is needed and missing, no
            brain was found, or the output cannot be written.

    Examples:
        >>> sitreg_lumir.preprocess("head.nii.gz", "brain.nii.gz", mask="head_brain.nii.gz")
        head.nii.gz: brain of ... litres (head_brain.nii.gz); ...
        aligned to MNI152...
        wrote brain.nii.gz (160 x 224 x 192, 1 mm, 0..255), brain_mask.nii.gz, brain_raw-mask.nii.gz, ...
        next: sitreg-lumir register --fixed MNI152 --moving brain.nii.gz -o brain_to-MNI152

    Source: Tustison et al., N4ITK: improved N3 bias correction, IEEE TMI 2010; Fisch et al., deepbet: fast brain
    extraction of T1-weighted MRI using convolutional neural networks, Comput. Biol. Med. 2024.
    """
    if strip not in (None, "deepbet", "template", "none"):
        raise ValueError(f"strip must be deepbet, template or none, got {strip!r}")
    if mask is not None and strip is not None:
        raise InputError(f"`strip` is {strip} but `mask` says where the brain is; leave one of the two out")
    if spacing not in SPACINGS:
        raise InputError(f"`spacing` must be 1, 2 or 4 mm, got {spacing:g}")
    raw, mask = Path(raw), None if mask is None else Path(mask)
    files = VolumeFiles.beside(Path(out))
    _check_outputs(files, [raw] if mask is None else [raw, mask])
    prepared = prepare_volume(
        raw,
        mask=mask,
        strip=strip or "deepbet",
        bias_correction=bias_correction,
        header=header,
        assume_orientation=assume_orientation,
        spacing=spacing,
    )
    prepared.write(files)
    shape, alignment = " x ".join(map(str, prepared.volume.shape)), prepared.alignment
    print(f"{raw.name}: brain of {prepared.litres:.2f} litres ({prepared.source}); {prepared.bias}")
    print(
        f"aligned to {TEMPLATE}: moved by {alignment.moved_mm:.1f} mm, mutual information "
        f"{alignment.mi_before:.2f} -> {alignment.mi_after:.2f}"
    )
    print(
        f"wrote {files.volume} ({shape}, {spacing:g} mm, 0..255), {files.mask.name}, {files.raw_mask.name}, "
        f"{files.transform.name}"
    )
    if strip == "template":
        print(
            "warning: the template's mask fits this brain to some millimetres only; look at the volume's rim, and "
            "prefer --mask with the mask of a co-registered T1"
        )
    volume, registration = (shlex.quote(str(path)) for path in (files.volume, files.registration))
    print(f"next: sitreg-lumir register --fixed MNI152 --moving {volume} -o {registration}")


@dataclass(frozen=True)
class Prepared:
    """A volume that was made of a raw scan.

    Attributes:
        volume: ``(X, Y, Z)`` uint8, on LUMIR's grid or a coarser one, 0 outside the brain and 1..255 inside.
        affine: ``(4, 4)`` its voxel-to-world matrix, RAS, mm, in the template's world.
        brain_on_grid: bool, ``(X, Y, Z)``.
        scan: the raw scan, without bias field if that was removed.
        brain: bool, on the raw scan's grid.
        alignment: of the raw scan to the template.
        source: a few words on what showed the brain.
        stripped_by: what made the mask of a whole head; None where a mask or the scan itself showed the brain.
        bias: a few words on the bias field.
    """

    volume: NDArray[np.uint8]
    affine: Matrix
    brain_on_grid: Mask
    scan: Scan
    brain: Mask
    alignment: Alignment
    source: str
    stripped_by: str | None
    bias: str

    @property
    def litres(self) -> float:
        """Volume of the brain's mask."""
        return float(self.brain.sum() * self.scan.spacing.prod() / 1e6)

    def write(self, files: "VolumeFiles") -> None:
        """Writes all files, or none."""
        header = plain_header(self.volume.shape, self.affine, np.uint8)
        raw_header = plain_header(self.scan.shape, self.scan.affine, np.uint8)
        together = (files.volume, files.mask, files.raw_mask, files.transform)
        with writing_together(*together) as (whole, mask, raw_mask, transform):
            for path, name, values, of_file in (
                (whole, files.volume, self.volume, header),
                (mask, files.mask, self.brain_on_grid.astype(np.uint8), header),
                (raw_mask, files.raw_mask, self.brain.astype(np.uint8), raw_header),
            ):
                with writing_planes(path, of_file, name) as put:
                    put(0, values.T[None])
            save_affine_tfm(transform, self.alignment.prealign)


def prepare_volume(
    raw: Path,
    *,
    mask: Path | None,
    strip: Strip,
    bias_correction: bool,
    header: str | None,
    assume_orientation: str | None,
    spacing: float,
    keep_brains: bool = False,
) -> Prepared:
    """Makes a LUMIR-like volume of a raw scan.

    Args:
        raw: the scan.
        mask: the brain; then ``strip`` says nothing.
        strip: as in :func:`preprocess`.
        bias_correction: whether to remove a bias field.
        header: ``sform`` or ``qform``: the one to use in every file.
        assume_orientation: for files whose header does not say where the axes point to.
        spacing: voxel size, mm; one of :data:`~sitreg_lumir.preprocessing.template.SPACINGS`.
        keep_brains: whether scans that show the brain alone stay as they are whatever ``strip`` is, and heads are
            refused by the line that says how to strip them.

    Raises:
        InputError: a file cannot be used, deepbet is needed and missing, or there is no brain.
    """
    scan = read_image(raw, header, assume_orientation)
    template = load_template()
    alignment, stripped_by = None, None
    if mask is not None:
        brain, source = read_brain_mask(mask, scan, header, assume_orientation), mask.name
    elif strip == "none":
        brain, source = support_mask(scan.data, scan.affine, str(raw)), "its foreground"
    elif keep_brains:
        brain, stripped_by = strip_head(scan, strip, template, mask="mask")
        source = {None: "its foreground", "template": "the template's brain", "deepbet": "deepbet's mask"}[stripped_by]
    elif strip == "template":
        brain, alignment = template_mask(scan, template)
        source, stripped_by = "the template's brain", strip
    else:
        brain, source, stripped_by = deepbet_mask(scan, _INSTEAD), "deepbet's mask", strip
    refusal: Refusal = partial(_no_brain, source=source)
    if keep_brains and mask is None and strip == "none":
        refusal = _looks_like_a_head
    check_brain(scan, brain, None, template, refusal)
    bias = "bias field kept"
    if bias_correction:
        scan, bias = _without_bias(scan, brain)
    if alignment is None:
        alignment = align_brain(scan, brain, template, refusal)
        if alignment.overlap_after < _LEAST_OVERLAP:
            raise refusal(scan, f"its overlap with MNI152 is {alignment.overlap_after:.2f}")
    shape, affine = lumir_grid(spacing)
    volume, brain_on_grid = conform(scan.data, scan.affine, brain, alignment.prealign, shape, affine, str(raw))
    stored = np.rint(volume).astype(np.uint8)
    return Prepared(stored, affine, brain_on_grid, scan, brain, alignment, source, stripped_by, bias)


def _check_outputs(files: "VolumeFiles", inputs: list[Path]) -> None:
    """Checks that no output is an input, and that they can be written, before the work begins."""
    out = files.volume
    resolved = {os.path.realpath(path) for path in inputs}
    taken = next(
        (path for path in (files.volume, files.mask, files.raw_mask) if os.path.realpath(path) in resolved), None
    )
    if taken is not None:
        raise InputError(f"{taken}: is an input, too; give the result a name of its own")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    try:
        clean_leftovers(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{out}: cannot be written ({reason}); choose a folder with space and access") from None


def _without_bias(scan: Scan, brain: Mask) -> tuple[Scan, str]:
    """The scan divided by its bias field, and a few words on that field.

    The field is fitted within the brain on voxels of about 4 mm, and evaluated on the scan's own.
    """
    values = scan.data.astype(np.float32)
    values -= min(np.float32(0), np.percentile(values[::2, ::2, ::2], 0.1).astype(np.float32))  # no signal is 0
    image, inside = itk.GetImageFromArray(values.T), itk.GetImageFromArray(brain.T.astype(np.uint8))
    for volume in (image, inside):
        volume.SetSpacing(scan.spacing.tolist())
    factors = [
        max(1, min(round(_N4_MM / size), count // 4)) for size, count in zip(scan.spacing, scan.shape, strict=True)
    ]
    method = itk.N4BiasFieldCorrectionImageFilter()
    method.SetNumberOfThreads(1)  # the order of the sums would change the result
    method.SetMaximumNumberOfIterations(_N4_ITERATIONS)
    try:
        method.Execute(itk.Shrink(image, factors), itk.Shrink(inside, factors))
    except RuntimeError:
        raise InputError(
            f"{scan.path}: the bias field cannot be estimated; leave it with `bias_correction=False`"
        ) from None
    bias = np.exp(itk.GetArrayFromImage(method.GetLogBiasFieldAsImage(image)).T)
    low, high = np.percentile(bias[brain], (1, 99)) / np.median(bias[brain])
    corrected = (values / bias).astype(np.float32)
    return replace(scan, data=corrected), f"bias field of {low:.2f} to {high:.2f} removed"


def _looks_like_a_head(scan: Scan, problem: str) -> InputError:
    return InputError(f"{scan.path}: looks like a whole head, not a brain alone ({problem}); add `strip=deepbet`")


def _no_brain(scan: Scan, problem: str, *, source: str) -> InputError:
    hint = "it knows T1 only, " if source.startswith("deepbet") else ""
    return InputError(f"{scan.path}: {source} is not a brain alone ({problem}); {hint}give a brain mask with `mask`")
