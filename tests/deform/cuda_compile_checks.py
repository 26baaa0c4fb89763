"""Triton's compiler takes every kernel, for GPUs that need not be there: what ``test_cuda_backend.py`` runs.

The interpreter is more lenient than the compiler. Needs a process where ``TRITON_INTERPRET`` is not set.
"""

from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sitreg_lumir.deform.backends.cuda import backend, images
from sitreg_lumir.deform.bspline import Coefficients

TARGETS = (80, 90, 120)  # compute capabilities of A100, H100 and RTX 50: one of each generation
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8"}


def type_of(value: Any) -> Any:
    """Triton's name of an argument's type."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, tuple):
        return tuple(type_of(part) for part in value)
    return "fp32" if isinstance(value, float) else "i32"


@pytest.fixture(params=TARGETS, ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels compiled so far; launching one only compiles it, for the arguments given."""
    names: set[str] = set()

    def compile_instead(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **constants: Any) -> None:
        signature = dict(zip(kernel.arg_names, map(type_of, args), strict=False))
        # a stride of 1 between channels is known to the compiler, as when it is launched
        fixed = {
            name: 1 for name, value in zip(kernel.arg_names, args, strict=False) if name.endswith("_c") and value == 1
        }
        signature |= dict.fromkeys(fixed | constants, "constexpr")
        source = ASTSource(kernel, signature, fixed | constants)
        machine_code = triton.compile(source, target=GPUTarget("cuda", request.param, 32)).asm
        assert f".target sm_{request.param}" in machine_code["ptx"] and machine_code["cubin"]
        names.add(kernel.__name__)

    for module in (backend, images):
        monkeypatch.setattr(module, "launch", compile_instead)
    return names


def test_every_kernel_compiles(compiled: set[str]) -> None:
    disp, level = torch.zeros(2, 3, 8, 6, 4), torch.zeros(2, 3, 4, 3, 2)
    backend.compose([disp] * 3)
    backend.compose_adjoint(disp, [disp] * 2, [True, True])
    backend.compose_adjoint(disp, [disp] * 3, [True, False, False])
    backend.invert(disp, 1e-2, 50)
    backend.invert_adjoint(disp, disp, disp)
    backend.upsample_control_points(level, 2, disp.shape[2:])
    for features, field, factor in ((torch.zeros(2, 5, 4, 3, 2), disp, 2), (torch.zeros(2, 5, 4, 3, 2), level, 1)):
        layout = torch.channels_last_3d if factor == 2 else torch.contiguous_format
        features = features.contiguous(memory_format=layout)
        backend.warp(features, field, factor)
        backend.warp_adjoint(features, features, field, factor, True, True)
    image, mask = disp[:, :1], torch.ones(2, 1, 8, 6, 4, dtype=torch.bool)
    backend.mask_at(mask, disp, True)
    backend.lncc_and_gradients(image, image, mask, 11, True, True)
    backend.ndv_sum_and_gradient(disp, True)
    backend.diffusion(disp, [[1.0] * 3] * 3)
    backend.diffusion_adjoint(torch.ones(()), disp, [[1.0] * 3] * 3)
    backend.mind(image, 0.5, 2)
    coefficients = Coefficients(torch.zeros(2 * 4 * 12 * 10 * 8), [(12, 10, 8)] * 2, [1, 1], (8, 6, 4))
    points, steps = torch.zeros(3, 5, dtype=torch.float64), [(1, True), (0, False)]
    for jacobians in (False, True):
        backend.move_points(points, steps, coefficients, jacobians, 1e-3, 50)
    assert compiled == {
        "compose", "scatter_compose", "invert", "scatter_invert", "multiply_axis", "lookup", "scatter_lookup",
        "inside_mask", "sum_products", "sum_axis", "correlate", "correlate_adjoint", "fold", "squared_differences",
        "squared_differences_adjoint", "smooth_differences", "describe", "move_points",
    }  # fmt: skip
