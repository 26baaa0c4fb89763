"""What ends a training in one line: full memory, a full disk, a checkpoint of another network."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sitreg_lumir.data.sampler import epoch_length
from sitreg_lumir.errors import InputError
from sitreg_lumir.train.registration import RegistrationModule


@contextmanager
def refusing_in_one_line(folder: Path) -> Iterator[None]:
    """A GPU's full memory and a full disk become one line that says what to set."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = " ".join(str(error).split()).partition(". ")[0]
        raise InputError(
            f"{said}; set --data.micro_batch 1 (the gradient stays that of the whole batch) and --model.recompute "
            "true, or --trainer.precision bf16-mixed; within an epoch that was begun with another micro_batch, resume "
            "from the end of one"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise InputError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); make room, then go on with --resume"
        ) from None


def check_weights(model: RegistrationModule, checkpoint: dict[str, Any], path: Path) -> None:
    """Refuses a checkpoint of another network than the config's, before any volume is read.

    Raises:
        InputError: names or shapes of weights differ.
    """
    own, stored = (
        {name: tuple(tensor.shape) for name, tensor in state.items()}
        for state in (model.state_dict(), checkpoint["state_dict"])
    )
    differing = sorted(name for name in own.keys() | stored.keys() if own.get(name) != stored.get(name))
    if differing:
        name = differing[0]
        raise InputError(
            f"{path}: holds another network than the config ({len(differing)} weights differ, {name} is "
            f"{stored.get(name, 'absent')} there, {own.get(name, 'absent')} here); name the config of that run: "
            "--config runs/NAME/config.yaml"
        )


def unfinished_micro_batch(checkpoint: dict[str, Any]) -> int | None:
    """The micro batch of the epoch that a checkpoint stands in; None at the end of one, and in one of triplets."""
    for loader in _loader_states(checkpoint.get("loops")):
        settings, consumed = loader["settings"], loader["consumed"]
        if settings["group_size"] == 2 and 0 < consumed < epoch_length(settings):
            return int(settings["micro_batch"])
    return None


def _loader_states(value: Any) -> Iterator[dict[str, Any]]:
    """The states of data loaders, wherever Lightning keeps them among its loops'."""
    if isinstance(value, dict):
        if {"consumed", "settings"} <= value.keys():
            yield value
        for entry in value.values():
            yield from _loader_states(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _loader_states(entry)
