"""The one command, `sitreg-lumir`. Heavy imports happen only in the verb that needs them."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from sitreg_lumir import __version__
from sitreg_lumir.errors import InputError, RunStoppedError

DESCRIPTION = """\
SITReg on MIND features: symmetric, inverse consistent, diffeomorphic brain MRI registration.

verbs, each with an example:
  fit        train a network
             sitreg-lumir fit --config ens_seed3 --data.root LUMIR
  validate   score a checkpoint on the validation pairs
             sitreg-lumir validate --config runs/mind/config.yaml --ckpt_path runs/mind/checkpoints/last.ckpt
  test       the same, by Lightning's test loop
             sitreg-lumir test --config runs/mind/config.yaml --ckpt_path runs/mind/checkpoints/last.ckpt
  predict    write displacement fields for the pairs of a data set, by one network or an ensemble
             sitreg-lumir predict --members A.ckpt B.ckpt --data.root LUMIR -o predictions
  carry      carry a field to another grid of the same world, most of all a finer one
             sitreg-lumir carry disp_0100_0101.nii.gz --to fixed_half_mm.nii.gz -o fine/disp_0100_0101.nii.gz
  apply      move images, label maps and points by transforms, composed and sampled once
             sitreg-lumir apply -t registration --to fixed --labels moving_labels.nii.gz -o labels_on_fixed.nii.gz
  evaluate   score a folder of fields by the challenge's definitions
             sitreg-lumir evaluate predictions --dataset LUMIR/LUMIR_dataset.json
  submit     check a folder of fields and zip it for the challenge
             sitreg-lumir submit predictions --dataset LUMIR/LUMIR25_dataset.json -o submission.zip
  container  write the fields of the challenge's test phase, as its container does
             sitreg-lumir container --dataset LUMIR25_dataset.json --images LUMIR --members members -o output
  export     turn a checkpoint into safetensors + JSON
             sitreg-lumir export runs/mind/checkpoints/last.ckpt -o mind.safetensors
  demo       make small data, train, predict, evaluate, draw: all in minutes on a CPU
             sitreg-lumir demo -o demo

`sitreg-lumir VERB --help` tells a verb's options. Configs by name: see `sitreg-lumir fit --list`.
"""

FIT_MORE = """\
Every setting of the data, the model and Lightning's Trainer is an option, too:
  --data.root FOLDER|JSON      the LUMIR data set (needed)
  --data.validation '[LUMIR_dataset_multimodal.json]'    more lists of validation pairs
  --data.batch_size 4          pairs in one step, over all devices
  --model.augmentation Augmentation    augmented views for the network
  --trainer.max_epochs 30      --trainer.devices 3      --trainer.precision 32-true
`sitreg-lumir fit --options` lists all of them; `--print_config` shows the resolved config.

