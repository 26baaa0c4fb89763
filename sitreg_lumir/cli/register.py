"""The verbs for anyone with brain scans: register two of them, preprocess a raw one."""

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sitreg_lumir.cli.parsing import (
    Verbs,
    add_header_options,
    add_model,
    add_strip,
    load_chosen,
    of_arguments,
    refuse,
    verb,
)
from sitreg_lumir.errors import InputError

FAILED = 3
"""Exit code of `register` where the verdict is ``failed``."""
_LISTED = 20  # names that are printed
MORE = """\
Any NIfTI file: any orientation, voxel size, field of view, number type, contrast; also .mgz, .nrrd and .mha (DICOM is
converted by dcm2niix). Scans must be skull-stripped, or come with a mask of the brain, or --strip finds it. Both
directions come at once: exchanging the scans exchanges the results.

OUT gets
  warped_moving.nii.gz                the moving image on the fixed grid, sampled once from the original
  warped_fixed.nii.gz                 the fixed image on the moving grid
  from-moving_to-fixed_xfm.h5         the whole transform for ITK, ANTs, 3D Slicer: affine, deformation, affine
  from-fixed_to-moving_xfm.h5         its inverse
  map.safetensors, map.json           the exact map both ways, which `sitreg-lumir apply -t OUT` uses
  *_to-MNI152.tfm                     the alignments
  summary.json, report.html, picture.png        numbers and verdict, pictures
--save chooses, by names with commas or repeated: warped, transforms, map, alignments, report, picture (these are
`default`), fields (the transforms as dense fields *_xfm.nii.gz, 80 MB each at 1 mm), jacobian (jac_det*.nii.gz),
log-jacobian (log_jac_det*.nii.gz), model-fields (disp_*.nii.gz, deformation_xfm.nii.gz on the model's grid), masks
(*_brain.nii.gz), uncertainty (written with --uncertainty), all. `--save default,jacobian` adds to the default.

ITK leaves points outside a field where they are, so a point just outside the image jumps. --padding MM makes the
transforms reach further.

--align auto aligns each scan independently to MNI152 (affine, mutual information), if that moves its brain by more than
a few mm; `each` always does, `none` trusts the headers. --initial-transform takes an affine that ANTs or ITK found for
the pair (fixed to moving); --fixed-to-template and --moving-to-template take what `sitreg-lumir preprocess` found.

The CSV of --pairs has the columns fixed,moving and if wanted name,fixed_mask,moving_mask,...; results go to OUT/<name>,
a table of all to OUT/pairs.csv; what is there already is skipped. --workers N shares the pairs out to N processes.
On several machines, --shard 1/N ... --shard N/N register a part each, into the same OUT, and --collect makes the table
of what is there. A scan that several pairs share is aligned once. Results depend on none of this.

Exit code: 0 for the verdicts ok and check, 3 where the verdict is failed (all files are written all the same), 2 for
input that cannot be used. With --pairs all pairs are done first; 2 if one of them cannot be used, else 3 if one failed.

example: sitreg-lumir register --fixed EXAMPLE-T1 --moving EXAMPLE-T2 -o registration
         sitreg-lumir register --fixed MNI152 --moving brain.nii.gz -o registration
         sitreg-lumir register --fixed t1.nii.gz --moving t2.nii.gz --moving-mask t2_brain.nii.gz -o registration
         sitreg-lumir register --pairs pairs.csv -o registrations --workers 4
         sitreg-lumir register --pairs pairs.csv -o registrations --shard 2/8
"""


