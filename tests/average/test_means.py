"""Means of sizes, maps and intensities: no scan leads them, and no order."""

import numpy as np
import pytest
import torch
from scipy.linalg import logm
from scipy.spatial.transform import Rotation

from sitreg_lumir.average.intensities import mean_image, sharpened, sharpness
from sitreg_lumir.average.mean_shape import mean_size, mean_updates
from sitreg_lumir.average.options import Average
from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.deform.splines import SplineUpdates

SPACING = np.array([2.0, 2.0, 2.0])


def alignments(count: int) -> list[np.ndarray]:
    """World of a scan -> the model's: turned, shifted, stretched and sheared."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        matrix = np.eye(4)
        stretch = np.eye(3) + 0.15 * rng.normal(size=(3, 3))
        matrix[:3, :3] = stretch @ Rotation.from_rotvec(rng.normal(size=3)).as_matrix()
        matrix[:3, 3] = rng.normal(scale=30, size=3)
        made.append(matrix)
    return made


def test_what_is_left_of_the_sizes_has_the_mean_logarithm_zero() -> None:
    size = mean_size(alignments(7))
    left = []
    for matrix in alignments(7):
        linear = np.linalg.inv(matrix)[:3, :3] @ size[:3, :3]
        left.append(logm(linear.T @ linear).real)
    np.testing.assert_allclose(np.mean(left, axis=0), 0, atol=1e-9)
    np.testing.assert_array_equal(size, size.T)
    np.testing.assert_allclose(mean_size(alignments(7)[::-1]), size, atol=1e-11)


def test_the_atlas_that_scans_are_aligned_to_does_not_lead_the_size() -> None:
    """Another common target gives the same template, turned at most."""
    target = alignments(1)[0]
    size, of_target = mean_size(alignments(5)), mean_size([target @ matrix for matrix in alignments(5)])
    between = np.linalg.inv(size)[:3, :3] @ np.linalg.inv(target)[:3, :3] @ of_target[:3, :3]
    np.testing.assert_allclose(between @ between.T, np.eye(3), atol=1e-9)
    assert abs(mean_size(alignments(1)) - np.eye(4)).max() > 0.01


def maps(seed: int, share: float = 0.9) -> SplineUpdates:
    generator = torch.Generator().manual_seed(seed)
    updates = []
    for factor in (4, 2, 1):
        bound = share * control_point_bound((factor,) * 3)
        size = [16 // factor, 12 // factor, 8 // factor]
        first, second = (bound * (2 * torch.rand(1, 3, *size, generator=generator) - 1) for _ in range(2))
        updates.append((first, second))
    return SplineUpdates.rounded(updates, (16, 12, 8))


def exchanged(updates: SplineUpdates) -> SplineUpdates:
    return SplineUpdates([(second, first) for first, second in updates.updates], updates.shape)


def test_the_mean_map_is_one_of_bounded_updates_whatever_the_order() -> None:
    several = [maps(seed) for seed in range(5)]
    mean, back = mean_updates(several), mean_updates(several[::-1])
    for factor, pair, exchanged in zip(mean.factors, mean.updates, back.updates, strict=True):
        for points, same in zip(pair, exchanged, strict=True):
            assert points.abs().max() < control_point_bound((factor,) * 3)
            assert torch.equal(points, same)
    points = torch.rand(3, 50, dtype=torch.float64) * 7
    moved = mean.move(points).points
    assert (mean.move(moved, inverse=True).points - points).abs().max() < 1e-3
    assert (moved - points).abs().max() > 0.01


def test_maps_and_their_inverses_have_the_identity_as_their_mean() -> None:
    mean = mean_updates([maps(0), exchanged(maps(0)), maps(1), exchanged(maps(1))])
    points = torch.rand(3, 50, dtype=torch.float64) * 7
    assert (mean.move(points).points - points).abs().max() < 1e-4
    same = mean_updates([maps(2), maps(2), maps(2)])
    for pair, expected in zip(same.updates, maps(2).updates, strict=True):
        assert torch.equal(pair[0], expected[0]) and torch.equal(pair[1], expected[1])


def test_for_small_displacements_it_is_the_mean_of_the_maps() -> None:
    several = [maps(seed, share=0.02) for seed in range(4)]
    points = torch.rand(3, 50, dtype=torch.float64) * 7
    mean = torch.stack([updates.move(points).points for updates in several]).mean(dim=0)
    apart = (mean_updates(several).move(points).points - mean).abs().max()
    assert apart < 0.05 * max((updates.move(points).points - points).abs().max() for updates in several)


@pytest.mark.parametrize(("average", "expected"), [("mean", 4.6), ("trimmed", 2.0), ("median", 2.0)])
def test_robust_means_ignore_what_a_scan_alone_shows(average: Average, expected: float) -> None:
    region = np.ones((6, 6, 6), np.bool_)
    values = [1.0, 2, 2, 2, 2, 2, 2, 2, 2, 29]
    scans = [np.full(region.sum(), value, np.float32) for value in values]
    for scan in scans[:6]:
        scan[0] = np.nan  # most show no brain
    for scan in scans:
        scan[-100:] = 10
    mean = mean_image(scans, region, average, 0.0, SPACING)
    assert not mean.brain[0, 0, 0] and mean.brain.sum() == 215 and mean.image[0, 0, 0] == 0
    ratio = mean.image[2, 2, 2] / mean.image[-1, -1, -1]
    assert ratio == pytest.approx(expected / 10, rel=1e-5)
    again = mean_image(scans[::-1], region, average, 0.0, SPACING)
    for first, second in ((mean.image, again.image), (mean.deviation, again.deviation)):
        np.testing.assert_array_equal(first, second)


def test_sharpening_raises_edges_and_leaves_even_tissue() -> None:
    brain = np.zeros((24, 24, 24), np.bool_)
    brain[3:-3, 3:-3, 3:-3] = True
    image = np.where(brain, np.float32(100), np.float32(0))
    np.testing.assert_allclose(sharpened(image, brain, 0.5, SPACING), image, atol=1e-3)  # its rim stays, too
    image[brain & (np.arange(24) > 11)] = 150
    more = sharpened(image, brain, 0.5, SPACING)
    assert more[12, 12, 12] > 151 and more[12, 12, 11] < 99
    assert sharpened(image, brain, 0.0, SPACING) is image
    plain, edged = (sharpness(values, np.zeros_like(values), brain, SPACING) for values in (image, more))
    assert edged["gradient_per_mm"] > plain["gradient_per_mm"] > 0