example: sitreg-lumir fit --config minilumir/mind_small --data.root ../shared/minilumir/2mm
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; 0 when it worked, 2 for a user's mistake (told in one line)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        "sitreg-lumir",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sitreg-lumir {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, prog="sitreg-lumir")
    for add in (
        _add_fit, _add_validate, _add_test, _add_predict, _add_carry, _add_apply, _add_evaluate, _add_submit,
        _add_container, _add_export, _add_demo,
    ):  # fmt: skip
        add(verbs)
    options, rest = parser.parse_known_args(arguments)
    run: Callable[[argparse.Namespace, list[str]], None] = options.run
    try:
        run(options, rest)
    except InputError as error:
        print(f"sitreg-lumir: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RunStoppedError as stop:
        print(f"sitreg-lumir: {stop}", file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nsitreg-lumir: stopped", file=sys.stderr)
        return 130
    return 0


Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _verb(verbs: Verbs, name: str, summary: str, more: str) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        description=summary,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _refuse(rest: Sequence[str], parser_of: str) -> None:
    if rest:
        raise InputError(f"unknown argument {rest[0]!r}; see `sitreg-lumir {parser_of} --help`")


def _add_fit(verbs: Verbs) -> None:
    parser = _verb(verbs, "fit", "Train a network into runs/<name>/.", FIT_MORE)
    parser.add_argument("--config", "-c", action="append", default=[], help="name of a shipped config, or a YAML file")
    parser.add_argument("--name", help="name of the run (default: the config's name)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--wandb", choices=("offline", "online", "off"), default="offline", help="default: offline")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="CKPT",
        help="go on from the run's last.ckpt, or from CKPT",
    )
    parser.add_argument("--checkpoint-every", type=int, default=50, metavar="STEPS", help="default: 50")
    parser.add_argument(
        "--keep-every", type=int, default=5, metavar="EPOCHS", help="checkpoints that stay (default: 5)"
    )
    parser.add_argument("--list", action="store_true", help="list the shipped configs and stop")
    parser.add_argument("--options", action="store_true", help="list every option and stop")
    parser.set_defaults(run=_fit)


def _fit(options: argparse.Namespace, rest: list[str]) -> None:
    from sitreg_lumir.train.configs import config_names

    if options.list:
        print("\n".join(config_names()))
        return
    passed = [argument for config in options.config for argument in ("--config", config)] + rest
    if options.options or any(argument.startswith("--print_config") for argument in rest):
        from sitreg_lumir.train.run import build

        build([*passed, "--help"] if options.options else passed)
        return
    name = options.name or (Path(options.config[-1]).stem if options.config else "mind")
    from sitreg_lumir.train.run import RunOptions, fit

    folder = options.runs / name
    resume = None
    if options.resume is not None:
        resume = folder / "checkpoints" / "last.ckpt" if options.resume == "last" else Path(options.resume)
    fit(passed, RunOptions(folder, options.wandb, resume, options.checkpoint_every, options.keep_every))


def _add_validate(verbs: Verbs) -> None:
    _add_scoring(verbs, "validate")


def _add_test(verbs: Verbs) -> None:
    _add_scoring(verbs, "test")


def _add_scoring(verbs: Verbs, name: str) -> None:
    more = (
        f"example: sitreg-lumir {name} --config runs/mind/config.yaml --ckpt_path runs/mind/checkpoints/last.ckpt\n"
        "Settings of data and Trainer are options as in `fit`: --data.root, --data.validation, --trainer.devices ..."
    )
    parser = _verb(verbs, name, "Score a checkpoint on the validation pairs.", more)
    parser.add_argument("--config", "-c", action="append", default=[], help="the run's config.yaml")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint to score")
    parser.set_defaults(run=_validate)


def _validate(options: argparse.Namespace, rest: list[str]) -> None:
    from sitreg_lumir.train.run import validate

    passed = [argument for config in options.config for argument in ("--config", config)] + rest
    validate(passed, options.ckpt_path, options.verb)


def _add_predict(verbs: Verbs) -> None:
    more = (
        "A field is in voxels on the fixed grid, float32, (X, Y, Z, 3): warped(x) = moving(x + disp(x)).\n"
        "A pair is skipped when its field was made from the same images by the same members and options.\n"
        "Settings of the data are options, too: --data.validation '[LUMIR_dataset_multimodal.json]' adds pairs.\n\n"
        "example: sitreg-lumir predict --members runs/mind/checkpoints/last.ckpt --data.root LUMIR -o predictions"
    )
    parser = _verb(verbs, "predict", "Write a displacement field for each validation pair of a data set.", more)
    parser.add_argument("--members", nargs="+", required=True, metavar="PATH", help=".ckpt or .safetensors, or folders")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the fields go")
    parser.add_argument("--inverse", action="store_true", help="also write inverse_<pair>.nii.gz, on the moving grid")
    parser.add_argument("--warped", action="store_true", help="also write warped_<pair>.nii.gz, the moved image")
    parser.add_argument(
        "--disagreement",
        action="store_true",
        help="also write disagreement_<pair>.nii.gz: how far the members' updates differ, mm, fixed grid; members meet "
        "again at each stage, so a lower bound, and no uncertainty (needs two members or more)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write fields again that were made otherwise")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: auto")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="processes that share the pairs (default: 1)"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the convolutions: bfloat16 is faster, its fields differ by hundredths of a voxel (default: float32)",
    )
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace, rest: list[str]) -> None:
    from sitreg_lumir.train.predict import predict

    predict(
        options.members, options.output, rest, inverse=options.inverse, warped=options.warped,
        disagreement=options.disagreement, overwrite=options.overwrite, device=options.device, devices=options.devices,
        precision=options.precision,
    )  # fmt: skip


def _add_carry(verbs: Verbs) -> None:
    more = (
        "FIELD is a field as `predict` writes it: (X, Y, Z, 3), in voxels of its own grid, whose place in the world\n"
        "its header gives. OUT is the same map of the world in voxels of GRID, so it warps images that lie on GRID\n"
        "(same shape and affine). With --itk it is in mm, LPS, intent 1007, for ITK, ANTs and 3D Slicer, which leave\n"
        "points outside GRID where they are.\n"
        "Where GRID reaches beyond FIELD's grid, the displacement of FIELD's border holds: the map stays continuous,\n"
        "but nothing was registered there.\n"
        "Between FIELD's voxels the displacement is linear: a finer grid samples the map, it adds no detail.\n"
        "A provenance (FIELD's .json) is carried on beside OUT.\n"
        "Memory: that of FIELD and MOVING and some 0.5 GB, whatever the size of GRID (under 1 GB in all from 1 mm to\n"
        "50 million voxels). Disk: until a .nii.gz is whole, its uncompressed size, too, in the same folder\n"
        "(12 bytes a voxel, and 4 more with --warped).\n\n"
        "example: sitreg-lumir carry disp_0100_0101.nii.gz --to fixed_half_mm.nii.gz -o fine/disp_0100_0101.nii.gz "
        "\\\n             --image moving_half_mm.nii.gz --warped fine/warped_0100_0101.nii.gz"
    )
    summary = "Carry a field to another grid of the same world, most of all a finer one, in bounded memory."
    parser = _verb(verbs, "carry", summary, more)
    parser.add_argument("field", type=Path, metavar="FIELD", help="disp_<fixed>_<moving>.nii.gz")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="GRID", help="NIfTI image with the new grid, e.g. the fixed image"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".nii.gz or .nii")
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
    parser.add_argument("--header", choices=("sform", "qform"), help="which to use, in every file, if they differ")
    parser.add_argument(
        "--assume-orientation", metavar="RAS", help="of files whose header does not say where the axes point to"
    )
    parser.set_defaults(run=_carry)


