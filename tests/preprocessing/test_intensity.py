"""Intensity normalisation: whatever a scan's unit, background or voxel size was, the network sees the same brain."""

import numpy as np
import pytest
from prepare_samples import Array, turn

from sitreg_lumir.errors import InputError
from sitreg_lumir.preprocessing.intensity import conform, inverse, mask_on_grid, normalise, smoothing, support_mask

SHAPE = (30, 34, 28)
GRID = np.diag([1.0, 1.0, 1.0, 1.0])


@pytest.fixture
def scan() -> tuple[Array, Array]:
    """A ball of random smooth tissue, 20..220, with a dark hole inside that is not background; and where it is."""
    rng = np.random.default_rng(0)
    place = np.indices(SHAPE) - (np.array(SHAPE) - 1).reshape(3, 1, 1, 1) / 2
    ball = np.linalg.norm(place, axis=0) <= 11
    tissue = 120 + 100 * np.sin(place[0] / 2) * np.cos(place[1] / 3) + rng.normal(0, 2, SHAPE)
    image = np.where(ball, np.clip(tissue, 20, 220), 0).astype(np.float32)
    image[14:16, 16:18, 13:15] = 0
    return image, ball


def normalised(image: Array, affine: Array = GRID, shape: tuple[int, int, int] = SHAPE, grid: Array = GRID) -> Array:
    volume, brain = conform(image, affine, support_mask(image, affine), np.eye(4), shape, grid)
    np.testing.assert_array_equal(volume > 0, brain)
    return volume


def test_the_foreground_is_found_whatever_the_background_is(scan: tuple[Array, Array]) -> None:
    image, ball = scan
    rng = np.random.default_rng(1)
    speck = image.copy()
    speck[1:3, 1:3, 1:3] = 100
    for name, changed in {
        "as it is": image,
        "integers": np.rint(image).astype(np.int16),
        "negative background": image * 0.01 - 3,
        "bright background": 500 - image,
        "noise": image + rng.normal(0, 1, SHAPE),
        "a speck beside it": speck,
    }.items():
        np.testing.assert_array_equal(support_mask(changed, GRID), ball, err_msg=name)


def test_an_image_without_foreground_is_refused() -> None:
    noise = np.random.default_rng(0).normal(0, 1, SHAPE)
    with pytest.raises(InputError, match=r"empty\.nii: nothing but background"):
        support_mask(noise, GRID, "empty.nii")


def test_units_and_background_noise_change_next_to_nothing(scan: tuple[Array, Array]) -> None:
    image, ball = scan
    reference = normalised(image)
    inside = image[ball]
    changed = {
        "a I + b": image * 3.7 + 120,
        "0..1 with noise of 1e-5": image / 220 + np.random.default_rng(1).normal(0, 1e-5, SHAPE),
        "z-scored": (image - image.mean()) / image.std(),
        "z-scored in the brain, 0 outside": np.where(ball, (image - inside.mean()) / inside.std(), 0),
    }
    for name, image in changed.items():
        difference = np.abs(normalised(image.astype(np.float32)) - reference)
        assert difference.max() < 0.02, name  # of 255


def test_the_robust_range_becomes_1_to_255_and_the_outside_is_0(scan: tuple[Array, Array]) -> None:
    image, ball = scan
    hot = image.copy()
    hot[15, 10, 15] = 1e6  # a single outlier must not set the scale
    volume = normalise(hot, ball)
    assert (volume[~ball] == 0).all()
    assert volume[ball].min() == 1 and volume.max() == 255
    assert 100 < np.median(volume[ball]) < 155


def test_flipped_and_permuted_arrays_give_the_same_volume(scan: tuple[Array, Array]) -> None:
    image, _ = scan
    reference = normalised(image)
    flip = np.eye(4)
    flip[0, 0], flip[0, 3] = -1, SHAPE[0] - 1
    np.testing.assert_allclose(normalised(image[::-1], GRID @ flip), reference, atol=1e-4)
    np.testing.assert_allclose(normalised(image.transpose(2, 0, 1), GRID[:, [2, 0, 1, 3]]), reference, atol=1e-4)


