"""Which operations compute with vectors on this machine, and what computes where those do not work.

Vectors are built with numba's insides, which may change with any version: so each operation is tried once in a process,
on small tensors, against plain torch.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from sitreg_lumir.deform.backends.cpu import stepwise
from sitreg_lumir.deform.backends.torch import backend as torch_backend
from sitreg_lumir.deform.backends.torch import layers as torch_layers
from sitreg_lumir.deform.backends.torch import splines as torch_splines
from sitreg_lumir.deform.bspline import Coefficients

_TRUTH: dict[str, Callable[..., Any]] = {
    "upsample_control_points": torch_backend.upsample_control_points,
    "invert": torch_backend.invert,
    "invert_adjoint": torch_backend.invert_adjoint,
    "compose": torch_backend.compose,
    "compose_adjoint": torch_backend.compose_adjoint,
    "move_points": torch_splines.move_points,
    "trace_points": torch_splines.trace_points,
    "trace_points_adjoint": torch_splines.trace_points_adjoint,
    "weight_gradient": torch_layers.weight_gradient,
}
_TOLERANCE = 1e-3
_log = logging.getLogger(__name__)


@lru_cache
def working(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """An operation of ``vectorised`` if that gives the right numbers here, else that of ``stepwise``."""
    try:
        vectorised: Callable[..., Any] = getattr(_vectorised(), name)
        with _vectorised().copies_shared():
            computed = vectorised(*_small_arguments(name, dtype))
        _check_close(computed, _TRUTH[name](*_small_arguments(name, dtype)))
    except Exception as error:  # whatever a numba that has changed raises, wrong numbers included
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _log.warning("%s: vectors do not work with this version of numba, slower loops instead (%s)", name, reason)
        without_vectors: Callable[..., Any] = getattr(stepwise, name)
        return without_vectors
    return vectorised


def copies_shared() -> AbstractContextManager[None]:
    """The block of ``vectorised``, if there are vectors."""
    try:
        shared: AbstractContextManager[None] = _vectorised().copies_shared()
    except Exception:  # whatever a numba that has changed raises; ``working`` reports it
        return nullcontext()
    return shared


def _check_close(computed: Any, truth: Any) -> None:
    """Raises ValueError unless tensors, or tuples of them, agree (``torch.testing`` takes a second to import)."""
    if isinstance(truth, torch.Tensor):
        if computed.shape != truth.shape or computed.dtype != truth.dtype:
            raise ValueError(f"{computed.dtype} {tuple(computed.shape)} instead of {truth.dtype} {tuple(truth.shape)}")
        if not torch.allclose(computed.double(), truth.double(), rtol=0, atol=_TOLERANCE):
            raise ValueError(f"differs from plain torch by {float((computed.double() - truth.double()).abs().max()):g}")
    elif isinstance(truth, tuple | list):
        for part, true_part in zip(computed, truth, strict=True):
            _check_close(part, true_part)
    elif computed != truth:
        raise ValueError(f"{computed!r} instead of {truth!r}")


def _vectorised() -> Any:
    return import_module("sitreg_lumir.deform.backends.cpu.vectorised")


def _small_arguments(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    field = torch.linspace(-0.4, 0.4, 2 * 3 * 3 * 4 * 5, dtype=dtype).view(2, 3, 3, 4, 5).sin()
    if name == "weight_gradient":
        return field, torch.cat([field, -field], dim=1), torch.zeros(6, 3, 3, 3, 3, dtype=dtype), 1, 1
    if name in ("move_points", "trace_points", "trace_points_adjoint"):
        points = torch.linspace(-1, 6, 3 * 7, dtype=torch.float64).view(3, 7)
        flat = 0.2 * torch.linspace(0, 60, 2 * 4 * 7 * 8 * 9, dtype=dtype).sin()
        updates = [(1, True), (0, False)], Coefficients(flat, [(7, 8, 9), (7, 8, 9)], [1, 1], (3, 4, 5))
        path = torch.linspace(-0.1, 0.1, 2 * 3 * 7, dtype=dtype).view(2, 3, 7)
        if name == "trace_points_adjoint":
            return points.cos(), points, *updates, path, [True, False]
        return points, *updates, *((True, 1e-6, 50) if name == "move_points" else (1e-6, 50, path))
    arguments: dict[str, tuple[Any, ...]] = {
        "upsample_control_points": (field, 2, (6, 8, 9)),
        "invert": (field / 2, 1e-4, 50),
        "invert_adjoint": (field, field / 2, -field / 2),
        "compose": ([field, -field, field],),
        "compose_adjoint": (field, [field, -field, field], [True, True, True]),
    }
    return arguments[name]