def _carry(options: argparse.Namespace, rest: list[str]) -> None:
    _refuse(rest, "carry")
    from sitreg_lumir.files.carry import carry

    carry(
        options.field, options.to, options.output, itk=options.itk, image=options.image, warped=options.warped,
        nearest=options.nearest, header=options.header, assume_orientation=options.assume_orientation,
    )  # fmt: skip


def _add_apply(verbs: Verbs) -> None:
    more = (
        "-t is a registration's folder, with from-moving_to-fixed_xfm.nii.gz and from-fixed_to-moving_xfm.nii.gz, or\n"
        "a file of ITK, ANTs or 3D Slicer: a displacement field (NIfTI) or an affine (.tfm, .txt, .mat; '[FILE,1]' is\n"
        "its inverse). Several are composed as by antsApplyTransforms: the first is the one next to the result's\n"
        "grid. The image is sampled once.\n\n"
        "Points go the other way than images: a transform tells each point of the grid it lies on where to look in\n"
        "the other image. So an image comes onto the fixed grid by the field that lies on the fixed grid, but a point\n"
        "of the moving image gets to the fixed one by the field that lies on the moving grid.\n"
        "  With a folder, --to says where things go, and one line serves all kinds: points take the inverse of the\n"
        "    list by themselves, the other field of the folder, the inverse of affines, the last first.\n"
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
    parser = _verb(verbs, "apply", summary, more)
    parser.add_argument(
        "-t", "--transform", action="append", required=True, metavar="XFM", help="folder or file; may be repeated"
    )
    parser.add_argument(
        "--to", choices=("fixed", "moving"), help="where things go; needed with a folder, and only there"
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--image", type=Path, metavar="FILE", help="NIfTI, interpolated linearly")
    kind.add_argument("--labels", type=Path, metavar="FILE", help="NIfTI, nearest voxels")
    kind.add_argument(
        "--points", type=Path, metavar="CSV", help="header with x,y,z, RAS, mm; other columns and the order stay"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".nii.gz, .nii; points: .csv")
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
        "--outside", type=float, metavar="VALUE", help="where the image does not reach (default: 0; nan for floats)"
    )
    parser.add_argument("--header", choices=("sform", "qform"), help="which to use, in every file, if they differ")
    parser.add_argument(
        "--assume-orientation", metavar="RAS", help="of images whose header does not say where the axes point to"
    )
    parser.set_defaults(run=_apply)


def _apply(options: argparse.Namespace, rest: list[str]) -> None:
    _refuse(rest, "apply")
    from sitreg_lumir.files.apply import apply

    apply(
        options.transform, options.output, image=options.image, labels=options.labels, points=options.points,
        to=options.to, reference=options.reference, linear_labels=options.linear_labels, lps=options.lps,
        outside=options.outside, header=options.header, assume_orientation=options.assume_orientation,
    )  # fmt: skip


def _add_evaluate(verbs: Verbs) -> None:
    more = "example: sitreg-lumir evaluate predictions --dataset LUMIR/LUMIR_dataset.json"
    parser = _verb(verbs, "evaluate", "Score a folder of fields by the challenge's definitions.", more)
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="FOLDER", help="with disp_<fixed>_<moving>.nii.gz files"
    )
    parser.add_argument("--dataset", type=Path, nargs="+", required=True, metavar="JSON", help="list(s) of pairs")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="for evaluation.csv/.json (default: FOLDER)"
    )
    parser.add_argument("--identity", action="store_true", help="score no deformation at all (affine only)")
    parser.add_argument(
        "--report",
        action="store_true",
        help="also write report.html beside them: one file to look at, the worst cases first",
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace, rest: list[str]) -> None:
    _refuse(rest, "evaluate")
    if options.folder is None and not options.identity:
        raise InputError("name the folder of fields, or --identity to score the images as they are")
    if options.report and options.identity and options.output is None:
        raise InputError("--report with --identity needs -o FOLDER, for report.html")
    from sitreg_lumir.data.lumir import read_dataset
    from sitreg_lumir.files.evaluate import evaluate

    datasets = [read_dataset(path, validation=True) for path in options.dataset]
    result = evaluate(options.folder, datasets, options.output, identity=options.identity)
    if options.report:
        from sitreg_lumir.files.worst_pairs import report_evaluation

        fields = None if options.identity else options.folder
        report_evaluation((options.output or options.folder) / "report.html", result, datasets, fields)


