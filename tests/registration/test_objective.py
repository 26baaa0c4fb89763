"""The objective on a finer grid beside the model's, on tiny volumes."""

from typing import Any

import pytest
import torch
from blob_pair import SHAPE, WITHIN, assert_equal, blob_pair, draw_points, exchanged, in_brain
from torch import Tensor

from sitreg_lumir.deform.ops import warp, warp_mask
from sitreg_lumir.registration.contrast_transfer import channel_lncc
from sitreg_lumir.registration.objective import Comparison, ImagePair, Weights, objective
from sitreg_lumir.registration.optimise import Optimised, optimise


@pytest.fixture(scope="module")
def pair() -> dict[str, Tensor]:
    return blob_pair()


def finer_pair(pair: dict[str, Tensor], factor: int = 2) -> ImagePair:
    """The pair on a grid whose voxels divide those of its own."""
    sizes = [factor * size for size in SHAPE]

    def finer(name: str) -> Tensor:
        image = torch.nn.functional.interpolate(pair[name].float(), size=sizes, mode="trilinear", align_corners=False)
        return image > 0.5 if name.endswith("mask") else image

    return ImagePair(**{name: finer(name) for name in pair})


def test_images_compared_on_a_finer_grid_too_grow_alike_there(pair: dict[str, Tensor]) -> None:
    """By a window that is half as wide in mm, which the model's grid alone serves less."""
    start, finer = draw_points(seed=2, share=0.2), finer_pair(pair)
    results = [optimise(start, **pair, finer=images, steps=8, exact_share=1, window=5) for images in (None, finer)]
    plain, both = (
        objective((result.disp, result.disp_inv), [compared], Weights(5, 0.0, 0.0))[0].dissimilarity
        for result in results
        for compared in [finer_comparison(finer, result)]
    )
    assert both < plain < 0
    assert in_brain(results[1], results[1].control_points, pair) < WITHIN


def finer_comparison(finer: ImagePair, result: Optimised) -> Comparison:
    compared = Comparison(finer, 2, None)
    compared.transfer_contrasts((result.disp, result.disp_inv))
    return compared


def test_a_finer_comparison_is_that_of_the_finer_images_by_the_upsampled_fields(pair: dict[str, Tensor]) -> None:
    """A field that is linear in space is the same function on both grids."""
    disp = torch.zeros(1, 3, *SHAPE)
    disp[0, 1] = torch.arange(SHAPE[1])[:, None] * 0.03 + 0.4
    finer = finer_pair(pair, factor=3)
    compared = Comparison(finer, 3, None)
    y = torch.arange(3 * SHAPE[1])
    upsampled = compared.upsampled(disp)
    inside = upsampled[0, 1, 0, 3:-3, 0]  # beyond the outermost samples the field is constant
    torch.testing.assert_close(inside, (3 * (0.4 + 0.03 * (y - 1) / 3))[3:-3].float(), atol=1e-5, rtol=0)
    expected = channel_lncc(
        warp(finer.moving, upsampled), finer.fixed, warp_mask(finer.moving_mask, upsampled) & finer.fixed_mask, 5
    )
    assert float(compared.dissimilarity(disp, inverse=False, window=5)) == float(expected)


def test_exchanging_the_images_exchanges_the_results_of_a_finer_comparison(pair: dict[str, Tensor]) -> None:
    start, finer = draw_points(seed=2, share=0.2), finer_pair(pair)
    result = optimise(start, **pair, finer=finer, steps=3)
    swapped = ImagePair(**exchanged(dict(vars(finer)) | {"fixed_lesion": None, "moving_lesion": None}))
    opposite = optimise([(reverse, points) for points, reverse in start], **exchanged(pair), finer=swapped, steps=3)
    assert result.improved
    assert torch.equal(opposite.disp, result.disp_inv) and torch.equal(opposite.disp_inv, result.disp)


def test_a_finer_comparison_does_not_depend_on_threads(pair: dict[str, Tensor]) -> None:
    start, finer, threads = draw_points(seed=2, share=0.2), finer_pair(pair), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(optimise(start, **pair, finer=finer, steps=3))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finer": ImagePair(*[torch.zeros(1, 1, 48, 44, 39)] * 4)}, r"multiple of \(24, 22, 20\) .* \(48, 44, 39\)"),
        ({"finer": ImagePair(*[torch.zeros(1, 1, 48, 44, 40)] * 4), "exact_share": 0.0}, "must not be 0"),
        ({"finer": ImagePair(*[torch.zeros(1, 1, 48, 44, 40)] * 3, torch.zeros(1))}, "moving_mask must be"),
    ],
)
def test_finer_images_that_do_not_fit_are_refused(
    pair: dict[str, Tensor], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        optimise(draw_points(seed=2, share=0.2), **{**pair, "steps": 1, **change})
