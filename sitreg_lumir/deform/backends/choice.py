"""Which backend computes on a tensor: device and dtype decide, unless one is forced."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sitreg_lumir.deform.backends import cuda
from sitreg_lumir.deform.backends.interface import Backend
from sitreg_lumir.deform.backends.torch import backend as torch_backend

BACKENDS = ("auto", "torch", "cpu", "cuda")
_forced: str | Backend = os.environ.get("SITREG_LUMIR_BACKEND", "auto")


@contextmanager
def use_backend(backend: str | Backend) -> Iterator[None]:
    """Forces a backend (``torch``, ``cpu``, ``cuda``) within the block; ``auto`` follows device and dtype.

    A module with the functions of :class:`~sitreg_lumir.deform.backends.interface.Backend` is taken as it is, for all
    tensors. ``cuda`` takes float32 alone, ``cpu`` tensors on the CPU alone; the rest is left to ``torch``. The
    environment variable ``SITREG_LUMIR_BACKEND`` does the same for a whole process.

    Raises:
        ValueError: there is no such backend.

    Examples:
        >>> image, disp = torch.rand(1, 1, 8, 10, 6), torch.rand(1, 3, 8, 10, 6)
        >>> with sitreg_lumir.use_backend("torch"):
        ...     warped = sitreg_lumir.warp(image, disp)
        >>> bool(torch.allclose(warped, sitreg_lumir.warp(image, disp), atol=1e-5))
        True
    """
    global _forced
    if isinstance(backend, str) and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or a module, got {backend!r}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def backend_of(tensor: Tensor) -> Backend:
    """The backend that computes on this tensor.

    Raises:
        ValueError: there is no such backend, or ``cuda`` was asked for where Triton's kernels cannot run.
    """
    if not isinstance(_forced, str):
        return _forced
    if _forced not in BACKENDS:
        raise ValueError(f"SITREG_LUMIR_BACKEND must be one of {', '.join(BACKENDS)}, got {_forced!r}")
    if _forced in ("auto", "cuda") and cuda.usable(tensor.device, asked=_forced == "cuda"):
        return _cuda_backend() if tensor.dtype == torch.float32 else torch_backend
    if _forced in ("auto", "cpu") and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
        return _cpu_backend()
    return torch_backend


def compiled_on_cpu(tensor: Tensor) -> bool:
    """Whether compiled CPU loops compute on this tensor, also in bfloat16, which only the network's layers take."""
    if tensor.device.type != "cpu":
        return False
    as_float = torch.empty(0, dtype=torch.float32) if tensor.dtype == torch.bfloat16 else tensor
    return backend_of(as_float).NAME == "cpu"


def _cpu_backend() -> Backend:
    from sitreg_lumir.deform.backends.cpu import backend

    return backend


def _cuda_backend() -> Backend:
    from sitreg_lumir.deform.backends.cuda import backend

    return backend
