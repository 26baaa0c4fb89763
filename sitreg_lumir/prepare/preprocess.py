"""A raw head scan as a LUMIR-like volume: stripped, without bias field, aligned to MNI152, on LUMIR's grid, 0..255.

Beside the volume go its brain mask and the affine that was applied, so that a registration of such volumes can be led
back to the raw scans.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import nibabel
import numpy as np
import SimpleITK
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.files.resample import resample
from sitreg_lumir.files.scans import Scan, read_image
from sitreg_lumir.files.streams import plain_header, writing_planes
from sitreg_lumir.files.transforms import save_affine_tfm
from sitreg_lumir.prepare.align import Alignment, align_to_frame
from sitreg_lumir.prepare.conform import Mask, conform, mask_on_grid, support_mask
from sitreg_lumir.prepare.frame import LUMIR_SHAPE, TEMPLATE, Frame, load_frame, lumir_affine
from sitreg_lumir.prepare.stripped import LARGEST_LITRES, OUTSIDE_SHARE, outside_share
from sitreg_lumir.writing import writing

Strip: TypeAlias = Literal["deepbet", "template", "none"]

TRANSFORM = "_points-raw-to-template.tfm"
"""End of the affine's name: it maps the points of the raw scan's world to the template's world."""
MASK = "_mask.nii.gz"

_N4_MM = 4.0  # voxels on which the bias field is fitted; its control points are some 30 mm apart in the end
_N4_ITERATIONS = (50, 50, 50, 50)
_LEAST_OVERLAP = 0.85  # Dice coefficient of an aligned brain with the template's; miniLUMIR's have 0.95 and more
_INSTALL = "pip install 'sitreg-lumir[strip]'"
itk: Any = SimpleITK  # it carries no types


@dataclass(frozen=True)
class _Files:
    volume: Path
    mask: Path
    transform: Path


def preprocess(
    raw: str | Path,
    out: str | Path,
    *,
    mask: str | Path | None = None,
    strip: Strip | None = None,
    bias_correction: bool = True,
    header: str | None = None,
    assume_orientation: str | None = None,
) -> None:
    """Makes a LUMIR-like volume of a head scan; prints what it did and wrote.

    Written are ``out`` (uint8, 160 x 224 x 192, 1 mm, RAS, exactly 0 outside the brain and 1..255 inside), the brain on
    the same grid (``<out>_mask.nii.gz``) and the affine (``<out>_points-raw-to-template.tfm``); none of them unless
    all could be made. Files of these names are replaced.

    Args:
        raw: the scan, any orientation and voxel size.
        out: ``.nii.gz`` or ``.nii``.
        mask: the brain, above 0, on any grid of the scan's world: the mask of a co-registered T1, say.
        strip: where the brain is found without ``mask``: by ``deepbet`` (T1 only; the default); as the ``template``'s
            brain carried over, which is rough; or ``none``, as the scan shows nothing else.
        bias_correction: whether to remove a bias field.
        header: ``sform`` or ``qform``: the one to use in every file.
        assume_orientation: for files whose header does not say where the axes point to.

    Raises:
        InputError: a file cannot be used, the options contradict each other, deepbet is needed and missing, no
            brain was found, or the output cannot be written.

    Examples:
        >>> sitreg_lumir.preprocess("head.nii.gz", "brain.nii.gz", mask="head_brain.nii.gz")
        head.nii.gz: brain of ... litres (head_brain.nii.gz); ...
        aligned to MNI152...
        wrote brain.nii.gz (160 x 224 x 192, 1 mm, 0..255), brain_mask.nii.gz, brain_points-raw-to-template.tfm
        next: sitreg-lumir register --fixed brain.nii.gz --moving OTHER.nii.gz -o registration

    Source: Tustison et al., N4ITK: improved N3 bias correction, IEEE TMI 2010; Fisch et al., deepbet: fast brain
    extraction of T1-weighted MRI using convolutional neural networks, Comput. Biol. Med. 2024.
    """
    if strip not in (None, "deepbet", "template", "none"):
        raise ValueError(f"strip must be deepbet, template or none, got {strip!r}")
    if mask is not None and strip is not None:
        raise InputError(f"--strip {strip}: the brain is what --mask says; leave one of the two out")
    raw, mask = Path(raw), None if mask is None else Path(mask)
    files = _outputs(Path(out), [raw] if mask is None else [raw, mask])
    scan = read_image(raw, header, assume_orientation)
    frame = load_frame()
    placed = None
    if mask is not None:
        given = read_image(mask, header, assume_orientation)
        brain, source = mask_on_grid(given.data, given.affine, scan.shape, scan.affine, str(mask)), mask.name
    elif strip == "none":
        brain, source = support_mask(scan.data, scan.affine, str(raw)), "its foreground"
    elif strip == "template":
        placed = align_to_frame(scan.data, scan.affine, None, frame, str(raw))
        share = resample(frame.mask.astype(np.float32), frame.affine, placed.prealign, scan.shape, scan.affine)
        brain, source = share >= 0.5, "the template's brain"
    else:
        brain, source = _deepbet(scan), "deepbet's mask"
    litres = float(brain.sum() * scan.spacing.prod() / 1e6)
    if litres > LARGEST_LITRES:
        raise _no_brain(scan, source, f"{litres:.1f} litres")
    values, bias = _without_bias(scan, brain) if bias_correction else (scan.data, "bias field kept")
    if placed is None:
        placed = align_to_frame(values, scan.affine, brain, frame, str(raw))
        _check_brain(scan, brain, placed, frame, source)
    volume, on_grid = conform(values, scan.affine, brain, placed.prealign, LUMIR_SHAPE, lumir_affine(), str(raw))
    _write(files, np.rint(volume).astype(np.uint8), on_grid, placed)

    print(f"{raw.name}: brain of {litres:.2f} litres ({source}); {bias}")
    print(f"aligned to {TEMPLATE}: moved by {placed.moved_mm:.1f} mm, mutual information "
          f"{placed.mi_before:.2f} -> {placed.mi_after:.2f}")  # fmt: skip
    print(f"wrote {files.volume} (160 x 224 x 192, 1 mm, 0..255), {files.mask.name}, {files.transform.name}")
    if strip == "template":
        print("warning: the template's mask fits this brain to some millimetres only; look at the volume's rim, and "
              "prefer --mask with the mask of a co-registered T1")  # fmt: skip
    print(f"next: sitreg-lumir register --fixed {files.volume} --moving OTHER.nii.gz -o registration")


