"""The verbs of a data set: predict, evaluate, submit, container, demo."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sitreg_lumir.cli.parsing import Verbs, add_allow_imports, refuse, verb
from sitreg_lumir.data.groups import labels_problem
from sitreg_lumir.data.location import usual_data
from sitreg_lumir.errors import InputError

USUAL_DATA = " (default: $SITREG_LUMIR_DATA, else data/LUMIR)"
_FORMER_VARIABLES = {
    "--data": "SITREG_DATASET",
    "--images": "SITREG_IMAGES",
    "--members": "SITREG_MEMBERS",
    "--output": "SITREG_OUTPUT",
}


def add_predict(verbs: Verbs) -> None:
    """Adds the verb `predict`."""
    more = (
        "A field is in voxels on the fixed grid, float32, (X, Y, Z, 3): warped(x) = moving(x + disp(x)).\n"
        "A pair is skipped when its field was made from the same images by the same members and options.\n"
        "Settings of the data are options, too: --data.validation '[LUMIR_dataset_multimodal.json]' adds pairs.\n\n"
        "example: sitreg-lumir predict --members runs/mind/checkpoints/last.ckpt --data LUMIR -o predictions"
    )
    parser = verb(verbs, "predict", "Write a displacement field for each validation pair of a data set.", more)
    parser.add_argument(
        "--members",
        nargs="+",
        metavar="PATH",
        help="trained members: files, folders, or shipped ones by name, such as member1 (default: all shipped ones)",
    )
    parser.add_argument("--data", metavar="DATA", help="the data set: its folder or its JSON" + USUAL_DATA)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the fields go")
    parser.add_argument("--inverse", action="store_true", help="also write inverse_<pair>.nii.gz, on the moving grid")
    parser.add_argument("--warped", action="store_true", help="also write warped_<pair>.nii.gz, the moved image")
    parser.add_argument(
        "--disagreement",
        action="store_true",
        help="also write disagreement_<pair>.nii.gz: how far the members' updates differ, mm, fixed grid; members meet "
        "again at each stage, so a lower bound, and no uncertainty (needs two members or more)",
    )
    parser.add_argument(
        "--flip", action="store_true", help="also run the members on mirrored images, and average; twice the time"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="fields are samples of the exact map, inverse to each other and of a slightly better Dice, instead of "
        "the network's own, which the challenge defines",
    )
    parser.add_argument(
        "--save-maps",
        action="store_true",
        help="also write map_<pair>.safetensors (and .json), the exact map, for `submit --exact`, `apply -t`, load_map",
    )
    parser.add_argument("--overwrite", action="store_true", help="write fields again that were made otherwise")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="what computes (default: auto)"
    )
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="processes that share the pairs (default: 1)"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the convolutions: bfloat16 is faster, its fields differ by hundredths of a voxel (default: float32)",
    )
    add_allow_imports(parser)
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace, rest: list[str]) -> None:
    if options.data is not None:
        rest = [f"--data.root={options.data}", *rest]
    elif not any(argument.split("=")[0] == "--data.root" for argument in rest):
        rest = [f"--data.root={usual_data()}", *rest]
    from sitreg_lumir.challenge.predict import predict

    predict(
        options.members, options.output, rest, inverse=options.inverse, warped=options.warped,
        disagreement=options.disagreement, overwrite=options.overwrite, device=options.device, devices=options.devices,
        precision=options.precision, flip=options.flip, exact=options.exact, save_maps=options.save_maps,
        allow_imports=options.allow_imports,
    )  # fmt: skip


def add_evaluate(verbs: Verbs) -> None:
    """Adds the verb `evaluate`."""
    more = (
        "A pair's group is what comes first of: --groups; its own \"group\" in the dataset JSON; the evaluator's\n"
        "*_evaluation_config.json beside that JSON; the challenge's lists of 2025 (in-domain, high-field,\n"
        "multi-modal, landmarks), if these are its pairs. Labels: --labels; evaluation_labels of the dataset JSON;\n"
        "those of the pair's list; else all that are in both label maps. 0 is a label like any other.\n\n"
        "example: sitreg-lumir evaluate predictions --data LUMIR/LUMIR25_dataset.json"
    )
    parser = verb(verbs, "evaluate", "Score a folder of fields by the challenge's definitions.", more)
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="FOLDER", help="with disp_<fixed>_<moving>.nii.gz files"
    )
    parser.add_argument(
        "--data",
        "--dataset",
        dest="data",
        type=Path,
        nargs="+",
        metavar="DATA",
        help="list(s) of pairs" + USUAL_DATA,
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="where evaluation.csv and .json go (default: FOLDER)"
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        metavar="FILE",
        help="the evaluator's *_evaluation_config.json, or folders of them: which pairs are in which group, what is "
        "scored there; none: contrasts only, and all that the files allow",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="labels for Dice and HD95: whole numbers, or found: those in both label maps",
    )
    parser.add_argument("--identity", action="store_true", help="score no deformation at all (affine only)")
    parser.add_argument(
        "--report",
        action="store_true",
        help="also write report.html beside them: one file to look at, the worst cases first",
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "evaluate")
    if options.folder is None and not options.identity:
        raise InputError("name the folder of fields, or --identity to score the images as they are")
    if options.report and options.identity and options.output is None:
        raise InputError("--report with --identity needs -o FOLDER, for report.html")
    from sitreg_lumir.challenge.evaluate import evaluate
    from sitreg_lumir.data.lumir import read_dataset

    groups = None if options.groups is None else [Path(name) for name in options.groups if name != "none"]
    if groups and len(groups) < len(options.groups):
        raise InputError("--groups takes files or none, not both")
    datasets = [read_dataset(path, validation=True, groups=groups) for path in options.data or [usual_data()]]
    if groups and not any(dataset.groups for dataset in datasets):
        raise InputError(f"--groups {' '.join(options.groups)}: lists none of the pairs; give those of this data set")
    labels = _labels(options.labels)
    result = evaluate(options.folder, datasets, options.output, identity=options.identity, labels=labels)
    if options.report:
        from sitreg_lumir.challenge.evaluation_report import report_evaluation

        fields = None if options.identity else options.folder
        report_evaluation((options.output or options.folder) / "report.html", result, datasets, fields)


def _labels(words: list[str] | None) -> Sequence[int] | Literal["found"] | None:
    """What ``--labels`` says."""
    if words is None or words == ["found"]:
        return "found" if words else None
    problem = labels_problem(words)
    if problem:
        raise InputError(f"--labels {problem}")
    return [int(word) for word in words]


def add_submit(verbs: Verbs) -> None:
    """Adds the verb `submit`."""
    more = (
        "Refused, with every reason: fields that are missing, of another shape or type than float32, not finite, not\n"
        "what their JSON describes, made from other images, or not all by the same members and options. The images\n"
        "need not be there. Stored under the names that the official evaluation looks for; equal fields give equal\n"
        "bytes.\n\n"
        "example: sitreg-lumir submit predictions --data LUMIR/LUMIR25_dataset.json -o submission.zip"
    )
    parser = verb(verbs, "submit", "Check a folder of fields and zip it for the challenge.", more)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with disp_<fixed>_<moving>.nii.gz files")
    parser.add_argument(
        "--data", "--dataset", dest="dataset", type=Path, metavar="DATA", help="the list of pairs" + USUAL_DATA
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="folder that the JSON's paths start from (default: that of the JSON)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ZIP", help="the archive to write, .zip")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="zip samples of the exact maps, of `predict --save-maps` or `predict --exact` (default: the fields as "
        "they are in FOLDER, which the challenge defines as the network's own)",
    )
    parser.set_defaults(run=_submit)


def _submit(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "submit")
    from sitreg_lumir.challenge.submission import submit
    from sitreg_lumir.data.lumir import read_dataset

    dataset = read_dataset(options.dataset or usual_data(), validation=True, check_files=False, images=options.images)
    submit(options.folder, dataset, options.output, exact=options.exact)


def add_container(verbs: Verbs) -> None:
    """Adds the verb `container`."""
    more = (
        "The defaults are the challenge's mounts; the Dockerfile calls this verb without arguments. Each default can\n"
        "be set by an environment variable instead: SITREG_LUMIR_DATA, SITREG_LUMIR_IMAGES, SITREG_LUMIR_MEMBERS and\n"
        "SITREG_LUMIR_OUTPUT.\n"
        "A second call goes on where a first was stopped; fields that other members made are written again.\n\n"
        "example: sitreg-lumir container --data LUMIR25_dataset.json --images LUMIR --members members -o output"
    )
    parser = verb(verbs, "container", "Write the fields of the challenge's test phase, as its container does.", more)
    for option, name, path, text in (
        ("--data", "JSON", "/app/LUMIR25_dataset.json", "the list of pairs"),
        ("--images", "FOLDER", "/app/input", "what the JSON's paths start from; may be read-only"),
        ("--members", "PATH", "/app/members", "the weights: a folder or a file"),
        ("--output", "FOLDER", "/app/output", "where the fields go"),
    ):
        former = {"--data": "--dataset", "--output": "-o"}.get(option)
        variable = option[2:].upper()
        path = os.environ.get(f"SITREG_LUMIR_{variable}") or os.environ.get(_FORMER_VARIABLES[option]) or path
        names = (option,) if former is None else (option, former)
        parser.add_argument(
            *names, dest=option[2:], type=Path, default=Path(path), metavar=name, help=f"{text} (default: {path})"
        )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="what computes (default: auto)"
    )
    add_allow_imports(parser)
    parser.set_defaults(run=_container)


def _container(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "container")
    from sitreg_lumir.challenge.container import run_container

    run_container(
        options.data,
        options.images,
        options.members,
        options.output,
        device=options.device,
        allow_imports=options.allow_imports,
    )


def add_demo(verbs: Verbs) -> None:
    """Adds the verb `demo`."""
    more = "example: sitreg-lumir demo -o demo"
    parser = verb(verbs, "demo", "Register an example pair; make small data, train a little, predict, evaluate.", more)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("demo"),
        metavar="FOLDER",
        help="where everything goes (default: demo)",
    )
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: the demo config's)")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "demo")
    from sitreg_lumir.demo.run import demo

    demo(options.output, options.steps)
