"""Tensors as the arrays that compiled loops take, and loops that run over tiles."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitreg_lumir.deform.backends.cpu import scatter
from sitreg_lumir.deform.backends.cpu.threads import run


def run_tiles(
    loop: Callable[..., None],
    fields: Sequence[Any],
    grid: Sequence[int],
    shape: tuple[int, ...],
    relative: bool,
    parts: int,
    *args: Any,
) -> None:
    """Runs a loop over all tiles of the points' grid ``(B, 3, I, J, K)``, ``parts`` tasks each, colour by colour.

    ``fields`` are those that lead to the places added to, on grids of ``shape``, the first applied first.
    """
    batch, _, *axes = grid
    tiles = batch * prod(-(-size // scatter.TILE) for size in axes[:2])
    extrema = np.empty((len(fields), tiles, 4))
    for field, row in zip(fields, extrema, strict=True):
        run(scatter.tile_extrema, tiles, tuple(axes), field, row)
    colours = scatter.colour_tiles(shape, tuple(axes), relative, extrema)
    for colour in range(int(colours.max()) + 1):
        members = np.flatnonzero(colours == colour)
        run(loop, len(members) * parts, members, *args)


def array(tensor: Tensor) -> Any:
    """A contiguous array of the shape of the tensor."""
    return tensor.detach().contiguous().numpy()


def flat(tensor: Tensor, channels_last: bool = False) -> Any:
    """The values in one row, in the order ``(B, C, X, Y, Z)``, or with channels innermost."""
    tensor = tensor.detach()
    if channels_last:
        tensor = tensor.contiguous(memory_format=torch.channels_last_3d).movedim(1, -1)
    return tensor.contiguous().view(-1).numpy()


def by_voxel(values: Tensor) -> Any:
    """A contiguous array ``(B, X, Y, Z, C)``."""
    return values.detach().movedim(1, -1).contiguous().numpy()


def empty(like: Tensor) -> Tensor:
    """A contiguous tensor of the same shape and type, not filled."""
    return torch.empty(like.shape, dtype=like.dtype)


def zeros(like: Tensor) -> Tensor:
    """A contiguous tensor of zeros of the same shape and type."""
    return torch.zeros(like.shape, dtype=like.dtype)


def planes(field: Tensor) -> int:
    """Number of planes along the first axis, over the batch."""
    return len(field) * field.shape[2]


def rows(field: Tensor) -> int:
    """Number of rows along the last axis, over the batch."""
    return len(field) * field.shape[2] * field.shape[3]
