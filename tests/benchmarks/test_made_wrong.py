"""The scans that `benchmarks/verdict.py` makes are what their matrices say."""

import sys
from pathlib import Path

import numpy as np
import pytest
from prepare_samples import brain

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import made_wrong as made

SAMPLE = brain(np.eye(4), (4, 4, 4))
KINDS = {**made.GOOD, **made.ALIGNED_GOOD, **made.HEADERS, **made.UNALIGNED, **made.PARTS, **made.MOVED_PARTS,
         **made.MIRRORED, **made.NO_BRAINS}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_takes_true_positions_to_the_headers(kind: str) -> None:
    values, affine, moved = KINDS[kind](SAMPLE.image, SAMPLE.affine, np.random.default_rng(1))
    brain_there = values > 0
    assert 1000 < brain_there.sum() <= SAMPLE.mask.sum() * 1.4 and values.max() <= 256
    if moved is None:
        assert kind in made.NO_BRAINS
        return
    true = np.linalg.inv(moved) @ affine  # voxels -> where they were
    where = np.argwhere(brain_there)[::37]
    at = (true @ np.c_[where, np.ones(len(where))].T)[:3]
    voxels = np.rint(np.linalg.inv(SAMPLE.affine[:3, :3]) @ (at - SAMPLE.affine[:3, 3:])).astype(int)
    assert SAMPLE.mask[tuple(voxels)].mean() > 0.95
    same = np.allclose(moved, np.eye(4))
    assert same == (kind in made.GOOD or kind in made.PARTS)
