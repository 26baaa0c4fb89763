"""Input transforms: what a network sees of an image, written into a model card and made again from it.

A transform is an ``nn.Module``: ``(B, 1, X, Y, Z)``, intensity in [0, 1] -> ``(B, channels, X, Y, Z)``, with an
attribute ``channels``. None stands for the intensities themselves. A card names it by class path and constructor
arguments; its parameters and buffers, if it has any, are stored with the network's.
"""

import copy
import inspect
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from sitreg_lumir.errors import InputError

ALLOW_VARIABLE = "SITREG_LUMIR_ALLOW_IMPORTS"
"""Names modules, with commas between them, from which model cards may name classes."""

STATE_PREFIX = "input_transform."
"""Of a transform's parameters and buffers among a network's, in checkpoints and safetensors files."""

_PACKAGE = "sitreg_lumir"
_PROBE_SHAPE = (24, 20, 16)


def channels_of(transform: nn.Module | None) -> int:
    """How many channels a transform gives; 1 without one.

    Raises:
        InputError: the transform does not state it.
    """
    if transform is None:
        return 1
    channels = getattr(transform, "channels", None)
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise InputError(
            f"the input transform {type(transform).__name__} does not state how many channels it gives: "
            "add the attribute `channels`, a whole number"
        )
    return channels


def describe(transform: nn.Module | None) -> dict[str, Any] | None:
    """What a card stores: class path, constructor arguments, and for a class of the user's its response to a probe.

    Arguments are read from the attributes of the same name (or ``_name``), as plain values. An argument that became
    a parameter or buffer is left to the stored state. That the description holds all is tried: the transform is made
    again from it and has to give the same values.

    Raises:
        InputError: the transform cannot be made again from a card, or gives other channels than it states.
    """
    if transform is None:
        return None
    kind = type(transform)
    if kind.__module__ == "__main__" or "." in kind.__qualname__:
        raise InputError(
            f"the input transform {kind.__qualname__} is defined where predictions cannot import it: "
            "move the class to the top level of a module, a file such as my_variant.py"
        )
    description: dict[str, Any] = {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": _arguments(transform),
    }
    if _of_package(kind.__module__):
        return description
    original = copy.deepcopy(transform).cpu().float().eval()
    response = _response(original)
    with torch.random.fork_rng(devices=[]):
        try:
            again = kind(**copy.deepcopy(description["init_args"])).eval()
            again.load_state_dict(original.state_dict())
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"{description['class_path']}: cannot be made again from its arguments ({reason})"
            ) from None
        if not _agree(_response(again), response):
            raise InputError(
                f"{description['class_path']}: made again from its arguments {description['init_args']} it gives other "
                "values; keep each constructor argument as an attribute of its name, learned values as parameters or "
                "buffers, and draw nothing at random"
            )
    return {**description, "response": response}


def same_transform(first: dict[str, Any] | None, second: dict[str, Any] | None) -> bool:
    """Whether two descriptions name the same class with the same arguments."""
    return named(first) == named(second)


def named(description: dict[str, Any] | None) -> dict[str, Any] | None:
    """A description's class path and arguments alone."""
    return None if description is None else {key: description[key] for key in ("class_path", "init_args")}


def make(
    description: dict[str, Any] | None, state: dict[str, Tensor], allow_imports: bool | str | Sequence[str] = ()
) -> nn.Module | None:
    """The transform that a card describes, in evaluation mode, on the CPU.

    Args:
        description: what :func:`describe` gave.
        state: its parameters and buffers.
        allow_imports: modules of the user's from which a card may name a class, or True for any;
            ``SITREG_LUMIR_ALLOW_IMPORTS`` names more.

    Raises:
        InputError: the class is not allowed or not there, or does not do what it did when the card was written.
    """
    if description is None:
        if state:
            raise InputError(f"holds {STATE_PREFIX}{min(state)}, but its card names no input transform")
        return None
    path = description["class_path"]
    kind = _import(path, allow_imports)
    try:
        with torch.random.fork_rng(devices=[]):
            transform = kind(**copy.deepcopy(description["init_args"]))
            transform.load_state_dict(state)
    except Exception as error:  # a class of the user's may raise anything
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"its input transform {path} cannot be made from the card's arguments: {reason}") from None
    transform.eval()
    expected = description.get("response")
    if expected is not None and not _agree(_response(copy.deepcopy(transform).float()), expected):
        raise InputError(
            f"its input transform {path} gives other values than in the training: the class was changed; "
            "use the version of it that the network was trained with"
        )
    return transform


