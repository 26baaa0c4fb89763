"""Every operation on deformations and its adjoint in compiled CPU loops: same results as the torch backend, faster.

Fields are ``(B, 3, X, Y, Z)``, voxels; float32 or float64, any layout. Results do not depend on the number of threads.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitreg_lumir.deform.backends.cpu import grids, stepwise
from sitreg_lumir.deform.backends.cpu.arrays import array
from sitreg_lumir.deform.backends.cpu.images import diffusion as diffusion
from sitreg_lumir.deform.backends.cpu.images import diffusion_adjoint as diffusion_adjoint
from sitreg_lumir.deform.backends.cpu.images import lncc_and_gradients as lncc_and_gradients
from sitreg_lumir.deform.backends.cpu.images import mind as mind
from sitreg_lumir.deform.backends.cpu.images import ndv_map as ndv_map
from sitreg_lumir.deform.backends.cpu.images import ndv_sum_and_gradient as ndv_sum_and_gradient
from sitreg_lumir.deform.backends.cpu.sampling import interpolate as interpolate
from sitreg_lumir.deform.backends.cpu.sampling import interpolate_adjoint as interpolate_adjoint
from sitreg_lumir.deform.backends.cpu.sampling import mask_at as mask_at
from sitreg_lumir.deform.backends.cpu.sampling import warp as warp
from sitreg_lumir.deform.backends.cpu.sampling import warp_adjoint as warp_adjoint
from sitreg_lumir.deform.backends.cpu.threads import run
from sitreg_lumir.deform.backends.torch import backend as torch_backend
from sitreg_lumir.deform.bspline import upsampling_matrix

NAME = "cpu"
_TRUTH: dict[str, Callable[..., Any]] = {
    "invert": torch_backend.invert,
    "invert_adjoint": torch_backend.invert_adjoint,
    "compose": torch_backend.compose,
    "compose_adjoint": torch_backend.compose_adjoint,
}
_log = logging.getLogger(__name__)


def upsample_control_points(control_points: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """Control points (level voxels) -> field (full-resolution voxels) on a grid of ``shape``."""
    batch, channels = control_points.shape[:2]
    field = control_points.new_empty(batch * channels, *shape)
    taps = [array for size in shape for array in _taps(size, factor, control_points.dtype)]
    run(
        grids.upsample,
        batch * channels * shape[0],
        array(control_points.flatten(0, 1)),
        factor,
        *taps,
        array(field),
    )
    return field.view(batch, channels, *shape)


def upsample_control_points_adjoint(grad: Tensor, factor: int) -> Tensor:
    """Gradient of :func:`upsample_control_points` with respect to the control points."""
    batch, channels, *shape = grad.shape
    taps_x, taps_y, taps_z = (_taps(size, factor, grad.dtype) for size in shape)
    level = [-(-size // factor) for size in shape]
    planes = grad.new_empty(batch * channels, shape[0], *level[1:])
    run(
        grids.reduce_planes,
        batch * channels * shape[0],
        array(grad.flatten(0, 1)),
        *taps_y,
        *taps_z,
        array(planes),
    )
    result = grad.new_empty(batch * channels, *level)
    run(grids.reduce_volumes, batch * channels * level[0], array(planes), factor, *taps_x, array(result))
    return result.view(batch, channels, *level)


@lru_cache(maxsize=64)
def _taps(size: int, factor: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """``(size, 4)`` indices of the control points each sample of one axis depends on, and their weights."""
    matrix = upsampling_matrix(size, factor, dtype, torch.device("cpu")).numpy()
    first = np.minimum((matrix != 0).argmax(axis=1), max(matrix.shape[1] - 4, 0))
    index = first[:, None] + np.arange(4)
    exists = index < matrix.shape[1]
    index = np.minimum(index, matrix.shape[1] - 1)
    weights = np.where(exists, np.take_along_axis(matrix, index, axis=1), 0).astype(matrix.dtype)
    return index, weights


def invert(disp: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """The field ``v`` with ``v(x) = -u(clamp(x + v(x)))``, to ``tolerance`` voxels."""
    inverse: Tensor = _working("invert", disp.dtype)(disp, tolerance, max_iterations)
    return inverse


def invert_adjoint(grad: Tensor, disp: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of :func:`invert` with respect to ``disp``: a 3x3 solve per voxel and one adjoint look-up."""
    grad_disp: Tensor = _working("invert_adjoint", disp.dtype)(grad, disp, inverse)
    return grad_disp


def compose(disps: Sequence[Tensor]) -> Tensor:
    """The field of ``disps[0] o disps[1] o ...`` (last one first) on the grid; nothing is resampled between."""
    composed: Tensor = _working("compose", disps[0].dtype)(disps)
    return composed


def compose_adjoint(grad: Tensor, disps: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of :func:`compose` with respect to each field, None where ``needed`` says so."""
    grads: list[Tensor | None] = _working("compose_adjoint", grad.dtype)(grad, disps, needed)
    return grads


def copies_shared() -> AbstractContextManager[None]:
    """Within the block, in this thread, a field that is looked up several times is interleaved once.

    Fields that are looked up must not be changed within the block; the last three are kept, with their copies.
    """
    try:
        shared: AbstractContextManager[None] = _vectorised().copies_shared()
    except Exception:  # whatever a numba that has changed raises; ``_working`` reports it
        return nullcontext()
    return shared


def _vectorised() -> Any:
    return import_module("sitreg_lumir.deform.backends.cpu.vectorised")


@lru_cache
def _working(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """An operation on chains of fields: vectorised if that gives the right numbers here, else step by step.

    The vectors are built with numba's insides, which may change with any version: so each operation is tried once in
    a process, on a small field, against plain torch.
    """
    field = torch.linspace(-0.4, 0.4, 2 * 3 * 3 * 4 * 5, dtype=dtype).view(2, 3, 3, 4, 5).sin()
    arguments: dict[str, tuple[Any, ...]] = {
        "invert": (field / 2, 1e-4, 50),
        "invert_adjoint": (field, field / 2, -field / 2),
        "compose": ([field, -field, field],),
        "compose_adjoint": (field, [field, -field, field], [True, True, True]),
    }
    try:
        vectorised = getattr(_vectorised(), name)
        with _vectorised().copies_shared():
            computed = vectorised(*arguments[name])
        torch.testing.assert_close(computed, _TRUTH[name](*arguments[name]), rtol=0, atol=1e-3)
    except Exception as error:  # whatever a numba that has changed raises, wrong numbers included
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _log.warning("%s: vectors do not work with this version of numba, slower loops instead (%s)", name, reason)
        stepwise_operation: Callable[..., Any] = getattr(stepwise, name)
        return stepwise_operation
    result: Callable[..., Any] = vectorised
    return result
