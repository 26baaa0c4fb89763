"""What ends a training in one line: full memory, a full disk, a checkpoint of another network."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sitreg_lumir.data.lightning_internals import failed_while_restoring
from sitreg_lumir.data.sampler import epoch_length
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import refusal_of
from sitreg_lumir.network.architecture import is_whole, short
from sitreg_lumir.train.registration import RegistrationModule


@contextmanager
def refusing_in_one_line(folder: Path) -> Iterator[None]:
    """A GPU's full memory and a full or closed disk become one line that says what to set."""
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
        if refusal_of(error) is None:
            raise
        raise InputError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); make room or choose another "
            "--runs, then go on with --resume if there is a checkpoint"
        ) from None


@contextmanager
def refusing_unrestorable(checkpoint: Path | None) -> Iterator[None]:
    """What goes wrong while Lightning takes its state from a checkpoint becomes one line.

    Args:
        checkpoint: that a run goes on from, or is scored; None where there is none.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if checkpoint is None or isinstance(error, InputError) or not failed_while_restoring(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise InputError(f"{checkpoint}: its state cannot be restored ({reason}); use an earlier checkpoint") from None


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


def check_resumable(model: RegistrationModule, checkpoint: dict[str, Any], path: Path) -> None:
    """Refuses a checkpoint that training cannot go on from, before any volume is read.

    Raises:
        InputError: a part of it is missing or of another kind, or its optimiser's state is that of another network.
    """
    problem = _resume_problem(checkpoint) or _optimiser_problem(model, checkpoint)
    if problem:
        raise InputError(f"{path}: cannot be resumed from, {problem}; use a checkpoint that `fit` wrote")


def _resume_problem(checkpoint: dict[str, Any]) -> str | None:
    kinds = {"loops": dict, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list}
    for name, kind in kinds.items():
        if not isinstance(checkpoint.get(name), kind):
            return f"it has no {name}"
    for name in ("epoch", "global_step"):
        if not is_whole(checkpoint.get(name), 0, 2**53):
            return f"its {name} is {short(checkpoint.get(name))}"
    progress = checkpoint["loops"].get("fit_loop")
    if not isinstance(progress, dict) or not {"epoch_progress", "epoch_loop.batch_progress"} <= progress.keys():
        return "it does not say how far the epoch was"
    if not checkpoint["optimizer_states"]:
        return "it has no state of an optimiser"
    version = checkpoint.get("pytorch-lightning_version")
    if not isinstance(version, str) or not re.fullmatch(r"\d{1,4}(\.\d{1,4}){1,3}[\w.+-]{0,20}", version):
        return f"its version of Lightning is {short(version)}"
    return None


def _optimiser_problem(model: RegistrationModule, checkpoint: dict[str, Any]) -> str | None:
    """Why the state of an optimiser is none of this network's; None if it is one."""
    shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
    for state in checkpoint["optimizer_states"]:
        entries = state.get("state") if isinstance(state, dict) else None
        groups = state.get("param_groups") if isinstance(state, dict) else None
        if not isinstance(entries, dict) or not isinstance(groups, list):
            return "the state of its optimiser is incomplete"
        if checkpoint["global_step"] and not entries:
            return "the state of its optimiser is empty"
        for number, values in entries.items():
            if not isinstance(values, dict) or not is_whole(number, 0, len(shapes) - 1):
                return f"its optimiser knows a parameter {short(number)}, this network has {len(shapes)}"
            for name, tensor in values.items():
                if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0:
                    continue
                if tensor.shape != shapes[number] or not bool(torch.isfinite(tensor).all()):
                    return f"{name} of its optimiser's parameter {number} is {tuple(tensor.shape)}, or not finite"
    return None


def unfinished_micro_batch(checkpoint: dict[str, Any]) -> int | None:
    """The micro batch of the epoch that a checkpoint stands in; None at the end of one, and in one of triplets."""
    try:
        for loader in _loader_states(checkpoint.get("loops")):
            settings, consumed = loader["settings"], loader["consumed"]
            if settings["group_size"] == 2 and 0 < consumed < epoch_length(settings):
                return int(settings["micro_batch"])
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"the checkpoint's state of its data is damaged ({error}); use an earlier one") from None
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
