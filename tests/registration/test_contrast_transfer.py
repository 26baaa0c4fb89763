"""Contrast transfer, on tiny volumes."""

import pytest
import torch
from torch import Tensor

from sitreg_lumir.deform.ops import warp, warp_mask
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.registration.contrast_transfer import ComparedImage, same_contrast, transfer_contrasts, without_lesion

SHAPE = (26, 24, 22)


def draw_image(seed: int) -> Tensor:
    """Smooth, [0, 1], ``(1, 1, X, Y, Z)``."""
    coarse = torch.rand(1, 1, 7, 7, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=SHAPE, mode="trilinear", align_corners=True)


def compared(image: Tensor, mask: Tensor | None = None) -> ComparedImage:
    mask = torch.ones_like(image, dtype=torch.bool) if mask is None else mask
    return ComparedImage(image * mask, mask)


def shifted(voxels: float) -> Tensor:
    disp = torch.zeros(1, 3, *SHAPE)
    disp[:, 0] = voxels
    return disp


def channel_of(values: Tensor, original: Tensor) -> int:
    """Which channel is the image as it was."""
    return next(channel for channel in range(2) if torch.equal(values[:, channel : channel + 1], original))


@pytest.mark.parametrize(
    "contrast", [lambda image: image, lambda image: 0.9 - 0.8 * image**2, lambda image: (image - 0.5).abs() + 0.2]
)
def test_where_the_fields_are_right_the_images_become_one(contrast: object) -> None:
    """Whatever one contrast is of the other; only where both ways are functions, both are found."""
    fixed = draw_image(1)
    moving = contrast(fixed)  # type: ignore[operator]
    of_fixed, of_moving = transfer_contrasts(compared(fixed), compared(moving), shifted(0), shifted(0))
    as_moving = 1 - channel_of(of_fixed.values, fixed)
    assert torch.equal(of_moving.values[:, [as_moving]], moving)
    error = (of_fixed.values[:, [as_moving]] - moving).abs()
    assert float(error.mean()) < 0.01 and float(error.quantile(0.99)) < 0.04


def test_the_field_decides_which_voxels_are_compared() -> None:
    """The moving image lies two voxels off: only the field that says so gives its contrast."""
    fixed = draw_image(2)
    moving = warp(1 - fixed, shifted(-2))
    mask = warp_mask(torch.ones_like(fixed, dtype=torch.bool), shifted(-2))
    pair = compared(fixed), compared(moving, mask)

    def error(voxels: float) -> float:
        of_fixed, _ = transfer_contrasts(*pair, shifted(voxels), shifted(-voxels))
        as_moving = 1 - channel_of(of_fixed.values, fixed)
        return float((of_fixed.values[:, [as_moving]] - (1 - fixed)).abs().mean())

    assert error(2) < 0.01 and 5 * error(2) < error(0)


@pytest.mark.parametrize(
    ("contrast", "same"),
    [
        (lambda image: image, True),
        (lambda image: 0.2 + 0.5 * image, True),
        (lambda image: image**1.5, True),
        (lambda image: 1 - image, False),
        (lambda image: (image - 0.5).abs(), False),
    ],
)
def test_one_contrast_is_known_from_a_rising_line(contrast: object, same: bool) -> None:
    """Also by fields that are a voxel off, and with the images exchanged."""
    fixed = draw_image(11)
    pair = compared(fixed), compared(contrast(fixed))  # type: ignore[operator]
    for voxels in (0.0, 1.0):
        fields = shifted(voxels), shifted(-voxels)
        assert same_contrast(*pair, *fields) is same
        assert same_contrast(*pair[::-1], *fields[::-1]) is same


def test_exchanging_the_images_exchanges_the_results() -> None:
    fixed, moving = compared(draw_image(3)), compared(1 - draw_image(4) ** 2, draw_image(5) > 0.4)
    results = transfer_contrasts(fixed, moving, shifted(0.4), shifted(-0.4))
    exchanged = transfer_contrasts(moving, fixed, shifted(-0.4), shifted(0.4))
    for result, swapped in zip(results, reversed(exchanged), strict=True):
        assert torch.equal(result.values, swapped.values) and torch.equal(result.mask, swapped.mask)


def test_what_the_mask_leaves_out_does_not_count() -> None:
    """Neither for the curve, nor is it given a value."""
    image = draw_image(6)
    mask = draw_image(7) > 0.4
    wild = torch.where(mask, 1 - image, 7.0)
    of_fixed, of_moving = transfer_contrasts(
        compared(image, mask), ComparedImage((1 - image) * mask, mask), shifted(0), shifted(0)
    )
    assert (
        not of_fixed.values[~mask.expand_as(of_fixed.values)].any()
        and not of_moving.values[~mask.expand_as(of_moving.values)].any()
    )
    repeated, _ = transfer_contrasts(compared(image, mask), compared(wild, mask), shifted(0), shifted(0))
    assert torch.equal(repeated.values, of_fixed.values)


@pytest.mark.parametrize("case", ["constant", "nothing in the mask", "apart"])
def test_images_without_information_stay_finite(case: str) -> None:
    image = draw_image(8)
    empty = torch.zeros_like(image, dtype=torch.bool)
    moving = {
        "constant": compared(torch.full_like(image, 0.5)),
        "nothing in the mask": compared(image, empty),
        "apart": compared(image),
    }[case]
    far = 100.0 if case == "apart" else 0.0
    assert isinstance(same_contrast(compared(image), moving, shifted(far), shifted(-far)), bool)
    for result in transfer_contrasts(compared(image), moving, shifted(far), shifted(-far)):
        assert result.values.shape == (1, 2, *SHAPE) and bool(result.values.isfinite().all())


def test_an_outlier_does_not_fill_the_bins() -> None:
    """One bright voxel of 1000 would leave a linear scale a single bin for the brain."""
    image = draw_image(9)
    image[0, 0, 3, 3, 3] = 1000.0
    moving = 1 - draw_image(9)
    of_fixed, _ = transfer_contrasts(compared(image), compared(moving), shifted(0), shifted(0))
    as_moving = 1 - channel_of(of_fixed.values, image)
    error = (of_fixed.values[:, [as_moving]] - moving).abs()
    assert float(error.mean()) < 0.01


def test_a_lesion_and_patches_that_reach_into_it_are_left_out() -> None:
    image, lesion = draw_image(10), torch.zeros(1, 1, *SHAPE)
    lesion[..., 10:12, 10:12, 10:12] = 1
    everywhere = torch.ones_like(image)
    before = image.clone()
    plain = without_lesion(image, everywhere, lesion)
    assert torch.equal(plain.mask, lesion == 0) and not plain.values[lesion.bool()].any()
    by_mind = without_lesion(image, everywhere, lesion, Mind())
    assert by_mind.values.shape[1] == 6 and int((~by_mind.mask).sum()) > int(lesion.sum())
    assert torch.equal(image, before)