def test_the_grid_itself_is_met_voxel_by_voxel(scan: tuple[Array, Array]) -> None:
    image, ball = scan
    np.testing.assert_allclose(normalised(image), normalise(image, ball), atol=1e-4)


def test_a_coarser_grid_is_smoothed_for_and_a_finer_one_is_not() -> None:
    coarse = np.diag([4.0, 4.0, 4.0, 1.0])
    coarse[:3, 3] = 1.5  # blocks of 4 x 4 x 4
    noise = np.random.default_rng(0).normal(100, 20, (48, 48, 48)).astype(np.float32)
    whole = np.ones(noise.shape, dtype=np.bool_)
    volume, _ = conform(noise, np.eye(4), whole, np.eye(4), (12, 12, 12), coarse)
    blocks = normalise(noise, whole).reshape(12, 4, 12, 4, 12, 4).mean(axis=(1, 3, 5))
    inner = (slice(2, -2),) * 3
    assert volume[inner].std() == pytest.approx(blocks[inner].std(), rel=0.25)  # unsmoothed: 2.8 times as much
    assert np.corrcoef(volume[inner].ravel(), blocks[inner].ravel())[0, 1] > 0.8  # unsmoothed: 0.35
    assert smoothing(coarse)[0] == pytest.approx(np.sqrt((4**2 - 1) / 12 - 1 / 6))
    assert smoothing(inverse(coarse)) == (0, 0, 0)
    turned = turn((0, 0, 90)) @ np.diag([1.0, 3.0, 1.0, 1.0])  # the grid's wide voxels lie along the image's first axis
    assert smoothing(turned) == pytest.approx((np.sqrt((3**2 - 1) / 12 - 1 / 6), 0, 0))


def test_the_rim_of_the_brain_is_not_darkened(scan: tuple[Array, Array]) -> None:
    _, ball = scan
    two = np.where(ball, 100.0, 0)
    two[:15][ball[:15]] = 200
    shifted = GRID.copy()
    shifted[:3, 3] = (0.0, 0.4, 0.3)
    volume, brain = conform(two, GRID, ball, np.eye(4), SHAPE, shifted)
    assert (volume[:14][brain[:14]] > 254).all()
    assert abs(brain.sum() / ball.sum() - 1) < 0.05


def test_the_prealignment_leads_from_the_image_to_the_model(scan: tuple[Array, Array]) -> None:
    image, ball = scan
    moved = turn((0, 0, 0), (2, -3, 1))
    volume, brain = conform(image, GRID, ball, moved, SHAPE, GRID)
    np.testing.assert_array_equal(brain, np.roll(ball, (2, -3, 1), (0, 1, 2)))
    np.testing.assert_allclose(volume, np.roll(normalise(image, ball), (2, -3, 1), (0, 1, 2)), atol=1e-3)


def test_a_mask_may_have_another_grid_but_not_another_place(scan: tuple[Array, Array]) -> None:
    _, ball = scan
    half = np.diag([2.0, 2.0, 2.0, 1.0])
    half[:3, 3] = 0.5
    coarse = ball.reshape(15, 2, 17, 2, 14, 2).mean(axis=(1, 3, 5)) >= 0.5
    placed = mask_on_grid(coarse.astype(np.int16) * 7, half, SHAPE, GRID)
    assert placed.dtype == np.bool_ and 2 * (placed & ball).sum() / (placed.sum() + ball.sum()) > 0.93
    with pytest.raises(InputError, match=r"brain\.nii: the mask is empty on the image's grid"):
        mask_on_grid(coarse, turn((0, 0, 0), (90, 0, 0)) @ half, SHAPE, GRID, "brain.nii")


def test_what_shows_no_brain_is_refused(scan: tuple[Array, Array]) -> None:
    image, ball = scan
    with pytest.raises(InputError, match=r"flat\.nii: all voxels inside the mask are 5"):
        normalise(np.where(ball, 5, 0), ball, "flat.nii")
    with pytest.raises(InputError, match=r"far\.nii: no brain in the model's field of view"):
        conform(image, GRID, ball, turn((0, 0, 0), (0, 200, 0)), SHAPE, GRID, "far.nii")
