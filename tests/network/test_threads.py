"""Results on a CPU do not depend on the number of threads: networks, training, `register`, at the sizes users have."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from sitreg_lumir.data.views import clean_view
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.shipped import shipped_members
from sitreg_lumir.network.sitreg import SITReg, run_stages
from sitreg_lumir.network.weights import load_members
from sitreg_lumir.train.terms import PairOutputs, pair_terms


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def brain(path: Path) -> tuple[Tensor, Tensor]:
    """Clean view and mask ``(1, 1, X, Y, Z)`` of a stored volume."""
    image: Any = nib.load(path)  # type: ignore[attr-defined]
    return clean_view(torch.from_numpy(np.asarray(image.dataobj))[None, None])


@pytest.fixture(scope="module")
def pair(shared: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Two real brains at 2 mm."""
    folder = shared / "realbrains/2mm/imagesTr"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (real brains)")
    return brain(folder / "LUMIRMRI_1000_0000.nii.gz"), brain(folder / "LUMIRMRI_1005_0000.nii.gz")


def step(network: SITReg, pair: Any, dtype: torch.dtype) -> list[Tensor]:
    """Loss, gradients and last field of a training step with deep supervision."""
    (fixed, fixed_mask), (moving, moving_mask) = pair
    fixed, moving, mind = fixed.to(dtype), moving.to(dtype), Mind()
    network = network.to(dtype)
    stages = run_stages([network], fixed=mind(fixed), moving=mind(moving), levels=range(network.levels))
    outputs = PairOutputs(stages, fixed, moving, fixed_mask, moving_mask)
    loss = sum(term.weight(0, 0) * term.call(outputs) for term in pair_terms(1.0, 0.01))
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return [loss.detach(), stages[-1].disp.detach(), *gradients]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_step_at_2_mm_is_exact_and_has_the_same_bits_on_any_number_of_threads(pair: Any) -> None:
    torch.manual_seed(3)
    network = SITReg(6, [8, 16, 32, 32], [8, 16, 32, 32])
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results.append(step(network, pair, torch.float32))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    loss, disp, *gradients = step(network, pair, torch.float64)
    assert float(results[0][0]) == pytest.approx(float(loss), rel=1e-6)
    assert float((results[0][1] - disp).abs().mean()) < 1e-5
    exact = torch.cat([gradient.flatten() for gradient in gradients])
    difference = torch.cat([gradient.flatten() for gradient in results[0][2:]]) - exact
    # What is left comes from kinks: a ReLU or a mask that float32 decides otherwise. PyTorch's sums gave 0.18.
    assert float(difference.norm() / exact.norm()) < 5e-3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_shipped_ensemble_is_exact_and_has_the_same_bits_on_any_number_of_threads(pair: Any) -> None:
    """Two of its members, since all are of a kind; `register` below takes the whole of it."""
    (fixed, _), (moving, _) = pair
    networks = [member.network for member in load_members(shipped_members()[:2])]
    results = []
    with torch.inference_mode():
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(run_stages(networks, fixed=Mind()(fixed), moving=Mind()(moving))[-1])
        assert torch.equal(results[0].disp, results[1].disp)
        assert torch.equal(results[0].disp_inv, results[1].disp_inv)
        inputs = Mind()(fixed.double()), Mind()(moving.double())
        exact = run_stages([network.double() for network in networks], fixed=inputs[0], moving=inputs[1])[-1]
    apart = (results[0].disp - exact.disp).norm(dim=1)
    assert float(apart.mean()) < 1e-4 and float(apart.quantile(0.99)) < 1e-3  # voxels


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_full_network_at_1_mm_has_the_same_bits_on_any_number_of_threads() -> None:
    torch.manual_seed(4)
    network = SITReg().eval()
    for head in network.heads:
        torch.nn.init.normal_(head.final.weight, std=0.1)
    axes = torch.meshgrid(*(torch.linspace(-1.2, 1.2, size) for size in (160, 224, 192)), indexing="ij")
    inside = sum(axis.square() for axis in axes) < 1
    noise = torch.nn.functional.avg_pool3d(torch.rand(2, 1, 162, 226, 194), 3, stride=1)
    fixed, moving = (noise * inside).split(1)
    results = []
    with torch.inference_mode():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            stage = run_stages([network], fixed=Mind()(fixed), moving=Mind()(moving), inverse=False)[-1]
            results.append(stage.disp)
    assert float(results[0].abs().max()) > 1
    assert torch.equal(*results)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_register_writes_the_same_files_on_any_number_of_threads(shared: Path, tmp_path: Path) -> None:
    """From the shell, two scans at 1 mm of different contrasts, alignment and refinement included."""
    images = shared / "minilumir/1mm/imagesVal"
    sums = {}
    for threads in (1, 4):
        out = tmp_path / str(threads)
        command = [sys.executable, "-m", "sitreg_lumir.cli", "register", "-o", str(out), "--refine", "3", "--no-report"]
        command += ["--save", "warped,transforms,map"]
        command += ["--fixed", str(images / "LUMIRMRI_0100_0000.nii.gz")]
        command += ["--moving", str(images / "LUMIRMRI_0101_0001.nii.gz"), "--align", "each"]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        results = sorted(path for path in out.iterdir() if path.suffix in (".gz", ".h5", ".safetensors"))
        sums[threads] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in results}
        sums[threads]["summary"] = json.dumps(
            {key: json.loads((out / "summary.json").read_text())[key] for key in ("verdict", "similarity")}
        )
    assert {"warped_moving.nii.gz", "map.safetensors"} < set(sums[1]) and len(sums[1]) == 6
    assert sums[1] == sums[4]
