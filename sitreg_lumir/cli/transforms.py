"""The verbs that use transforms: apply, resample-field."""

import argparse
from pathlib import Path

from sitreg_lumir.cli.parsing import Verbs, add_header_options, refuse, verb


def add_resample_field(verbs: Verbs) -> None:
    """Adds the verb `resample-field`."""
    more = (
        "FIELD is a field as `predict` writes it: (X, Y, Z, 3), in voxels of its own grid, whose place in the world\n"
        "its header gives. OUT is the same map of the world in voxels of GRID, so it warps images that lie on GRID\n"
        "(same shape and affine). With --itk it is in mm, LPS, intent 1007, for ITK, ANTs and 3D Slicer, which leave\n"
        "points outside GRID where they are.\n"
        "Where GRID reaches beyond FIELD's grid, the displacement of FIELD's border holds: the map stays continuous,\n"
        "but nothing was registered there.\n"
        "Between FIELD's voxels the displacement is linear: a finer grid samples the map, it adds no detail. That is\n"
        "for fields of other software, and for those of `predict` without their map. FIELD may also be an exact map,\n"
        "map_<pair>.safetensors of `predict --save-maps`, which is evaluated at each voxel. `register` writes its\n"
        "fields on the scans' own grids in that way, and `apply -t registration` moves images onto any grid.\n"
        "A provenance (FIELD's .json) is continued beside OUT.\n"
        "Memory: that of FIELD and MOVING and some 0.5 GB, whatever the size of GRID (under 1 GB in all from 1 mm to\n"
        "50 million voxels). Disk: until a .nii.gz is whole, its uncompressed size, too, in the same folder\n"
        "(12 bytes a voxel, and 4 more with --warped).\n\n"
        "example: sitreg-lumir resample-field disp_0100_0101.nii.gz --to fixed_half_mm.nii.gz \\\n"
        "             -o fine/disp_0100_0101.nii.gz --image moving_half_mm.nii.gz --warped fine/warped_0100_0101.nii.gz"
    )
    summary = "Resample a field on another grid of the same world, most of all a finer one, in bounded memory."
    parser = verb(verbs, "resample-field", summary, more, former="carry")
    parser.add_argument("field", type=Path, metavar="FIELD", help="disp_<pair>.nii.gz, or map_<pair>.safetensors")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="GRID", help="NIfTI image with the new grid, e.g. the fixed image"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="the field to write, .nii.gz or .nii"
    )
    parser.add_argument("--itk", action="store_true", help="write an ITK displacement field, mm")
    parser.add_argument("--image", type=Path, metavar="MOVING", help="moving image, on any grid of the same world")
    parser.add_argument(
        "--warped", type=Path, metavar="OUT2", help="where MOVING goes, sampled once on GRID; 0 where it does not reach"
    )
    parser.add_argument(
        "--nearest",
        action="store_true",
        help="MOVING is a label map: do not interpolate (default: only if its header says LABEL)",
    )
    add_header_options(parser)
    parser.set_defaults(run=_resample_field)


def _resample_field(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "resample-field")
    from sitreg_lumir.challenge.resample_field import resample_field

    resample_field(
        options.field,
        options.to,
        options.output,
        itk=options.itk,
        image=options.image,
        warped=options.warped,
        nearest=options.nearest,
        header=options.header,
        assume_orientation=options.assume_orientation,
    )


def add_apply(verbs: Verbs) -> None:
    """Adds the verb `apply`."""
    more = (
        "-t is a registration's folder, of which the exact map is used, on any grid (of folders without a map the\n"
        "fields); or a map_<pair>.safetensors of `predict --save-maps`, which stands for a folder in all below; or\n"
        "a file of ITK, ANTs or 3D Slicer: a displacement field (NIfTI) or an affine (.tfm, .txt, .mat; '[FILE,1]' is\n"
        "its inverse). Several are composed as by antsApplyTransforms: the first is the one next to the result's\n"
        "grid. The image is sampled once.\n\n"
        "Points go the other way than images: a transform tells each point of the grid it lies on where to look in\n"
        "the other image. So an image comes onto the fixed grid by the field that lies on the fixed grid, but a point\n"
        "of the moving image gets to the fixed one by the field that lies on the moving grid.\n"
        "  With a folder, --to says where things go, and one line serves all kinds: points take the inverse of the\n"
        "    list, the other field of the folder, the inverse of affines, the last first.\n"
        "  Files alone are used as they are, the first one first, without --to. For points give files that map\n"
        "    points, as to antsApplyTransformsToPoints: -t '[0GenericAffine.mat,1]' -t 1InverseWarp.nii.gz carries\n"
        "    them from moving to fixed.\n\n"
        "Images are interpolated linearly: integers are rounded and keep their type, all else becomes float32.\n"
        "Nothing is smoothed for a coarser grid. Label maps take the nearest voxel and keep values and type. What is\n"
        "a label map is never guessed from the type: say --labels, or let the header's intent say LABEL. Integers of\n"
        "more than 16 bits are written as int32. Of 4-D images every frame is moved.\n"
        "Outside its own grid a field moves nothing, as in ITK (a note tells if that happens); points there become\n"
        "NaN and are counted.\n\n"
        "example: sitreg-lumir apply -t registration --to fixed --image moving_t2.nii.gz -o t2_on_fixed.nii.gz\n"
        "         sitreg-lumir apply -t registration --to fixed --points moving.csv -o points_in_fixed.csv\n"
        "         sitreg-lumir apply -t 1Warp.nii.gz -t 0GenericAffine.mat --labels moving_labels.nii.gz \\\n"
        "             --reference fixed.nii.gz -o labels_on_fixed.nii.gz"
    )
    summary = "Move an image, a label map or points by transforms, composed and sampled once."
    parser = verb(verbs, "apply", summary, more)
    parser.add_argument(
        "-t",
        "--transform",
        action="append",
        required=True,
        metavar="XFM",
        help="a registration's folder, or a transform's file, see below; may be repeated",
    )
    parser.add_argument(
        "--to",
        choices=("fixed", "moving"),
        help="the scan that things are moved onto; needed with a folder, and only there",
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--image", type=Path, metavar="FILE", help="the image to move, interpolated linearly")
    kind.add_argument("--labels", type=Path, metavar="FILE", help="the label map to move, nearest voxels")
    kind.add_argument(
        "--points",
        type=Path,
        metavar="CSV",
        help="the points to move: columns x,y,z, RAS, mm; other columns and the order stay",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="what is written: .nii.gz or .nii, for points .csv",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="GRID",
        help="NIfTI image with the grid wanted, e.g. the fixed image (default: the grid of the first -t, a field)",
    )
    parser.add_argument(
        "--linear-labels",
        action="store_true",
        help="interpolate each label's own map, the largest wins: smoother borders than the nearest voxel's",
    )
    parser.add_argument("--lps", action="store_true", help="the points are in LPS (ITK's), as read and as written")
    parser.add_argument(
        "--outside",
        type=float,
        metavar="VALUE",
        help="value where the image does not reach (default: 0; nan for floats)",
    )
    add_header_options(parser)
    parser.set_defaults(run=_apply)


def _apply(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "apply")
    from sitreg_lumir.registration.apply import apply

    apply(
        options.transform, options.output, image=options.image, labels=options.labels, points=options.points,
        to=options.to, reference=options.reference, linear_labels=options.linear_labels, lps=options.lps,
        outside=options.outside, header=options.header, assume_orientation=options.assume_orientation,
    )  # fmt: skip
