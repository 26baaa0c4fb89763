"""Scores without labels, by which benchmarks choose settings of the training: on deformations that are known."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import data_samples
import numpy as np
import pytest
import torch
from scipy import ndimage

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "held_back.py"


@pytest.fixture(scope="module")
def held_back() -> ModuleType:
    specification = importlib.util.spec_from_file_location("held_back", FILE)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def phantom() -> tuple[np.ndarray, np.ndarray]:
    """Intensities with a strong bias field, and the tissues: a ball of shells, fluid outside and in its middle."""
    x, y, z = np.meshgrid(*(np.arange(48),) * 3, indexing="ij")
    radius = np.sqrt((x - 23.5) ** 2 + (y - 23.5) ** 2 + (z - 23.5) ** 2)
    tissue = np.select([radius < 4, radius < 6, radius < 15, radius < 18, radius < 20], [4, 5, 3, 2, 1], 0)
    values = np.array([0.0, 0.15, 0.45, 0.7, 0.15, 0.45])[tissue] * np.exp(0.012 * (x - 23.5))
    noise = np.random.default_rng(0).normal(0, 0.01, values.shape)
    return np.where(tissue > 0, np.clip(values + noise, 0.01, 1), 0).astype(np.float32), tissue


def test_tissues_are_found_in_spite_of_a_bias_field(held_back: ModuleType) -> None:
    values, tissue = phantom()
    labels = held_back.tissues(values, tissue > 0, 2.0)
    assert set(np.unique(labels)) == {0, *held_back.TISSUES}
    assert (labels[tissue > 0] == tissue[tissue > 0]).mean() > 0.98


def test_fields_that_match_score_better(held_back: ModuleType) -> None:
    values, tissue = phantom()
    moved = [np.roll(array, 2, axis=0) for array in (values, tissue)]
    brains = [
        held_back.Brain(name, *(torch.from_numpy(array)[None, None] for array in (image, classes > 0, classes)))
        for name, image, classes in (("a", values, tissue), ("b", *moved))
    ]
    shift = torch.zeros(1, 3, 48, 48, 48)
    shift[:, 0] = 2.0
    right = held_back.score(shift, -shift, *brains, 2.0)
    nothing = held_back.score(0 * shift, 0 * shift, *brains, 2.0)
    assert all(right[f"dice_{name}"] == 1 for name in held_back.TISSUES.values()) and right["edges"] > 0.999
    assert right["inverse_mm"] < 1e-4 and right["log_jac"] == right["ndv"] == 0
    assert nothing["dice"] < 0.8 and nothing["edges"] < 0.8
    noise = np.random.default_rng(0).normal(size=shift.shape)
    wild = shift + 6 * torch.from_numpy(ndimage.gaussian_filter(noise, (0, 0, 1, 1, 1)))
    folding = held_back.score(wild.float(), -wild.float(), *brains, 2.0)
    assert folding["ndv"] > 0.1 and folding["log_jac"] > 0.3 and folding["inverse_mm"] > 0.1
    assert held_back.cycle_mm([shift, shift, shift], brains[0], 2.0) == pytest.approx(12.0)


def test_the_same_subjects_are_held_back_each_time_and_none_is_trained_on(
    held_back: ModuleType, tmp_path: Path
) -> None:
    root = data_samples.make_dataset(tmp_path / "data", training=9)
    kept, held = held_back.split(root, count=4)
    assert len(kept) == 5 and len(held) == 4 and not set(kept) & set(held)
    assert held_back.split(root, count=4) == (kept, held) != held_back.split(root, seed=1, count=4)
    named = {Path(entry["image"]).name for entry in json.loads((root / "LUMIR_dataset.json").read_text())["training"]}
    assert {image.path.name for image in kept + held} == named
