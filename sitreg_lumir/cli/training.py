"""The verbs that train and score: fit, validate, test, export."""

import argparse
from pathlib import Path

from sitreg_lumir.cli.parsing import Verbs, add_allow_imports, refuse, verb
from sitreg_lumir.errors import InputError

FIT_MORE = """\
Every setting of the data, the model and Lightning's Trainer is an option, too:
  --data FOLDER|JSON           the LUMIR data set, --data.root in configs (default: $SITREG_LUMIR_DATA, else data/LUMIR)
  --seed_everything 3          the same as --data.seed 3, unless both are given
  --data.validation '[LUMIR_dataset_multimodal.json]'    more lists of validation pairs
  --data.batch_size 4          pairs in one step, over all devices
  --model.augmentation Augmentation    augmented views for the network
  --trainer.max_epochs 30      --trainer.devices 3      --trainer.precision 32-true
  --model my_variant.MyRegistration --allow-imports my_variant    a class of yours in my_variant.py in the working
                               folder, which is imported only if it is allowed; what it keeps of the defaults is its
                               own affair. What its network sees is its input_transform, an nn.Module:
                               --model RegistrationModule --model.input_transform my_variant.Gradient
`sitreg-lumir fit --options` lists all of them; `--print_config` shows the resolved config.

example: sitreg-lumir fit --config minilumir/mind_small --data minilumir/2mm
"""


def add_fit(verbs: Verbs) -> None:
    """Adds the verb `fit`."""
    parser = verb(verbs, "fit", "Train a network into runs/<name>/.", FIT_MORE)
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
    parser.add_argument(
        "--init-from",
        metavar="MEMBER",
        help="fine-tune: start a new run with the weights of this member (a shipped one by name, such as member1, a "
        ".safetensors or .ckpt file, or a file of the authors' code)",
    )
    parser.add_argument("--checkpoint-every", type=int, default=50, metavar="STEPS", help="default: 50")
    parser.add_argument(
        "--keep-every", type=int, default=5, metavar="EPOCHS", help="checkpoints that stay (default: 5)"
    )
    parser.add_argument(
        "--panels-every",
        type=int,
        default=5,
        metavar="EPOCHS",
        help="pictures of the same pairs into panels/ (default: 5)",
    )
    parser.add_argument(
        "--wandb-images",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="these pictures to W&B, too (default: offline yes, online no)",
    )
    add_allow_imports(parser, "configs and options may take classes and functions")
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

        arguments = [*passed, "--help"] if options.options else passed
        build(arguments, needs_data=False, allow_imports=options.allow_imports)
        return
    name = options.name or (Path(options.config[-1]).stem if options.config else "mind")
    from sitreg_lumir.train.run import RunOptions, fit

    folder = options.runs / name
    resume = None
    if options.resume is not None:
        resume = folder / "checkpoints" / "last.ckpt" if options.resume == "last" else Path(options.resume)
    fit(
        passed,
        RunOptions(
            folder,
            options.wandb,
            resume,
            options.checkpoint_every,
            options.keep_every,
            options.panels_every,
            options.wandb_images,
            options.init_from,
            tuple(options.allow_imports),
        ),
    )


def add_validate(verbs: Verbs) -> None:
    """Adds the verb `validate`."""
    _add_scoring(verbs, "validate")


def add_test(verbs: Verbs) -> None:
    """Adds the verb `test`."""
    _add_scoring(verbs, "test")


def _add_scoring(verbs: Verbs, name: str) -> None:
    more = (
        f"example: sitreg-lumir {name} --config runs/mind/config.yaml --members runs/mind/checkpoints/last.ckpt\n"
        "Settings of data and Trainer are options as in `fit`: --data, --data.validation, --trainer.devices ..."
    )
    parser = verb(verbs, name, "Score a checkpoint on the validation pairs.", more)
    parser.add_argument("--config", "-c", action="append", default=[], help="the run's config.yaml")
    parser.add_argument(
        "--members",
        "--ckpt_path",
        dest="checkpoint",
        type=Path,
        required=True,
        metavar="CKPT",
        help="checkpoint to score",
    )
    add_allow_imports(parser, "configs and options may take classes and functions")
    parser.set_defaults(run=_validate)


def _validate(options: argparse.Namespace, rest: list[str]) -> None:
    from sitreg_lumir.train.run import validate

    passed = [argument for config in options.config for argument in ("--config", config)] + rest
    validate(passed, options.checkpoint, options.verb, options.allow_imports)


def add_export(verbs: Verbs) -> None:
    """Adds the verb `export`."""
    more = (
        "With --official CKPT is a file of the authors' training code (model_epoch_030.pt) or a state dict of their\n"
        "network; channels, levels and convolutions are read from the tensors.\n\n"
        "example: sitreg-lumir export runs/mind/checkpoints/last.ckpt -o mind.safetensors\n"
        "         sitreg-lumir export model_epoch_030.pt --official --data LUMIR -o official.safetensors"
    )
    parser = verb(verbs, "export", "Turn a checkpoint into safetensors + JSON that hold all that predict needs.", more)
    parser.add_argument("checkpoint", type=Path, nargs="?", metavar="CKPT", help="what is exported")
    parser.add_argument("--members", type=Path, metavar="CKPT", help="the same")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="ends in .safetensors")
    parser.add_argument("--half", action="store_true", help="store half precision")
    parser.add_argument("--official", action="store_true", help="CKPT was saved by the authors' code; needs --data")
    parser.add_argument(
        "--data",
        "--dataset",
        dest="dataset",
        type=Path,
        metavar="DATA",
        help="with --official: the data set it was trained on",
    )
    parser.add_argument(
        "--groups",
        type=int,
        metavar="N",
        help="with --official: of the group normalisations, which the file does not tell (default: what "
        "training_config.json beside it says, else 4 as in the LUMIR configuration)",
    )
    parser.add_argument("--licence", default=None, help="of the weights, for the card")
    add_allow_imports(parser)
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "export")
    from sitreg_lumir.train.export import export

    checkpoint = options.checkpoint or options.members
    if (options.checkpoint is None) == (options.members is None):
        raise InputError("name one checkpoint to export, as CKPT or by --members")
    if options.official != (options.dataset is not None):
        raise InputError("--official and --data belong together: the file does not say its grid, the data set does")
    if options.groups is not None and not options.official:
        raise InputError("--groups: only with --official; the members of this package know theirs")
    export(
        checkpoint,
        options.output,
        half=options.half,
        licence=options.licence,
        dataset=options.dataset,
        groups=options.groups,
        allow_imports=options.allow_imports,
    )
