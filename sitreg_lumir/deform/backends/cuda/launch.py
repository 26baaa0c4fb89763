"""How the Triton kernels are compiled and launched."""

import inspect
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

_LARGEST = 2**31 - 2**16  # voxels of a volume are numbered in 32 bits, up to the end of the last block


def compiled(function: Callable[..., Any]) -> Any:
    """A Triton function. Arguments annotated ``int`` are never specialised: a new shape needs no new machine code."""
    sizes = [name for name, value in inspect.signature(function).parameters.items() if value.annotation is int]
    return triton.jit(function, do_not_specialize=sizes)


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **constants: Any) -> None:
    """Queues a kernel on the current stream of the device of ``like``; nothing waits for it."""
    with torch.cuda.device_of(like):
        kernel[grid](*args, **constants)


def blocks(shape: Sequence[int], block: int) -> int:
    """Number of blocks of ``block`` lanes that cover a volume of ``shape``.

    Raises:
        ValueError: a volume of nearly 2^31 voxels or more.
    """
    if prod(shape) > _LARGEST:
        raise ValueError(f"the Triton kernels take volumes of up to {_LARGEST} voxels, got {tuple(shape)}")
    return -(-prod(shape) // block)
