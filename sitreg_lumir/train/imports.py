"""Which code a config may name: this package's, Lightning's, torch's optimisers and torchmetrics'; others on request.

A config is code as soon as it names any class: importing it runs its module, and making it runs the class. So names
are compared with a list before anything is imported.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sitreg_lumir.errors import InputError
from sitreg_lumir.network.input_transform import ALLOW_VARIABLE, allows

PACKAGES = ("sitreg_lumir", "lightning", "torch.optim", "torchmetrics")
"""Where configs may take classes and functions from unasked."""

_OF_THE_PARSER = ("jsonargparse.ArgumentParser",)


@contextmanager
def importing_only(allow_imports: Sequence[str] = ()) -> Iterator[None]:
    """Within the block, configs and options name code of :data:`PACKAGES` alone, and of the modules that are allowed.

    Args:
        allow_imports: modules from which they may name more; ``SITREG_LUMIR_ALLOW_IMPORTS`` names others.

    Raises:
        InputError: something else was named, which was not imported; it says how to allow it.
    """
    from jsonargparse import _actions, _typehints  # where names become objects; there is no public place

    refused: list[str] = []
    original: Callable[[str], Any] = _typehints.import_object  # type: ignore[attr-defined]

    def import_object(name: str) -> Any:
        if isinstance(name, str) and name not in _OF_THE_PARSER:
            if not _is_allowed(name, allow_imports):
                refused.append(name)
                raise ValueError(f"{name} is not imported")
            value = original(name)
            home = getattr(value, "__module__", None)
            if callable(value) and not _is_allowed(f"{home}.{name}", allow_imports):  # reached through another module
                refused.append(name)
                raise ValueError(f"{name} is not imported")
            return value
        return original(name)

    places: tuple[Any, ...] = (_typehints, _actions)
    for place in places:
        place.import_object = import_object
    try:
        yield
    except Exception:
        if refused:
            raise InputError(_refusal(refused[0])) from None
        raise
    finally:
        for place in places:
            place.import_object = original


def _is_allowed(name: str, allow_imports: Sequence[str]) -> bool:
    """Whether an object may be named; ``name`` is ``module.Name``, perhaps with a name inside of it."""
    if any(name.startswith(f"{package}.") for package in PACKAGES):
        return not name.startswith("sitreg_lumir.__main__")
    return allows(name.rpartition(".")[0], allow_imports)


def _refusal(name: str) -> str:
    module = name.rpartition(".")[0]
    return (
        f"{name}: code from outside of {', '.join(PACKAGES)}, which is not imported; if you trust it, allow it: "
        f"--allow-imports {module} or {ALLOW_VARIABLE}={module}"
    )