def add_register(verbs: Verbs) -> None:
    """Adds the verb `register`."""
    parser = verb(verbs, "register", "Register two brain scans, both ways at once.", MORE)
    image = "NIfTI file; or MNI152, the ICBM 2009a nonlinear symmetric template; or EXAMPLE-T1, EXAMPLE-T2"
    parser.add_argument("--fixed", metavar="F", help=image)
    parser.add_argument("--moving", metavar="M", help=image)
    parser.add_argument("--pairs", type=Path, metavar="CSV", help="a table of pairs instead")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the results")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="with --pairs: processes that share the pairs (default: 1)"
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="with --pairs: register only part I of N; parts may run at once, in one OUT"
    )
    parser.add_argument(
        "--collect",
        action="store_true",
        help="with --pairs: register nothing, make OUT/pairs.csv of what is there and name what is missing",
    )
    parser.add_argument("--fixed-mask", type=Path, metavar="FILE", help="brain mask of the fixed scan, any grid")
    parser.add_argument("--moving-mask", type=Path, metavar="FILE", help="brain mask of the moving scan, any grid")
    add_strip(parser)
    parser.add_argument("--align", choices=("auto", "each", "none"), default="auto", help="see below (default: auto)")
    parser.add_argument("--initial-transform", type=Path, metavar="XFM", help="ITK affine, fixed to moving")
    parser.add_argument("--fixed-to-template", type=Path, metavar="XFM", help="ITK affine, fixed to MNI152")
    parser.add_argument("--moving-to-template", type=Path, metavar="XFM", help="ITK affine, moving to MNI152")
    parser.add_argument(
        "--transform",
        choices=("deformable", "affine", "rigid"),
        default="deformable",
        help="rigid or affine: the scans to one another, no deformation; for two scans of one person (default: "
        "deformable)",
    )
    add_header_options(parser)
    parser.add_argument(
        "--refine",
        type=int,
        default=0,
        metavar="N",
        help="steps of optimisation for this very pair, e.g. 40 (default: 0)",
    )
    parser.add_argument(
        "--refine-similarity",
        choices=("lncc", "mind"),
        default="lncc",
        help="what the steps of --refine raise, for any contrasts: lncc, or mind, which stays nearer the prediction "
        "(default: lncc)",
    )
    parser.add_argument(
        "--refine-mm",
        type=float,
        metavar="MM",
        help="voxel size at which the last quarter of them compares the scans, too; 1 pays for scans of 1 mm, in twice "
        "the time (default: the members' voxel size alone)",
    )
    parser.add_argument("--fixed-lesion", type=Path, metavar="FILE", help="mask left out of what --refine compares")
    parser.add_argument("--moving-lesion", type=Path, metavar="FILE", help="the same mask of the moving scan")
    parser.add_argument(
        "--padding",
        dest="padding_mm",
        type=float,
        default=0.0,
        metavar="MM",
        help="border of the transforms (default: 0)",
    )
    parser.add_argument(
        "--uncertainty",
        action="store_true",
        help="also run each member alone, on mirrored scans too: how far their fields differ, mm",
    )
    add_model(parser)
    parser.add_argument(
        "--save", action="append", metavar="NAMES", help="outputs to write, see below (default: default)"
    )
    parser.add_argument(
        "--bids",
        action="store_true",
        help="OUT becomes a BIDS derivatives data set, names with the scans' entities; the folders as they are "
        "elsewhere lie in OUT/registrations",
    )
    parser.add_argument("--no-report", dest="report", action="store_false", help="do not write report.html")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier registration in OUT")
    parser.set_defaults(run=_register)


def _register(options: argparse.Namespace, rest: list[str]) -> int:
    refuse(rest, "register")
    from sitreg_lumir.registration.pairs_table import FILE_COLUMNS, PairRow, read_pairs

    files: dict[str, Any] = {name: getattr(options, name) for name in FILE_COLUMNS}
    if options.pairs is not None:
        superfluous = next((name for name, value in files.items() if value is not None), None)
        if superfluous is not None:
            raise InputError(f"--{superfluous.replace('_', '-')}: with --pairs, files stand in the table; add a column")
    elif files["fixed"] is None or files["moving"] is None:
        raise InputError("name --fixed and --moving, or a table with --pairs")
    elif options.workers != 1 or options.shard or options.collect:
        option = "collect" if options.collect else "shard" if options.shard else "workers"
        raise InputError(f"--{option} is for a table of pairs; add --pairs, or leave it out")
    if options.collect:
        return _collect(options)
    from sitreg_lumir.cli.progress import show_progress
    from sitreg_lumir.io.other_formats import without_suffix
    from sitreg_lumir.registration.batch import Shard, register_pairs
    from sitreg_lumir.registration.options import RegisterOptions
    from sitreg_lumir.registration.pair_rows import TABLE
    from sitreg_lumir.registration.register import register_scans

    show_progress()
    shard = None if options.shard is None else Shard.parse(options.shard)
    chosen = of_arguments(RegisterOptions, options)
    out, bids = _folders(options)
    pairs = None if options.pairs is None else read_pairs(options.pairs)
    model = load_chosen(options)
    if pairs is None and bids is not None:
        chosen_files = {name: str(value) for name, value in files.items() if value is not None}
        stems = (without_suffix(Path(chosen_files[role]).name) for role in ("fixed", "moving"))
        pairs = [PairRow("_".join(stems), chosen_files)]
    if pairs is None:
        registration = register_scans(files["fixed"], files["moving"], options.output, model, chosen)
        reasons = "".join(f"\n  {reason}" for reason in registration.summary["reasons"])
        print(f"verdict: {registration.verdict}{reasons}")
        report = options.output / "report.html"
        print(f"written: {options.output}" + (f"; look at {report}" if report.is_file() else ""))
        return FAILED if registration.verdict == "failed" else 0
    rows = register_pairs(pairs, out, model, chosen, workers=options.workers, shard=shard, bids=bids)
    if shard is None:
        print(f"written: {out / TABLE}")
    else:
        words = ["--pairs", str(options.pairs), "-o", str(options.output), *(["--bids"] if bids else []), "--collect"]
        print(f"next: {shlex.join(['sitreg-lumir', 'register', *words])}")
    return _sum_up(rows)


