"""`fit`, `validate` and `test`: LightningCLI over the modules and the data, and the run folder.

``runs/<name>/`` holds config.yaml, metrics.csv, checkpoints/, panels/ and wandb/.
"""

import os
import re
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger

from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.lightning_internals import RunMetrics, leave_signals_alone
from sitreg_lumir.errors import InputError, RunStoppedError
from sitreg_lumir.io.atomic import alone
from sitreg_lumir.network.input_transform import ALLOW_VARIABLE, find_in_working_folder, module_of
from sitreg_lumir.network.weights import read_checkpoint
from sitreg_lumir.train.arguments import complete
from sitreg_lumir.train.averaging import WeightAverage
from sitreg_lumir.train.callbacks import AtomicCheckpointIO, checkpoint_callbacks, drop_rows_from
from sitreg_lumir.train.config_errors import explained
from sitreg_lumir.train.final_epochs import GroupConsistency, NdvPenalty
from sitreg_lumir.train.imports import importing_only
from sitreg_lumir.train.module import MindRegistration, RawRegistration, RegistrationModule
from sitreg_lumir.train.panels import Panels
from sitreg_lumir.train.processes import ending_together
from sitreg_lumir.train.refusals import (
    check_resumable,
    check_weights,
    refusing_in_one_line,
    refusing_unrestorable,
    unfinished_micro_batch,
)
from sitreg_lumir.train.settings import give_back_freed_memory, keep_freed_memory, prepare_process
from sitreg_lumir.train.signals import StopOnSignal
from sitreg_lumir.train.start_again import holds_run, is_first_process, remove_unfinished_start
from sitreg_lumir.train.start_weights import read_start_weights, start_from
from sitreg_lumir.train.throughput import Throughput
from sitreg_lumir.train.tracking import DataRecord, finish, variant, wandb_logger

BY_SHORT_NAME = (
    MindRegistration,
    RawRegistration,
    NdvPenalty,
    GroupConsistency,
    WeightAverage,
)  # imported, so configs can name them

# As the first argument, not as the parser's default: whatever class is named later then keeps its own defaults.
DEFAULT_MODEL = f"{MindRegistration.__module__}.{MindRegistration.__qualname__}"

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 30,
    "precision": "32-true",  # the inversion's stop threshold is below what half precision resolves
    "use_distributed_sampler": False,
    "reload_dataloaders_every_n_epochs": 1,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
}


_LOST_PEER = re.compile(r"connection (closed|reset|refused)|nccl|gloo|peer", re.IGNORECASE)


@dataclass(frozen=True)
class RunOptions:
    """Options of `fit` that are not Lightning's.

    Attributes:
        folder: the run folder.
        wandb: ``offline``, ``online`` or ``off``.
        resume: a checkpoint to go on from, or None.
        checkpoint_every: steps between two writings of last.ckpt.
        keep_every: epochs between two checkpoints that stay.
        panels_every: epochs between two pictures of the same pairs.
        wandb_images: whether W&B gets these pictures, too; None means offline yes, online no.
        init_from: the trained member that a new run starts from, or None.
        allow_imports: modules of the user's from which configs may take classes.
    """

    folder: Path
    wandb: str = "offline"
    resume: Path | None = None
    checkpoint_every: int = 50
    keep_every: int = 5
    panels_every: int = 5
    wandb_images: bool | None = None
    init_from: str | None = None
    allow_imports: tuple[str, ...] = ()

    @property
    def images_to_wandb(self) -> bool:
        """Whether W&B gets pictures: nothing of the data leaves the machine unasked."""
        return self.wandb == "offline" if self.wandb_images is None else self.wandb_images


class RunCLI(LightningCLI):
    """LightningCLI that puts loggers, checkpoints and the resolved config into the run folder."""

    def __init__(self, args: Sequence[str], options: RunOptions | None = None) -> None:
        self.options = options
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().__init__(
                RegistrationModule,
                LumirDataModule,
                subclass_mode_model=True,
                args=[f"--model={DEFAULT_MODEL}", *args],
                run=False,
                seed_everything_default=0,
                trainer_defaults=dict(TRAINER_DEFAULTS),
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "prog": "sitreg-lumir"},
                save_config_kwargs={"overwrite": options is not None and options.resume is not None},
                load_from_checkpoint_support=False,
                auto_configure_optimizers=False,
            )

    def after_instantiate_classes(self) -> None:
        """Tells the data about triplets, so that what it refuses is refused early; memory or speed as asked for."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GroupConsistency):
                callback.announce(self.datamodule)
        if self.options is None or not self.model.automatic:  # else it is decided with the memory's use
            (give_back_freed_memory if self.model.recompute else keep_freed_memory)()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer of the configs, with what a run folder takes; scores alone write nothing."""
        config = {**self.config_init["trainer"], **kwargs}
        if self.options is None:
            scoring = self.trainer_class(**{**config, "logger": False, "enable_checkpointing": False})
            return leave_signals_alone(scoring)
        if config.get("benchmark") is None:  # all steps have one shape; what is fastest for it may differ between runs
            config["benchmark"] = not config.get("deterministic")
        folder = self.options.folder
        asked = config.get("logger")
        loggers: list[Logger] = [RunMetrics(folder), *([] if isinstance(asked, bool) else _as_list(asked))]
        if self.options.wandb != "off":
            resolved = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            files = [Path(str(file)) for file in _as_list(self.config.get("config"))]
            tag = variant(self.model, _as_list(config.get("callbacks")))
            loggers.append(wandb_logger(folder, self.options.wandb, resolved, tag, files))
        config["callbacks"] = [
            *_as_list(config.get("callbacks")),
            DataRecord(),
            *checkpoint_callbacks(folder, self.options.checkpoint_every, self.options.keep_every),
            Throughput(),
            Panels(folder, self.options.panels_every, self.options.images_to_wandb),
            StopOnSignal(folder / "checkpoints" / "last.ckpt"),
        ]
        config["default_root_dir"] = str(folder)
        config["logger"] = loggers
        config["plugins"] = [*_as_list(config.get("plugins")), AtomicCheckpointIO()]
        return leave_signals_alone(super().instantiate_trainer(**config))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def build(
    args: Sequence[str],
    options: RunOptions | None = None,
    *,
    needs_data: bool = True,
    allow_imports: Sequence[str] = (),
) -> RunCLI:
    """Module, data and trainer from configs and command line; mistakes become one line.

    Args:
        args: of LightningCLI.
        options: those of `fit`.
        needs_data: whether the data set must be known.
        allow_imports: modules beyond :data:`~sitreg_lumir.train.imports.PACKAGES` that may be imported.

    Raises:
        InputError: unknown or invalid keys; the nearest known key is suggested. Or code is named that is not allowed.
    """
    prepare_process()
    if allow_imports or os.environ.get(ALLOW_VARIABLE):
        find_in_working_folder()
    resolved = complete(args, needs_data=needs_data)
    try:
        with importing_only(allow_imports):
            return RunCLI(resolved, options)
    except (InputError, MemoryError, OSError):
        raise
    except Exception as error:  # settings reach constructors of many kinds, which raise as many
        raise InputError(explained(str(error) or type(error).__name__, resolved)) from None