def _outputs(out: Path, inputs: list[Path]) -> _Files:
    """The files to write, none of which may be an input; that this is possible is tried before the work begins."""
    ending = next((one for one in (".nii.gz", ".nii") if out.name.endswith(one)), "")
    stem = out.name.removesuffix(ending)
    if not ending or not stem:
        raise InputError(f"{out}: the name must end in .nii.gz or .nii")
    files = _Files(out, out.with_name(stem + MASK), out.with_name(stem + TRANSFORM))
    given = {path.resolve() for path in inputs}
    taken = next((path for path in (files.volume, files.mask) if path.resolve() in given), None)
    if taken is not None:
        raise InputError(f"{taken}: is an input, too; give the result a name of its own")
    folder = next(one for one in out.absolute().parents if one.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{out}: cannot be written ({reason}); choose a folder with space and access") from None
    return files


def _deepbet(scan: Scan) -> Mask:
    """The brain of a T1 scan, bool, on its grid."""
    try:
        from deepbet import BrainExtraction
    except ImportError as error:
        raise InputError(
            f"{scan.path}: skull stripping needs deepbet ({error}): {_INSTALL}; or give --mask, or --strip none for a "
            "scan without skull"
        ) from None
    image = nibabel.Nifti1Image(scan.data.astype(np.float32), scan.affine)
    try:
        _, found, _ = BrainExtraction(no_gpu=True).run(image)  # some ten seconds on a CPU
    except (AssertionError, ValueError) as error:  # it sees no foreground, or none of one piece
        reason = " ".join(str(error).split())
        raise InputError(f"{scan.path}: deepbet found no brain ({reason}); it knows T1 only, give --mask") from None
    brain = np.asarray(found.dataobj) > 0
    if not brain.any():
        raise InputError(f"{scan.path}: deepbet found no brain; it knows T1 only, give --mask")
    return np.asarray(brain, dtype=np.bool_)


def _without_bias(scan: Scan, brain: Mask) -> tuple[NDArray[np.float32], str]:
    """The scan divided by its bias field, and what that was.

    The field is fitted within the brain on voxels of about 4 mm, and evaluated on the scan's own.
    """
    values = scan.data.astype(np.float32)
    values -= min(np.float32(0), np.percentile(values[::2, ::2, ::2], 0.1).astype(np.float32))  # no signal is 0
    image, inside = itk.GetImageFromArray(values.T), itk.GetImageFromArray(brain.T.astype(np.uint8))
    for one in (image, inside):
        one.SetSpacing(scan.spacing.tolist())
    factors = [
        max(1, min(round(_N4_MM / size), count // 4)) for size, count in zip(scan.spacing, scan.shape, strict=True)
    ]
    method = itk.N4BiasFieldCorrectionImageFilter()
    method.SetNumberOfThreads(1)  # the order of the sums would change the result
    method.SetMaximumNumberOfIterations(_N4_ITERATIONS)
    try:
        method.Execute(itk.Shrink(image, factors), itk.Shrink(inside, factors))
    except RuntimeError:
        raise InputError(f"{scan.path}: the bias field cannot be estimated; add --no-bias-correction") from None
    bias = np.exp(itk.GetArrayFromImage(method.GetLogBiasFieldAsImage(image)).T)
    low, high = np.percentile(bias[brain], (1, 99)) / np.median(bias[brain])
    return (values / bias).astype(np.float32), f"bias field of {low:.2f} to {high:.2f} removed"


def _check_brain(scan: Scan, brain: Mask, placed: Alignment, frame: Frame, source: str) -> None:
    """Refuses what has not the shape of a brain."""
    outside = outside_share(brain, scan.affine, placed.prealign, frame)
    if outside > OUTSIDE_SHARE:
        raise _no_brain(scan, source, f"{outside:.0%} of it lies outside a brain")
    if placed.overlap_after < _LEAST_OVERLAP:
        raise _no_brain(scan, source, f"its overlap with MNI152 is {placed.overlap_after:.2f}")


def _no_brain(scan: Scan, source: str, problem: str) -> InputError:
    mend = "it knows T1 only, " if source.startswith("deepbet") else ""
    return InputError(f"{scan.path}: {source} is not a brain alone ({problem}); {mend}give a brain mask with --mask")


def _write(files: _Files, volume: NDArray[np.uint8], brain: Mask, placed: Alignment) -> None:
    """All files, or none."""
    header = plain_header(LUMIR_SHAPE, lumir_affine(), np.uint8)
    with (
        writing(files.transform) as transform,
        writing(files.mask) as mask,
        writing(files.volume) as whole,
    ):
        for path, name, values in ((whole, files.volume, volume), (mask, files.mask, brain.astype(np.uint8))):
            with writing_planes(path, header, name) as put:
                put(0, values.T[None])
        save_affine_tfm(transform, placed.prealign)
