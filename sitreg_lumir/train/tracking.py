"""The W&B run of a training: what it is called, what it records, what it must not record, and how it ends.

Nothing that names this machine goes in: no code, host name, command line, console output or package list, and no
paths. The run's id is kept in the run folder, so that a resumed training goes on in the same W&B run.
"""

import hashlib
import secrets
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from nibabel.affines import voxel_sizes

from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.lightning_internals import datamodule_of, without_anonymous
from sitreg_lumir.io.atomic import writing
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.train.doctor import package_versions
from sitreg_lumir.train.final_epochs import GroupConsistency, NdvPenalty
from sitreg_lumir.train.registration import RegistrationModule

PROJECT = "sitreg-lumir"
_MEMBER = "ens_"  # how configs and runs of ensemble members start


def wandb_logger(
    folder: Path, mode: str, config: dict[str, Any], tag: str, config_files: Sequence[Path] = ()
) -> WandbLogger:
    """The logger of a run folder; its W&B run starts with the training.

    Args:
        folder: the run folder; its name is that of the W&B run.
        mode: ``offline`` or ``online``.
        config: the resolved config; goes in as :func:`shareable` leaves it, with the versions of what computes.
        tag: the variant, see :func:`variant`.
        config_files: what the run was configured by; decides the group together with the folder's name.
    """
    import wandb

    settings = wandb.Settings(
        silent=mode == "offline",
        console="off",
        disable_code=True,
        save_code=False,
        disable_git=True,
        host="",
        program="sitreg-lumir",
        x_executable="python",
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        allow_val_change=True,  # a resumed run may train longer
    )
    logger = WandbLogger(
        project=PROJECT,
        name=folder.name,
        id=_run_id(folder / "wandb" / "run_id"),
        save_dir=folder,
        offline=mode == "offline",
        mode=mode,  # else an earlier offline run of this process would hold online ones back
        group=group_of([folder.name, *(file.stem for file in config_files)]),
        tags=[tag],
        config={**shareable(config), "versions": package_versions()},
        settings=settings,
    )
    return without_anonymous(logger)


def variant(model: RegistrationModule, callbacks: Iterable[Callback]) -> str:
    """Which row of the published table a run trains: ``baseline`` or ``mind``, then ``_final``, then ``_aug``.

    Another input transform than MIND gives its class's name.
    It follows from what the run does, not from what its config is called. Members of the ensemble are
    ``mind_final_aug``; their group distinguishes them.
    """
    transform = model.input_transform
    name = "baseline" if transform is None else "mind" if type(transform) is Mind else type(transform).__name__
    if any(isinstance(callback, NdvPenalty | GroupConsistency) for callback in callbacks):
        name += "_final"
    return name if model.augmentation is None else name + "_aug"


def group_of(names: Iterable[str]) -> str | None:
    """``ensemble`` if the run or one of its configs is named like a member, ``ens_...``; else no group."""
    return "ensemble" if any(name.startswith(_MEMBER) for name in names) else None


def shareable(config: dict[str, Any]) -> dict[str, Any]:
    """A config without this machine's paths: of each only the last part, of files that play no role nothing."""
    data = dict(config.get("data") or {})
    data.pop("cache", None)
    for key in ("root", "images"):
        if data.get(key):
            data[key] = Path(data[key]).name
    kept = {key: value for key, value in config.items() if key not in ("config", "ckpt_path")}
    cleaned: dict[str, Any] = _without_folders({**kept, "data": data})
    return cleaned


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(entry) for entry in value]
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        return Path(value).name
    return value


class DataRecord(Callback):
    """Adds to the W&B run's config what the data are (name, checksum, size, grid) and what a run started from."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells the W&B run which data it trains on."""
        data = datamodule_of(trainer)
        if not trainer.is_global_zero or not isinstance(data, LumirDataModule):
            return
        entries: dict[str, Any] = {"dataset": dataset_entry(data)}
        if isinstance(pl_module, RegistrationModule) and pl_module.initialised_from is not None:
            entries["initialised_from"] = pl_module.initialised_from
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(entries, allow_val_change=True)


def dataset_entry(data: LumirDataModule) -> dict[str, Any]:
    """What is recorded of the data.

    ``sha256`` is over the dataset JSONs and each file's name and length, so that it takes no time: another list, or
    a file of another length, gives another checksum; a file that was changed and kept its length does not.
    """
    digest = hashlib.sha256()
    for file in (data.dataset.path, *(data.dataset.path.parent / name for name in data.validation)):
        digest.update(file.read_bytes())
    images = [*data.dataset.training, *(image for pair in data.pairs for image in (pair.fixed, pair.moving))]
    files = {file for image in images for file in (image.path, image.labels, image.landmarks) if file is not None}
    for file in sorted(files):
        digest.update(f"{file.relative_to(data.dataset.root)} {file.stat().st_size}\n".encode())
    return {
        "name": data.dataset.name,
        "sha256": digest.hexdigest(),
        "training": len(data.dataset.training),
        "pairs": len(data.pairs),
        "shape": list(data.shape),
        "voxel_size": voxel_sizes(data.affine).tolist(),
    }


def finish(folder: Path, *, failed: bool) -> str | None:
    """Ends the W&B run, if this process has one.

    Returns:
        the line that uploads what this run folder has logged offline and not yet uploaded; None if there is none.
    """
    import wandb

    if wandb.run is None:
        return None
    wandb.finish(exit_code=int(failed))
    runs = sorted(run for run in (folder / "wandb").glob("offline-run-*") if not any(run.glob("*.synced")))
    return f"wandb sync {' '.join(shlex.quote(str(run)) for run in runs)}" if runs else None


def _run_id(file: Path) -> str:
    """The W&B id of a run folder: drawn once, then the same each time the run goes on."""
    if not file.is_file():
        with writing(file) as temporary:
            temporary.write_text(secrets.token_hex(4))
    return file.read_text()
