"""Two small brains and two untrained members, for all tests of registrations."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sitreg_lumir.demo.data import make_demo_data
from sitreg_lumir.io import itk as transforms
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import ModelCard, save_member

SHAPE = (40, 56, 48)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two brains at 4 mm, T1 and T2, on LUMIR's field of view."""
    folder = tmp_path_factory.mktemp("scans") / "data"
    make_demo_data(folder, training=2)
    return folder / "imagesVal"


@pytest.fixture(scope="session")
def members(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small untrained members whose fields are a few mm large: geometry does not ask for skill."""
    folder = tmp_path_factory.mktemp("members")
    affine = np.asarray(nib.load(data / "LUMIRMRI_0100_0000.nii.gz").affine)  # type: ignore[attr-defined]
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = SITReg(in_channels=6, features=(4, 8, 8), head_features=(8, 8, 8))
        with torch.no_grad():
            for head in network.heads:
                head.final.weight.normal_(std=0.3)  # type: ignore[union-attr, operator]
        mind = Mind()
        card = ModelCard(
            network.architecture, {"sigma": mind.sigma, "radius": mind.radius}, list(SHAPE), affine.tolist()
        )
        save_member(folder / f"seed{seed}.safetensors", network, card)
    return folder


@pytest.fixture(scope="session")
def t1(data: Path) -> Path:
    return data / "LUMIRMRI_0100_0000.nii.gz"


@pytest.fixture(scope="session")
def t2(data: Path) -> Path:
    return data / "LUMIRMRI_0101_0001.nii.gz"


@pytest.fixture
def coarse_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transforms on the images' own 4 mm grid instead of 1 mm: 64 times fewer voxels to write."""
    monkeypatch.setattr(transforms, "_LARGEST_SPACING", 4.0)
