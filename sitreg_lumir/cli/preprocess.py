"""The verb that makes a raw head scan fit for registration: preprocess."""

import argparse
from pathlib import Path

from sitreg_lumir.cli.parsing import Verbs, add_header_options, refuse, verb


def add_preprocess(verbs: Verbs) -> None:
    more = (
        "OUT is as LUMIR's volumes are: the brain alone, without bias field (N4), aligned to the MNI152 template by\n"
        "an affine, RAS, 160 x 224 x 192 voxels of 1 mm, 1..255 in the brain and 0 outside. Beside OUT.nii.gz:\n"
        "  OUT_mask.nii.gz                  the brain, on the same grid\n"
        "  OUT_points-raw-to-template.tfm   an ITK affine; it maps points of the raw scan's world to MNI152\n"
        "As `apply -t FILE` it brings images of the template's world onto the raw scan; its inverse, -t '[FILE,1]',\n"
        "brings other images and labels of the raw scan's world into the template's.\n\n"
        "Which voxels are brain is said by one of\n"
        "  --strip deepbet    (default) a network for T1 scans of adults; pip install 'sitreg-lumir[strip]'\n"
        "  --mask MASK        for all other contrasts: the mask of a T1 scan that lies on this one, or any other; it\n"
        "                     may have another grid of the same world\n"
        "  --strip template   the template's brain, carried over by the affine; some millimetres off\n"
        "  --strip none       the scan shows the brain alone already\n\n"
        "example: sitreg-lumir preprocess head_t1.nii.gz -o prepared/t1.nii.gz\n"
        "         sitreg-lumir preprocess head_t2.nii.gz --mask brain_of_t1.nii.gz -o prepared/t2.nii.gz\n"
        "         sitreg-lumir apply -t '[prepared/t1_points-raw-to-template.tfm,1]' --labels lesions_of_t1.nii.gz \\\n"
        "             --reference prepared/t1.nii.gz -o prepared/t1_lesions.nii.gz"
    )
    summary = "Make a LUMIR-like volume of a raw head scan: stripped, without bias field, aligned to MNI152, 1 mm."
    parser = verb(verbs, "preprocess", summary, more)
    parser.add_argument("raw", type=Path, metavar="RAW", help="NIfTI, any orientation and voxel size")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".nii.gz or .nii")
    parser.add_argument("--mask", type=Path, metavar="MASK", help="NIfTI, above 0 in the brain")
    parser.add_argument("--strip", choices=("deepbet", "template", "none"), help="see below (default: deepbet)")
    parser.add_argument("--no-bias-correction", action="store_true", help="leave the bias field as it is")
    add_header_options(parser)
    parser.set_defaults(run=_preprocess)


def _preprocess(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "preprocess")
    from sitreg_lumir.preprocessing.preprocess import preprocess

    preprocess(
        options.raw, options.output, mask=options.mask, strip=options.strip,
        bias_correction=not options.no_bias_correction, header=options.header,
        assume_orientation=options.assume_orientation,
    )  # fmt: skip