def module_of(description: dict[str, Any] | None) -> str | None:
    """The module of the user's that a card's transform comes from; None for one of this package, or none at all."""
    if description is None:
        return None
    module = str(description["class_path"]).rpartition(".")[0]
    return None if _of_package(module) else module


def find_in_working_folder() -> None:
    """Lets classes be imported from the working folder, where nothing installed has the same name."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def _import(path: str, allow_imports: bool | str | Sequence[str]) -> type[nn.Module]:
    module_name, _, name = path.rpartition(".")
    if not _of_package(module_name) and not allows(module_name, allow_imports):
        raise InputError(
            f"its card names the input transform {path}, code from outside this package; if you trust it, allow it: "
            f"--allow-imports {module_name}, allow_imports=[{module_name!r}] or {ALLOW_VARIABLE}={module_name}"
        )
    find_in_working_folder()
    try:
        module = import_module(module_name)
    except Exception as error:  # importing runs the user's code
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"its input transform {path} cannot be imported ({reason}); start in the folder of {module_name}, or put "
            "that on PYTHONPATH"
        ) from None
    kind = getattr(module, name, None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module) or kind.__module__ != module_name:
        raise InputError(f"its input transform {path} is not there: {module_name} defines no nn.Module {name}")
    return kind


def _of_package(module: str) -> bool:
    return module.split(".")[0] == _PACKAGE and not module.endswith("__main__")


def allows(module: str, allow_imports: bool | str | Sequence[str]) -> bool:
    """Whether a module of the user's may be imported: it is named, or it lies in a package that is."""
    if isinstance(allow_imports, bool):
        if allow_imports:
            return True
        allow_imports = ()
    names = [allow_imports] if isinstance(allow_imports, str) else list(allow_imports)
    names.append(os.environ.get(ALLOW_VARIABLE, ""))
    allowed = [name.strip() for part in names for name in part.split(",") if name.strip()]
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def _arguments(transform: nn.Module) -> dict[str, Any]:
    """Constructor arguments by name, from the attributes that keep them."""
    arguments: dict[str, Any] = {}
    for name, parameter in _parameters(type(transform)).items():
        default = parameter.default
        value = getattr(transform, name, getattr(transform, f"_{name}", default))
        if isinstance(value, Tensor | nn.Module):
            if default is inspect.Parameter.empty:
                raise InputError(
                    f"the input transform {type(transform).__name__}: its argument {name} has no default and is kept "
                    "as a tensor; give it a default, or keep it as a plain value"
                )
            continue
        if value is inspect.Parameter.empty:
            raise InputError(
                f"the input transform {type(transform).__name__} does not keep its argument {name}: keep it as the "
                f"attribute self.{name}, for the model card"
            )
        arguments[name] = _plain(value, f"the input transform {type(transform).__name__}: its argument {name}")
    return arguments


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """What a class's constructor takes by name, along the inheritance as far as ``**kwargs`` passes it on."""
    by_name: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                by_name.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return by_name


def _plain(value: Any, where: str) -> Any:
    """The same value as JSON gives it back: numbers, text, None, lists and dictionaries of them."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry, where) for entry in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(entry, where) for key, entry in value.items()}
    raise InputError(
        f"{where} is of type {type(value).__name__}, which a model card cannot hold: use numbers, text, or lists"
    )


@torch.no_grad()
def _response(transform: nn.Module) -> list[float]:
    """One weighted mean per channel of what a transform makes of a fixed image with an empty border."""
    x, y, z = torch.meshgrid(*(torch.arange(size) for size in _PROBE_SHAPE), indexing="ij")
    inside = (x > 3) & (x < 20) & (y > 3) & (y < 16) & (z > 2) & (z < 13)
    image = torch.where(inside, 0.2 + 0.8 * ((x * 37 + y * 91 + z * 53 + x * y * z) % 101) / 100, 0.0)
    weights = ((x * 13 + y * 29 + z * 17) % 31) / 30
    name = type(transform).__name__
    try:
        features = transform(image[None, None].float())
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"the input transform {name} does not take an image (B, 1, X, Y, Z) of size {_PROBE_SHAPE}: {reason}"
        ) from None
    wanted = (1, channels_of(transform), *_PROBE_SHAPE)
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    if shape != wanted:
        raise InputError(f"the input transform {name} states channels={wanted[1]}, but of an image it makes {shape}")
    return [float(mean) for mean in (features[0].double() * weights).mean((1, 2, 3))]


def _agree(first: Sequence[float], second: Sequence[float]) -> bool:
    pair = torch.tensor([list(first), list(second)], dtype=torch.float64) if len(first) == len(second) else None
    return pair is not None and torch.allclose(pair[0], pair[1], rtol=1e-4, atol=1e-6, equal_nan=True)
