"""Deformable brain MRI registration: SITReg on MIND features.

Symmetric, inverse consistent, diffeomorphic; trained on T1 pairs only, robust on contrasts it has never seen.

    import sitreg_lumir

    found = sitreg_lumir.register("fixed.nii.gz", "moving.nii.gz", "registration")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sitreg_lumir.registration.apply import apply
    from sitreg_lumir.registration.model import Model, load_model
    from sitreg_lumir.registration.register import register
    from sitreg_lumir.registration.result import Registration

__all__ = ["Model", "Registration", "__version__", "apply", "load_model", "register"]

_HOMES = {
    "apply": "sitreg_lumir.registration.apply",
    "load_model": "sitreg_lumir.registration.model",
    "register": "sitreg_lumir.registration.register",
    "Model": "sitreg_lumir.registration.model",
    "Registration": "sitreg_lumir.registration.result",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for only then: torch takes seconds."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