def fit(args: Sequence[str], options: RunOptions) -> None:
    """Trains, from scratch or from ``options.resume``, and says what to do next."""
    if not is_first_process():
        _fit(args, options)
        return
    with alone(options.folder):
        check_folder(options)
        if options.resume is None:
            remove_unfinished_start(options.folder)
        _fit(args, options)


def _fit(args: Sequence[str], options: RunOptions) -> None:
    """Trains in a folder that no other run uses."""
    start = None if options.init_from is None else read_start_weights(options.init_from)
    cli = build(args, options, allow_imports=options.allow_imports)
    cli.model.check_variant()  # before hours of training, and before anything is cached or written
    if start is not None:
        start_from(cli.model, start)
        if cli.trainer.is_global_zero:
            print(f"starts with the weights of {start.path}")
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{options.folder}: cannot be made ({error.strerror}); choose another --runs") from None
    if options.resume is not None:
        checkpoint = read_checkpoint(options.resume)
        check_weights(cli.model, checkpoint, options.resume)
        check_resumable(cli.model, checkpoint, options.resume)
        cli.datamodule.resumed_micro_batch = unfinished_micro_batch(checkpoint)
        drop_rows_from(options.folder / "metrics.csv", int(checkpoint["global_step"]))
    done = False
    try:
        resume = options.resume and str(options.resume)
        with (
            refusing_unrestorable(options.resume),
            ending_together(cli.trainer),
            refusing_in_one_line(options.folder),
        ):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume, weights_only=True)
        done = True
    except RuntimeError as error:
        if cli.trainer.world_size == 1 or not _LOST_PEER.search(str(error)):
            raise
        raise RunStoppedError(
            "another process of this run ended; see its message, then go on with --resume", 1
        ) from None
    finally:
        if options.wandb != "off" and (line := finish(options.folder, failed=not done)):
            pictures = " and pictures" if options.images_to_wandb else ""
            print(f"\nto upload numbers, settings{pictures} to W&B:\n{line}")
    if cli.trainer.is_global_zero:
        print(f"\nwritten: {options.folder}/ (config.yaml, metrics.csv, checkpoints/, panels/)")
        print(f"next:    {_next_command(cli, options.folder)}")


def _next_command(cli: RunCLI, folder: Path) -> str:
    """What a trained member is used for first: the validation pairs, or without any the example scans."""
    words = ["--members", f"{folder}/checkpoints/last.ckpt"]
    if cli.datamodule.pairs:
        words = ["predict", *words, "--data", str(cli.datamodule.root), "-o", f"predictions/{folder.name}"]
        words += ["--data.images", str(cli.datamodule.images)] if cli.datamodule.images else []
    else:
        words = ["register", "--fixed", "EXAMPLE-T1", "--moving", "EXAMPLE-T2", *words, "-o", f"examples/{folder.name}"]
    module = module_of(cli.model.check_variant())
    return shlex.join(["sitreg-lumir", *words, *(["--allow-imports", module] if module else [])])


def validate(args: Sequence[str], checkpoint: Path, stage: str = "validate", allow_imports: Sequence[str] = ()) -> None:
    """Scores one checkpoint on the validation pairs and prints the numbers."""
    content = read_checkpoint(checkpoint)
    cli = build(args, allow_imports=allow_imports)
    check_weights(cli.model, content, checkpoint)
    run = cli.trainer.validate if stage == "validate" else cli.trainer.test
    with refusing_unrestorable(checkpoint), ending_together(cli.trainer):
        run(cli.model, datamodule=cli.datamodule, ckpt_path=str(checkpoint), weights_only=True)


def check_folder(options: RunOptions) -> None:
    """Refuses to write a second run into a folder, and checks the checkpoint to resume from.

    Raises:
        InputError: the folder holds a run and ``resume`` was not asked for, or there is nothing to resume.
    """
    if options.resume is not None and options.init_from is not None:
        raise InputError(
            "--init-from starts a new run and --resume goes on with one: leave out one of them (a run that started "
            "from a member keeps its weights when it goes on)"
        )
    if options.resume is None and holds_run(options.folder, options.checkpoint_every):
        raise InputError(
            f"{options.folder}: holds a run already; go on with it (--resume), choose another --name, or remove it"
        )
    if options.resume is not None:
        read_checkpoint(options.resume)
