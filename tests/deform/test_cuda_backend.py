"""The Triton kernels: in Triton's interpreter, through its compiler, and on a GPU, each in a process of its own.

Whether kernels are interpreted is settled when they are first imported, for the whole process.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sitreg_lumir.deform import ops
from sitreg_lumir.deform.backends import backend_of, cuda, use_backend
from sitreg_lumir.deform.backends.torch import backend as torch_backend

pytestmark = pytest.mark.timeout(600)  # less than a minute, unless the machine is shared
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux alone has it)")


def run_checks(name: str, folder: Path, interpret: bool) -> None:
    """Runs a file of tests in a process of its own; its output is shown if a test fails."""
    unset = ("TRITON_INTERPRET", "SITREG_LUMIR_BACKEND", "PYTEST_ADDOPTS")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    environment |= {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@needs_triton
def test_operations_equal_plain_torch_in_the_interpreter(tmp_path: Path) -> None:
    run_checks("cuda_backend_checks.py", tmp_path, interpret=True)


@pytest.mark.slow
@needs_triton
def test_kernels_pass_the_compiler(tmp_path: Path) -> None:
    run_checks("cuda_compile_checks.py", tmp_path, interpret=False)


@pytest.mark.gpu
@needs_triton
def test_operations_equal_plain_torch_on_a_gpu(tmp_path: Path) -> None:
    run_checks("cuda_backend_checks.py", tmp_path, interpret=False)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with use_backend("cuda"), pytest.raises(ValueError, match=r"cannot compute on cpu: .*TRITON_INTERPRET=1"):
        ops.compose(torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 3, 2, 2, 2))


def test_a_gpu_without_working_kernels_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda:63")  # a trial fails on it, whatever is installed
    assert not cuda.usable(device, asked=False)
    assert "plain PyTorch instead" in caplog.text
    with pytest.raises(ValueError, match="backend 'cuda' cannot compute on cuda:63: "):
        cuda.usable(device, asked=True)


def test_other_devices_are_left_to_plain_torch() -> None:
    assert backend_of(torch.zeros(1, device="meta")) is torch_backend