def _add_submit(verbs: Verbs) -> None:
    more = (
        "Refused, with every reason: fields that are missing, of another shape or type than float32, not finite, not\n"
        "what their JSON describes, made from other images, or not all by the same members and options. The images\n"
        "need not be there. Stored under the names that the official evaluation looks for; equal fields give equal\n"
        "bytes.\n\n"
        "example: sitreg-lumir submit predictions --dataset LUMIR/LUMIR25_dataset.json -o submission.zip"
    )
    parser = _verb(verbs, "submit", "Check a folder of fields and zip it for the challenge.", more)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with disp_<fixed>_<moving>.nii.gz files")
    parser.add_argument("--dataset", type=Path, required=True, metavar="JSON", help="the list of pairs")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of the images (default: that of the JSON)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ZIP", help="ends in .zip")
    parser.set_defaults(run=_submit)


def _submit(options: argparse.Namespace, rest: list[str]) -> None:
    _refuse(rest, "submit")
    from sitreg_lumir.data.lumir import read_dataset
    from sitreg_lumir.files.submission import submit

    dataset = read_dataset(options.dataset, validation=True, check_files=False, images=options.images)
    submit(options.folder, dataset, options.output)


def _add_container(verbs: Verbs) -> None:
    more = (
        "The defaults are the challenge's mounts; the Dockerfile calls this verb without arguments. Each default can\n"
        "be set by an environment variable instead: SITREG_DATASET, SITREG_IMAGES, SITREG_MEMBERS, SITREG_OUTPUT.\n"
        "A second call goes on where a first was stopped; fields that other members made are written anew.\n\n"
        "example: sitreg-lumir container --dataset LUMIR25_dataset.json --images LUMIR --members members -o output"
    )
    parser = _verb(verbs, "container", "Write the fields of the challenge's test phase, as its container does.", more)
    for option, name, path, text in (
        ("--dataset", "JSON", "/app/LUMIR25_dataset.json", "the list of pairs"),
        ("--images", "FOLDER", "/app/input", "what the JSON's paths start from; may be read-only"),
        ("--members", "PATH", "/app/members", "the weights: a folder or a file"),
        ("--output", "FOLDER", "/app/output", "where the fields go"),
    ):
        path = os.environ.get(f"SITREG_{option[2:].upper()}") or path
        names = ("-o", option) if option == "--output" else (option,)
        parser.add_argument(*names, type=Path, default=Path(path), metavar=name, help=f"{text} (default: {path})")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: auto")
    parser.set_defaults(run=_container)


def _container(options: argparse.Namespace, rest: list[str]) -> None:
    _refuse(rest, "container")
    from sitreg_lumir.train.container import run_container

    run_container(options.dataset, options.images, options.members, options.output, device=options.device)


def _add_export(verbs: Verbs) -> None:
    more = "example: sitreg-lumir export runs/mind/checkpoints/last.ckpt -o mind.safetensors"
    parser = _verb(verbs, "export", "Turn a checkpoint into safetensors + JSON that hold all that predict needs.", more)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="ends in .safetensors")
    parser.add_argument("--half", action="store_true", help="store half precision")
    parser.add_argument("--official", action="store_true", help="CKPT was saved by the authors' code; needs --dataset")
    parser.add_argument("--dataset", type=Path, metavar="JSON", help="with --official: the data set it was trained on")
    parser.add_argument("--licence", default=None, help="of the weights, for the card")
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace, rest: list[str]) -> None:
    _refuse(rest, "export")
    from sitreg_lumir.train.predict import export

    if options.official != (options.dataset is not None):
        raise InputError("--official and --dataset belong together: the file does not say its grid, the data set does")
    export(options.checkpoint, options.output, half=options.half, licence=options.licence, dataset=options.dataset)


def _add_demo(verbs: Verbs) -> None:
    more = "example: sitreg-lumir demo -o demo"
    parser = _verb(verbs, "demo", "Make small data, train, predict, evaluate and draw, in minutes on a CPU.", more)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), metavar="FOLDER", help="default: demo")
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: the demo config's)")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace, rest: list[str]) -> None:
    _refuse(rest, "demo")
    from sitreg_lumir.train.demo import demo

    demo(options.output, options.steps)


if __name__ == "__main__":
    sys.exit(main())
