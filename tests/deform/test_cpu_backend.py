"""The compiled CPU loops give the same numbers as plain torch, on any thread count, shape and layout."""

import os
import shutil
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sitreg_lumir.deform import ops
from sitreg_lumir.deform.backends.cpu import backend as cpu_backend
from sitreg_lumir.deform.backends.cpu import fallback, threads, vectorised
from sitreg_lumir.deform.backends.torch import backend as torch_backend

SHAPES = [(7, 9, 11), (17, 18, 5), (1, 5, 6), (6, 1, 1)]


@pytest.fixture
def random() -> Any:
    """Normal random tensors: ``random(*shape, dtype=..., scale=...)``."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=dtype)

    return draw


def assert_same(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Equal to rounding, where gradients of up to a hundred summands and gradients of several voxels occur."""
    if actual is None or expected is None:
        assert actual is expected
        return
    if not isinstance(actual, Tensor):
        for first, second in zip(actual, expected, strict=True):
            assert_same(first, second, dtype)
        return
    assert actual.dtype == expected.dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def inner(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_operation_equals_plain_torch(shape: tuple[int, ...], dtype: torch.dtype, random: Any) -> None:
    def field(scale: float) -> Tensor:
        return random(2, 3, *shape, dtype=dtype, scale=scale)

    scale = 3.0 if dtype == torch.float64 else 0.5  # in float32, steep fields enlarge the rounding of positions
    disps, grad = [field(scale) for _ in range(4)], field(1.0)
    for length in (2, 3, 4):
        fields = disps[:length]
        assert_same(cpu_backend.compose(fields), torch_backend.compose(fields), dtype)
        for needed in ([True] * length, [True] + [False] * (length - 1), [False] * (length - 1) + [True]):
            args = (grad, fields, needed)
            assert_same(cpu_backend.compose_adjoint(*args), torch_backend.compose_adjoint(*args), dtype)
    small, tolerance = field(0.05), 1e-13 if dtype == torch.float64 else 1e-6
    inverse = torch_backend.invert(small, tolerance, 100)
    assert_same(cpu_backend.invert(small, tolerance, 100), inverse, dtype)
    args = (grad, small, inverse)
    assert_same(cpu_backend.invert_adjoint(*args), torch_backend.invert_adjoint(*args), dtype)
    values, points = random(2, 5, *shape, dtype=dtype), random(2, 3, 4, 5, 3, dtype=dtype, scale=8)
    assert_same(cpu_backend.interpolate(values, points), torch_backend.interpolate(values, points), dtype)
    for needed in ((True, True), (True, False), (False, True)):
        args = (random(2, 5, 4, 5, 3, dtype=dtype), values, points)
        expected = torch_backend.interpolate_adjoint(*args, *needed)
        assert_same(cpu_backend.interpolate_adjoint(*args, *needed), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_level_operations_equal_plain_torch(
    shape: tuple[int, ...], factor: int, dtype: torch.dtype, random: Any
) -> None:
    level = [ceil(size / factor) for size in shape]
    control_points, grad = random(2, 3, *level, dtype=dtype), random(2, 3, *shape, dtype=dtype)
    args = (control_points, factor, shape)
    field = torch_backend.upsample_control_points(*args)
    assert_same(cpu_backend.upsample_control_points(*args), field, dtype)
    expected = torch_backend.upsample_control_points_adjoint(grad, factor)
    assert_same(cpu_backend.upsample_control_points_adjoint(grad, factor), expected, dtype)
    for channels in (1, 20):
        values, grad = random(2, 2, channels, *level, dtype=dtype)
        assert_same(cpu_backend.warp(values, field, factor), torch_backend.warp(values, field, factor), dtype)
        for needed in ((True, True), (True, False), (False, True)):
            expected = torch_backend.warp_adjoint(grad, values, field, factor, *needed)
            assert_same(cpu_backend.warp_adjoint(grad, values, field, factor, *needed), expected, dtype)


def test_far_displacements_equal_plain_torch(random: Any) -> None:
    """Look-ups from everywhere meet in a few voxels, and others leave the volume by far."""
    shape = (37, 29, 6)
    target = torch.tensor([20.3, 11.6, 2.2], dtype=torch.float64)[:, None, None, None]
    gather = target - torch_backend.grid_points(torch.empty(1, 3, *shape, dtype=torch.float64))
    for disp in (gather.contiguous(), random(1, 3, *shape, scale=40), gather + random(1, 3, *shape, scale=3)):
        grad, outer = random(2, 1, 3, *shape)
        args = (grad, [outer, disp, outer, disp], [True] * 4)
        assert_same(cpu_backend.compose_adjoint(*args), torch_backend.compose_adjoint(*args), torch.float64)
        warp_args = (grad, outer, disp, 1, True, True)
        assert_same(cpu_backend.warp_adjoint(*warp_args), torch_backend.warp_adjoint(*warp_args), torch.float64)


def test_any_layout_is_taken(random: Any) -> None:
    shape = (6, 7, 8)
    disp = random(1, 3, 1, 1, 1).expand(2, -1, *shape)
    sliced = random(2, 3, *(2 * size for size in shape), scale=0.05)[..., ::2, ::2, ::2]
    values = random(2, 4, *shape).contiguous(memory_format=torch.channels_last_3d)
    swapped = random(2, 3, *shape[::-1]).transpose(2, 4)
    dtype = torch.float64
    fields, needed = [disp, swapped, sliced], [True] * 3
    assert_same(cpu_backend.compose(fields), torch_backend.compose(fields), dtype)
    for grad in (swapped, torch.ones((), dtype=dtype).expand(2, 3, *shape)):
        expected = torch_backend.compose_adjoint(grad, fields, needed)
        assert_same(cpu_backend.compose_adjoint(grad, fields, needed), expected, dtype)
        inverse = cpu_backend.invert(sliced, 1e-12, 100)
        assert_same(inverse, torch_backend.invert(sliced, 1e-12, 100), dtype)
        expected = torch_backend.invert_adjoint(grad, sliced, inverse)
        assert_same(cpu_backend.invert_adjoint(grad, sliced, inverse), expected, dtype)
        expected = torch_backend.upsample_control_points_adjoint(grad, 2)
        assert_same(cpu_backend.upsample_control_points_adjoint(grad, 2), expected, dtype)
    assert_same(
        cpu_backend.upsample_control_points(sliced, 2, (12, 13, 15)),
        torch_backend.upsample_control_points(sliced, 2, (12, 13, 15)),
        dtype,
    )
    full = random(2, 3, 12, 14, 16).transpose(0, 1).contiguous().transpose(0, 1)
    for field, factor in ((swapped, 1), (full, 2)):
        assert_same(cpu_backend.warp(values, field, factor), torch_backend.warp(values, field, factor), dtype)
        args = (values, values, field, factor, True, True)
        assert_same(cpu_backend.warp_adjoint(*args), torch_backend.warp_adjoint(*args), dtype)
    points = random(1, 3, 4, 3, 5)
    assert_same(cpu_backend.interpolate(values, points), torch_backend.interpolate(values, points), dtype)


def test_adjoints_are_adjoint(random: Any) -> None:
    shape = (9, 10, 7)
    disp, values, grad = random(1, 3, *shape), random(1, 4, *shape), random(1, 4, *shape)
    grad_values, _ = cpu_backend.warp_adjoint(grad, values, disp, 1, True, False)
    assert inner(cpu_backend.warp(values, disp, 1), grad) == pytest.approx(inner(values, grad_values), rel=1e-12)
    for factor in (1, 2, 4):
        control_points = random(1, 3, *(ceil(size / factor) for size in shape))
        field = cpu_backend.upsample_control_points(control_points, factor, shape)
        back = cpu_backend.upsample_control_points_adjoint(disp, factor)
        assert inner(field, disp) == pytest.approx(inner(control_points, back), rel=1e-12)


def test_gradients_are_derivatives(random: Any) -> None:
    shape = (5, 4, 6)
    disps = [random(1, 3, *shape, scale=0.15).requires_grad_() for _ in range(3)]
    values = random(1, 2, *(ceil(size / 2) for size in shape)).requires_grad_()
    assert torch.autograd.gradcheck(ops.compose, disps, fast_mode=True)
    assert torch.autograd.gradcheck(lambda disp: ops.invert(disp, 1e-12, 100), disps[:1], fast_mode=True)
    assert torch.autograd.gradcheck(lambda values, disp: ops.warp(values, disp, 2), (values, disps[0]), fast_mode=True)


def test_inversion_meets_its_tolerance(random: Any) -> None:
    """The steepest fields that control points within their bound can make, at every level."""
    shape = (20, 24, 22)
    for factor, bound in ((1, 0.36), (2, 0.385), (8, 0.4)):
        control_points = random(1, 3, *(ceil(size / factor) for size in shape), dtype=torch.float32)
        disp = torch_backend.upsample_control_points(0.99 * bound * control_points.sign(), factor, shape)
        exact = cpu_backend.invert(disp.double(), 1e-12, 200)
        residual = exact + torch_backend.interpolate(disp.double(), torch_backend.grid_points(exact) + exact)
        assert float(residual.abs().max()) < 1e-10
        for tolerance in (1e-2, 1e-4):
            error = (cpu_backend.invert(disp, tolerance, 50) - exact).abs()
            assert float(error.max()) < 3 * tolerance and float(error.mean()) < 0.1 * tolerance


def test_inversion_of_broken_fields_ends(random: Any) -> None:
    disp = random(1, 3, 6, 7, 8, scale=0.1)
    disp[0, 1, 2, 3, 4] = float("nan")
    assert int(cpu_backend.invert(disp, 1e-2, 50).isnan().sum()) < 30  # what is broken stays where it is
    assert bool(cpu_backend.invert(random(1, 3, 6, 7, 8, scale=9), 1e-2, 50).isfinite().all())


def test_results_do_not_depend_on_the_number_of_threads(random: Any, two_threads: None) -> None:
    shape, dtype = (25, 26, 12), torch.float32
    first, second, third, grad = (random(2, 3, *shape, dtype=dtype, scale=4) for _ in range(4))
    small = random(2, 3, *shape, dtype=dtype, scale=0.05)
    control_points = random(2, 3, 13, 13, 6, dtype=dtype)
    features, grad_features = random(2, 2, 20, 13, 13, 6, dtype=dtype)

    def results() -> list[Tensor]:
        inverse = cpu_backend.invert(small, 1e-2, 50)
        tensors = [
            cpu_backend.compose([first, second, third]),
            *cpu_backend.compose_adjoint(grad, [first, second, third], [True] * 3),
            inverse,
            cpu_backend.invert_adjoint(grad, small, inverse),
            cpu_backend.upsample_control_points(control_points, 2, shape),
            cpu_backend.upsample_control_points_adjoint(grad, 2),
            cpu_backend.warp(features, first, 2),
            *cpu_backend.warp_adjoint(grad_features, features, first, 2, True, True),
            *cpu_backend.warp_adjoint(grad, second, first, 1, True, True),
        ]
        return [tensor for tensor in tensors if tensor is not None]

    on_two = [results() for _ in range(3)]
    torch.set_num_threads(1)
    for run in on_two:
        assert all(torch.equal(result, expected) for result, expected in zip(results(), run, strict=True))


def test_forked_workers_and_threads_of_autograd_do_not_disturb(random: Any, two_threads: None) -> None:
    disp = random(1, 3, 12, 13, 14).requires_grad_()

    def step() -> Tensor:
        (gradient,) = torch.autograd.grad(ops.compose(disp, disp).square().sum(), disp)
        return gradient

    before = step()
    loader: Any = DataLoader([0, 1, 2, 3], num_workers=2, multiprocessing_context="fork", collate_fn=_compose_in_worker)
    loader.timeout = 60
    in_workers = list(loader)  # the workers inherit a pool whose threads did not come along
    assert torch.equal(before, step())
    assert all(torch.equal(in_workers[0], result) for result in in_workers)


def _compose_in_worker(_: list[int]) -> Tensor:
    torch.set_num_threads(2)
    disp = torch.ones(1, 3, 12, 13, 14, dtype=torch.float64)
    return cpu_backend.compose([disp, disp])


def test_an_error_in_any_thread_is_raised(two_threads: None) -> None:
    def loop(first: int, last: int) -> None:
        raise ArithmeticError(f"{first}..{last}")

    with pytest.raises(ArithmeticError):
        threads.run(loop, 100)


_COMPOSE = """
import logging, torch
logging.basicConfig()
from sitreg_lumir.deform import ops
print(float(ops.compose(torch.ones(1, 3, 4, 4, 4), torch.ones(1, 3, 4, 4, 4)).sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("writable", [True, False])
def test_loops_compile_with_and_without_a_writable_folder(tmp_path: Path, writable: bool) -> None:
    """Files where numba wants folders stop it even if root runs the test."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(cpu_backend.__file__).parents[3], tmp_path / "sitreg_lumir", ignore=ignored)
    blocked = tmp_path / "blocked"
    blocked.touch()
    if not writable:
        (tmp_path / "sitreg_lumir" / "deform" / "backends" / "cpu" / "__pycache__").touch()
    places = {"HOME": str(blocked), "XDG_CACHE_HOME": str(blocked / "cache"), "PYTHONPATH": str(tmp_path)}
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"} | places
    for announcements in (1, 0) if writable else (1, 1):  # machine code of the first run serves the second
        done = subprocess.run(
            [sys.executable, "-c", _COMPOSE],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == 2 * 3 * 64
        assert done.stderr.count("compiling CPU kernels, once") == announcements


def compositions_and_inversions(random: Any, dtype: torch.dtype) -> list[tuple[Any, Any]]:
    """Results of the CPU backend and of plain torch."""
    shape = (7, 9, 11)
    disps, grad = [random(2, 3, *shape, dtype=dtype, scale=0.5) for _ in range(3)], random(2, 3, *shape, dtype=dtype)
    small, tolerance = random(2, 3, *shape, dtype=dtype, scale=0.05), 1e-13 if dtype == torch.float64 else 1e-6
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("compose", (disps,)),
        ("compose_adjoint", (grad, disps, [True, False, True])),
        ("compose_adjoint", (grad, disps, [False, True, False])),
        ("invert", (small, tolerance, 100)),
        ("invert_adjoint", (grad, small, torch_backend.invert(small, tolerance, 100))),
    ]
    calls += [("upsample_control_points", (small, 4, (26, 33, 41)))]
    with cpu_backend.copies_shared():
        return [(getattr(cpu_backend, name)(*args), getattr(torch_backend, name)(*args)) for name, args in calls]


def raises(*_: Any) -> Any:
    raise AttributeError("module 'numba.core.cgutils' has no attribute 'create_struct_proxy'")


def wrong(*_: Any) -> Any:
    return [torch.ones(2, 3, 3, 4, 5, dtype=torch.float64)] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("broken", [raises, wrong])
def test_operations_without_vectors_equal_plain_torch(
    broken: Any, dtype: torch.dtype, random: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("upsample_control_points", "compose", "compose_adjoint", "invert", "invert_adjoint"):
        monkeypatch.setattr(vectorised, name, broken)
    fallback.working.cache_clear()
    try:
        results = compositions_and_inversions(random, dtype)
    finally:
        fallback.working.cache_clear()
    for actual, expected in results:
        assert_same(actual, expected, dtype)
    assert len(caplog.messages) == 5 and "slower loops instead" in caplog.text  # each operation once


_WITHOUT_INSIDES = """
import logging
import numba.extending
logging.basicConfig()
numba.njit(lambda: 1)()  # what numba itself needs of it is loaded
del numba.extending.register_model  # as if a new version had none
import torch
from sitreg_lumir.deform import ops
from sitreg_lumir.network.layers import convolve
field = torch.full((1, 3, 4, 4, 4), 0.25, requires_grad=True)
ops.compose(field, ops.invert(field)).square().sum().backward()
weight = torch.ones(1, 3, 1, 1, 1, requires_grad=True)
convolve(field, weight).sum().backward()
print(float(ops.compose(field, field).sum()), bool(field.grad.isfinite().all()), float(weight.grad.sum()))
"""


@pytest.mark.slow
def test_a_numba_without_the_insides_that_vectors_need_still_computes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_INSIDES], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["96.0", "True", "48.0"]
    for name in ("compose", "weight_gradient"):
        assert f"{name}: vectors do not work with this version of numba" in done.stderr
