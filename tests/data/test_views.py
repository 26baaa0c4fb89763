"""Clean and augmented views."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sitreg_lumir.data.curves import apply_curve, random_curve
from sitreg_lumir.data.views import Augmentation, clean_view, downsampled_by_two

OFF: dict[str, Any] = dict.fromkeys(
    ("blur_probability", "gamma_probability", "inversion_probability", "noise_probability"), 0.0
)


@pytest.fixture
def stored() -> Tensor:
    """Two images of 0..255 in a background of 0, uint8."""
    values = torch.zeros(2, 1, 10, 12, 8, dtype=torch.uint8)
    random = torch.randint(1, 256, (2, 1, 6, 8, 5), generator=torch.Generator().manual_seed(0))
    values[:, :, 2:8, 2:10, 1:6] = random.byte()
    values[0, 0, 4, 4, 4] = 255
    return values


def test_clean_view(stored: Tensor) -> None:
    image, mask = clean_view(stored)
    assert (image.dtype, mask.dtype) == (torch.float32, torch.bool)
    torch.testing.assert_close(image, stored / 255)
    assert torch.equal(mask, stored > 0)


def test_downsampled_views_are_means_of_blocks(stored: Tensor) -> None:
    image, mask = clean_view(stored[..., :7])  # an odd axis
    coarse, inside = downsampled_by_two(image)
    assert coarse.shape == inside.shape == (2, 1, 5, 6, 3)
    torch.testing.assert_close(coarse[1, 0, 2, 3, 1], image[1, 0, 4:6, 6:8, 2:4].mean())
    assert torch.equal(inside, torch.nn.functional.max_pool3d(mask.float(), 2) > 0)


def test_each_image_has_its_own_view_and_the_background_stays_zero(stored: Tensor) -> None:
    image, mask = clean_view(stored)
    before = image.clone()
    augment = Augmentation()
    for first in range(20):
        seeds = torch.tensor([first, 2**62 + first])
        views = augment(image, mask, seeds)
        assert views.dtype == torch.float32
        assert torch.equal(views, augment(image, mask, seeds))
        assert torch.equal(views[1:], augment(image[1:], mask[1:], seeds[1:]))
        assert (views[~mask] == 0).all()
        assert views.isfinite().all()
        assert type(views) is Tensor
    assert torch.equal(image, before)
    same = torch.stack([augment(image[:1], mask[:1], torch.tensor([seed])) for seed in range(40)])
    assert len(torch.unique(same, dim=0)) > 30  # about one in sixteen is the clean view


def test_steps_one_by_one(stored: Tensor) -> None:
    image, mask = clean_view(stored)
    seeds = torch.tensor([5, 2**63 - 1])
    assert torch.equal(Augmentation(**OFF)(image, mask, seeds), image)
    inverted = Augmentation(**OFF | {"inversion_probability": 1.0})(image, mask, seeds)
    torch.testing.assert_close(inverted, torch.where(mask, 1 - image, 0))
    gamma = Augmentation(**OFF | {"gamma_probability": 1.0}, gamma=(1.5, 1.5))(image[:1], mask[:1], seeds[:1])
    torch.testing.assert_close(gamma, image[:1] ** 1.5)
    noise = Augmentation(**OFF | {"noise_probability": 1.0}, noise_sigma=(0.05, 0.05))
    rest = (noise(image, mask, seeds) - image)[mask]
    assert 0.045 < rest.std() < 0.055
    none = Augmentation(**OFF | {"blur_probability": 1.0}, blur_sigma=(0.0, 0.0))(image, mask, seeds)
    torch.testing.assert_close(none, image)
    blurred = Augmentation(**OFF | {"blur_probability": 1.0}, blur_sigma=(1.0, 1.0))(image, mask, seeds)
    assert blurred[mask].std() < 0.6 * image[mask].std()
    assert (blurred[~mask] == 0).all()


def test_probabilities_and_ranges(stored: Tensor) -> None:
    image, mask = clean_view(stored[:1])
    augment = Augmentation(**OFF | {"inversion_probability": 0.3})
    changed = [not torch.equal(augment(image, mask, torch.tensor([seed])), image) for seed in range(200)]
    assert 40 < sum(changed) < 80
    with pytest.raises(ValueError, match=r"0\.\.1"):
        Augmentation(blur_probability=1.2)
    with pytest.raises(ValueError, match="gamma"):
        Augmentation(gamma=(0.0, 1.0))
    with pytest.raises(ValueError, match="expected image and mask"):
        augment(image[0], mask[0], torch.tensor([0]))


@pytest.mark.parametrize("monotone", [True, False])
def test_curves_are_smooth_and_keep_neighbouring_intensities_apart(monotone: bool) -> None:
    curves = np.stack([random_curve(seed, monotone) for seed in range(100)])
    assert curves.min() >= 0 and curves.max() <= 1
    steps = np.diff(curves, axis=1)
    assert np.abs(np.diff(steps, axis=1)).max() < 2e-4 < np.abs(steps).max(), "no corner"
    knots = curves[:, np.linspace(0, curves.shape[1] - 1, 5).round().astype(int)]
    assert np.abs(np.diff(knots, axis=1)).min() > 0.09
    of_one_sign = (steps >= 0).all(axis=1) | (steps <= 0).all(axis=1)
    assert of_one_sign.all() if monotone else of_one_sign.mean() < 0.3
    if monotone:
        ends = curves[:, -1].round(12)
        assert 30 < (ends == 1).sum() < 70 and set(ends) == {0.0, 1.0}


def test_a_curve_replaces_intensities_inside_the_mask_and_moves_no_other_draw(stored: Tensor) -> None:
    image, mask = clean_view(stored)
    image = image * torch.tensor([1.0, 0.6])[:, None, None, None, None]
    table = random_curve(3, False)
    applied = apply_curve(image[1], table)
    largest = float(image[1].max())
    expected = largest * np.interp(image[1].numpy() / largest, np.linspace(0, 1, len(table)), table)
    np.testing.assert_allclose(applied.numpy(), expected, atol=1e-6)
    seeds = torch.tensor([5, 2**63 - 1])
    views = Augmentation(**OFF, curve_probability=1.0)(image, mask, seeds)
    assert (views[~mask] == 0).all() and views.min() >= 0
    for before, after, inside in zip(image, views, mask, strict=True):
        order = before[inside].argsort()
        jumps = after[inside][order].diff().abs()  # a function of the intensity: equal ones stay equal
        assert float(jumps[before[inside][order].diff() == 0].max()) == 0
        assert not torch.equal(before, after) and float(after.max()) <= float(before.max()) + 1e-6
    noise = {"noise_probability": 1.0, "noise_sigma": (0.05, 0.05)}
    both = Augmentation(**OFF | noise, curve_probability=1.0)(image, mask, seeds)
    alone = Augmentation(**OFF | noise)(image, mask, seeds)
    torch.testing.assert_close((both - views)[mask], (alone - image)[mask], atol=1e-6, rtol=0)
    some = Augmentation(**OFF, curve_probability=0.3)
    changed = [not torch.equal(some(image, mask, torch.tensor([s, s])), image) for s in range(200)]
    assert 40 < sum(changed) < 80
    with pytest.raises(ValueError, match=r"0\.\.1"):
        Augmentation(curve_probability=-0.1)
