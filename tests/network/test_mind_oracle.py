"""MIND against a direct evaluation of its two equations."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sitreg_lumir.network.mind import Mind


@pytest.mark.parametrize(
    ("dtype", "tolerance", "from_variance"),
    [
        (torch.float64, 1e-6, 0.0),
        (torch.float32, 1e-4, 1e-4),
    ],
)
def test_mind_matches_the_oracle(oracles: Path, dtype, tolerance, from_variance):
    stored = np.load(oracles / "mind.npz")
    volumes = sorted({name.split("/")[0] for name in stored.files})
    assert volumes
    for volume in volumes:
        image = torch.from_numpy(stored[f"{volume}/image"]).to(dtype)[None, None]
        mind = Mind()
        distance, variance = mind.distances(image)
        expected = {
            key: torch.from_numpy(stored[f"{volume}/{key}"]) for key in ("distance", "variance", "mind", "valid")
        }
        torch.testing.assert_close(distance[0], expected["distance"].to(dtype), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(variance[0, 0], expected["variance"].to(dtype), atol=1e-6, rtol=1e-5)
        where = (expected["variance"] > from_variance) | (expected["valid"] == 0)
        if dtype == torch.float32:  # next to the guard's threshold, rounding decides
            at_threshold = (expected["variance"] / 1e-6 - 1).abs() < 1e-3
            assert float(at_threshold.double().mean()) <= 1e-3
            where &= ~at_threshold
        actual = mind(image)[0]
        error = (actual - expected["mind"].to(dtype)).abs()[:, where]
        assert float(error.max()) <= tolerance


def test_contrast_inversion_and_scaling_change_nothing():
    image = torch.rand(1, 1, 9, 8, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mind = Mind()
    torch.testing.assert_close(mind(1 - 0.5 * image), mind(image))


def test_the_six_values_of_a_voxel_multiply_to_exp_minus_six():
    image = torch.rand(1, 1, 9, 8, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(-Mind()(image).log().sum(1), torch.full((1, 9, 8, 7), 6.0, dtype=torch.float64))


def test_a_flat_image_gives_one_and_bfloat16_autocast_changes_nothing():
    image = torch.zeros(1, 1, 6, 6, 6)
    assert bool((Mind()(image) == 1).all())
    image[:, :, 2:4] = 0.7
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Mind()(image)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, Mind()(image), atol=0, rtol=0)
