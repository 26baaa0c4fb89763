"""The verb for many scans at once: template."""

import argparse
import shlex
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

_MORE = """\
Scans of different brains, one contrast, any NIfTI files; skull-stripped, or with --masks, or --strip finds the brain.
No scan and no atlas leads: the template has the mean size of the brains (their alignments to MNI152, averaged) and the
mean of their shapes (the registrations' control points, averaged). The order of the images changes nothing.

OUT gets
  template.nii.gz              the average brain, 0..255, exactly 0 outside the brain
  template_brain.nii.gz        where at least half of the scans show brain
  template_deviation.nii.gz    standard deviation between the scans, units of the template
  affine_mean.nii.gz           the mean by alignments alone, on the same grid, to compare with
  summary.json, picture.png    how far the mean moved in each round, sharpness, each scan's correlation; a picture
  maps/NAME.safetensors        with --save maps: each scan's exact map to the template, which `apply -t` uses
  warped/NAME.nii.gz           with --save warped: each scan on the template's grid
OUT/work holds what is done of each scan until all is written: the same command goes on where it was stopped.

example: sitreg-lumir template --images brains/*.nii.gz -o average
         sitreg-lumir apply -t average/maps/NAME.safetensors --to fixed --labels NAME_labels.nii.gz -o moved.nii.gz
"""


def add_template(verbs: Verbs) -> None:
    """Adds the verb `template`."""
    parser = verb(verbs, "template", "Make an unbiased average brain of many scans.", _MORE)
    parser.add_argument("--images", nargs="+", required=True, metavar="IMAGE", help="two or more scans")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the results")
    parser.add_argument("--masks", nargs="+", metavar="FILE", help="a brain mask for each image, in their order")
    add_strip(parser)
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="of registering all to the mean, at most (default: 3)"
    )
    parser.add_argument(
        "--tolerance",
        dest="tolerance_mm",
        type=float,
        default=0.1,
        metavar="MM",
        help="a round whose mean map moves the brain, or differs from the last round's, by less is the last, mean over "
        "the brain (default: 0.1)",
    )
    parser.add_argument(
        "--spacing",
        dest="spacing_mm",
        type=float,
        metavar="MM",
        help="voxel size of the template (default: the model's)",
    )
    parser.add_argument(
        "--average",
        choices=("trimmed", "mean", "median"),
        default="trimmed",
        help="of the intensities at each voxel; trimmed: without a tenth at each end (default: trimmed)",
    )
    parser.add_argument(
        "--sharpen",
        type=float,
        default=0.5,
        metavar="AMOUNT",
        help="of unsharp masking (Gaussian of 2 mm) after each round, 0 for none (default: 0.5)",
    )
    parser.add_argument(
        "--refine", type=int, default=0, metavar="N", help="steps of optimisation for each registration (default: 0)"
    )
    parser.add_argument(
        "--align",
        choices=("each", "auto", "none"),
        default="each",
        help="each scan to MNI152, at first (default: each)",
    )
    add_header_options(parser)
    parser.add_argument(
        "--save", action="append", metavar="NAMES", help="of each scan: maps, warped, all or none (default: maps)"
    )
    add_model(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a template in OUT that was made otherwise")
    parser.set_defaults(run=_template)


def _template(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "template")
    from sitreg_lumir.average.build import build
    from sitreg_lumir.average.options import TemplateOptions
    from sitreg_lumir.average.subjects import list_files
    from sitreg_lumir.cli.progress import show_progress

    show_progress()
    options.save = options.save or "maps"
    chosen = of_arguments(TemplateOptions, options)
    files = list_files(options.images, options.masks, chosen)  # before the members are loaded
    model = load_chosen(options)
    summary = build(options.images, options.masks, options.output, model, chosen, overwrite=options.overwrite)
    for line in report_lines(summary):
        print(line)
    print(f"written: {options.output}; look at {options.output / 'picture.png'}")
    print(f"next: {_next(options.output, str(files[0].image), summary)}")


def report_lines(summary: dict[str, Any]) -> list[str]:
    """What is worth knowing of a template: how it compares with the affine mean, and scans that do not fit."""
    last, affine = summary["rounds"][-1], summary["affine_mean"]["averaged"]
    lines = [
        f"mean of {len(summary['scans'])} scans, {len(summary['rounds'])} rounds: gradient "
        f"{affine['gradient_per_mm']:.4f} -> {last['averaged']['gradient_per_mm']:.4f} per mm against the affine mean "
        f"(sharpened {last['sharpened']['gradient_per_mm']:.4f}), deviation between scans "
        f"{affine['deviation']:.3f} -> {last['averaged']['deviation']:.3f}"
    ]
    return lines + [
        f"warning: {scan['name']}: hardly resembles the template (correlation {scan['correlation']:.2f}); look at it"
        for scan in summary["scans"]
        if not scan["fits"]
    ]


def _next(out: Path, image: str, summary: dict[str, Any]) -> str:
    from sitreg_lumir.registration.scan import BUILT_IN

    quoted = shlex.quote
    maps = out / "maps"
    if maps.is_dir() and image not in BUILT_IN:
        name = _name_of(image, summary)
        moved = quoted(f"{name}_on_template.nii.gz")
        return (
            f"sitreg-lumir apply -t {quoted(str(maps / f'{name}.safetensors'))} --to fixed --image {quoted(image)} "
            f"-o {moved}"
        )
    template = quoted(str(out / "template.nii.gz"))
    return f"sitreg-lumir register --fixed {template} --moving {quoted(image)} -o registration"


def _name_of(image: str, summary: dict[str, Any]) -> str:
    """The name that a scan has in a template, by its content."""
    from sitreg_lumir.io.checksum import sha256_file

    digest = sha256_file(Path(image))
    return next(str(scan["name"]) for scan in summary["scans"] if scan["image"]["sha256"] == digest)