def _folders(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """Where registrations go, and the BIDS data set that they are laid out in, if any."""
    from sitreg_lumir.registration.bids import REGISTRATIONS

    return (options.output / REGISTRATIONS, options.output) if options.bids else (options.output, None)


def _collect(options: argparse.Namespace) -> int:
    """Makes the table of what is there; the exit code."""
    from sitreg_lumir.registration.pair_rows import TABLE, collect
    from sitreg_lumir.registration.pairs_table import read_pairs

    out, _ = _folders(options)
    rows = collect(read_pairs(options.pairs, check_files=False), out)
    print(f"written: {out / TABLE}")
    return _sum_up(rows)


def _sum_up(rows: Sequence[dict[str, Any]]) -> int:
    """Prints how many pairs have which verdict, and which could not be registered or are missing; the exit code."""
    verdicts = Counter(row["verdict"] for row in rows)
    others = [name for name in ("missing", "outdated") if verdicts[name]]
    names = ("ok", "check", "failed", "error", *others)
    print(f"{len(rows)} pairs: {', '.join(f'{verdicts[name]} {name}' for name in names)}")
    for kind in others:
        listed = [row["name"] for row in rows if row["verdict"] == kind]
        print(
            f"{kind}: {', '.join(listed[:_LISTED])}" + (f" and {more} more" if (more := len(listed[_LISTED:])) else "")
        )
    wanting = [row for row in rows if row["verdict"] in ("error", "missing", "outdated")]
    if wanting:
        raise InputError(
            f"{wanting[0]['name']}: {wanting[0]['reasons']} ({len(wanting)} of {len(rows)} pairs failed; the "
            "others are done)"
        )
    return FAILED if verdicts["failed"] else 0


def add_preprocess(verbs: Verbs) -> None:
    """Adds the verb `preprocess`."""
    more = (
        "OUT is as LUMIR's volumes are: the brain alone, without bias field (N4), aligned to the MNI152 template by\n"
        "an affine, RAS, 160 x 224 x 192 voxels of 1 mm, 1..255 in the brain and 0 outside. Beside OUT.nii.gz:\n"
        "  OUT_mask.nii.gz                  the brain, on the same grid\n"
        "  OUT_raw-mask.nii.gz              the brain, on RAW's grid\n"
        "  OUT_points-raw-to-template.tfm   an ITK affine; it maps points of the raw scan's world to MNI152\n"
        "As `apply -t FILE` it brings images of the template's world onto the raw scan; its inverse, -t '[FILE,1]',\n"
        "brings other images and labels of the raw scan's world into the template's.\n\n"
        "Which voxels are brain is said by one of\n"
        "  --strip deepbet    (default) a network for T1 scans of adults; pip install 'sitreg-lumir[strip]'\n"
        "  --mask MASK        for all other contrasts: the mask of a T1 scan that lies on this one, or any other; it\n"
        "                     may have another grid of the same world\n"
        "  --strip template   the template's brain, moved by the affine; some millimetres off\n"
        "  --strip none       the scan shows the brain alone already\n\n"
        "example: sitreg-lumir preprocess head_t1.nii.gz -o prepared/t1.nii.gz\n"
        "         sitreg-lumir preprocess head_t2.nii.gz --mask brain_of_t1.nii.gz -o prepared/t2.nii.gz\n"
        "         sitreg-lumir apply -t '[prepared/t1_points-raw-to-template.tfm,1]' --labels lesions_of_t1.nii.gz \\\n"
        "             --reference prepared/t1.nii.gz -o prepared/t1_lesions.nii.gz"
    )
    summary = "Make a LUMIR-like volume of a raw head: skull-stripped, without bias field, aligned to MNI152, 1 mm."
    parser = verb(verbs, "preprocess", summary, more)
    parser.add_argument("raw", type=Path, metavar="RAW", help="NIfTI, any orientation and voxel size")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".nii.gz or .nii")
    parser.add_argument("--mask", type=Path, metavar="MASK", help="NIfTI, above 0 in the brain")
    parser.add_argument("--strip", choices=("deepbet", "template", "none"), help="see below (default: deepbet)")
    parser.add_argument(
        "--no-bias-correction", dest="bias_correction", action="store_false", help="leave the bias field as it is"
    )
    parser.add_argument(
        "--spacing", type=float, default=1.0, metavar="MM", help="voxel size of OUT: 1, 2 or 4 (default: 1)"
    )
    add_header_options(parser)
    parser.set_defaults(run=_preprocess)


def _preprocess(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "preprocess")
    from sitreg_lumir.preprocessing.preprocess import preprocess

    preprocess(
        options.raw,
        options.output,
        mask=options.mask,
        strip=options.strip,
        bias_correction=options.bias_correction,
        header=options.header,
        assume_orientation=options.assume_orientation,
        spacing=options.spacing,
    )
