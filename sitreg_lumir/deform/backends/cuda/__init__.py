"""Triton kernels for the operations on deformations on a GPU, and whether they can be used."""

import logging
import os
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch

_log = logging.getLogger(__name__)


def usable(device: torch.device, asked: bool) -> bool:
    """Whether Triton kernels can compute on a device; settled once, by one small kernel.

    Args:
        device: of the tensors.
        asked: the user wants these kernels and no others, so that what is missing is an error.

    Raises:
        ValueError: ``asked``, and they cannot; the message says why.
    """
    if device.type != "cuda" and not asked:
        return False
    reason = _missing(device)
    if reason and asked:
        raise ValueError(f"backend 'cuda' cannot compute on {device}: {reason}")
    return not reason


@lru_cache
def _missing(device: torch.device) -> str:
    """What stands against Triton kernels on a device, empty if nothing does; logged where a GPU goes without them."""
    if device.type != "cuda" and (device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1"):
        return "its kernels run on GPUs (or on the CPU in Triton's interpreter, with TRITON_INTERPRET=1)"
    reason = "the package triton is not installed" if find_spec("triton") is None else _trial(device)
    if reason:
        _log.warning("no Triton kernels on %s, plain PyTorch instead: %s", device, reason)
    return reason


def _trial(device: torch.device) -> str:
    """Why one small kernel could not be compiled and launched, if so: old GPUs, or no C compiler in the path."""
    try:
        backend = import_module("sitreg_lumir.deform.backends.cuda.backend")
        backend.compose([torch.zeros(1, 3, 2, 2, 2, device=device)] * 2)
    except Exception as error:  # whatever Triton, its compiler or the driver raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
