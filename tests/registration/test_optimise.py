"""Instance optimisation: what it promises, on tiny volumes."""

from typing import Any

import pytest
import torch
from blob_pair import LEVELS, SHAPE, WITHIN, assert_equal, blob_pair, draw_points, exchanged, fields, in_brain
from torch import Tensor

from sitreg_lumir.deform.bspline import control_point_bound
from sitreg_lumir.deform.ops import compose, invert, upsample_control_points
from sitreg_lumir.losses import ndv_sum
from sitreg_lumir.metrics import ndv
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.sitreg import SITReg, run_stages
from sitreg_lumir.registration.contrast_transfer import channel_lncc
from sitreg_lumir.registration.optimise import Optimised, control_points_of, optimise


@pytest.fixture(scope="module")
def pair() -> dict[str, Tensor]:
    return blob_pair()


@pytest.fixture(scope="module")
def optimised(pair: dict[str, Tensor]) -> Optimised:
    return optimise(draw_points(seed=2, share=0.2), **pair, steps=8)


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["mind", "lncc"])
def test_the_objective_falls_and_the_images_grow_alike(pair: dict[str, Tensor], similarity: str) -> None:
    result = optimise(draw_points(seed=2, share=0.2), **pair, steps=8, similarity=similarity, window=5)
    assert result.improved and 0 < result.steps <= 8
    assert result.objective[1] < result.objective[0]
    assert result.dissimilarity[1] < result.dissimilarity[0]


def test_more_steps_never_give_something_worse(pair: dict[str, Tensor]) -> None:
    """Each run keeps the best that it met, the prediction included, and a longer one gets further."""
    start = draw_points(seed=2, share=0.2)
    after = [optimise(start, **pair, steps=steps).objective for steps in (0, 2, 5)]
    assert after[0][0] == after[0][1]
    assert after[1][0] == pytest.approx(after[0][0], abs=0.01) == after[2][0]  # what lies around the brains differs
    assert after[2][1] <= after[1][1] <= after[0][1]


@pytest.mark.parametrize("steps", [11, 21])
def test_repeated_contrast_transfer_never_gives_something_worse(pair: dict[str, Tensor], steps: int) -> None:
    """After steps 10 and 20: later fields are compared with the prediction alike, or the prediction is kept."""
    start = draw_points(seed=2, share=0.2)
    result = optimise(start, **pair, steps=steps)
    assert result.steps in range(steps - 1, steps + 1) and result.objective[1] < result.objective[0]
    overshot = optimise(start, **pair, steps=steps, learning_rate=200.0)
    assert not overshot.improved and in_brain(overshot, start, pair) < WITHIN


def test_contrasts_are_transferred_where_they_differ(pair: dict[str, Tensor], optimised: Optimised) -> None:
    assert optimised.contrasts_transferred  # one is the other's inverse
    alike = {**pair, "moving": (1 - pair["moving"]) * pair["moving_mask"]}
    start = draw_points(seed=2, share=0.2)
    result = optimise(start, **alike, steps=2)
    assert result.improved and not result.contrasts_transferred
    assert not optimise(start, **pair, steps=2, similarity="mind").contrasts_transferred


def test_it_finds_a_known_deformation(pair: dict[str, Tensor]) -> None:
    """From nothing, across an inverted contrast, well inside the image."""
    start = [(torch.zeros_like(first), torch.zeros_like(second)) for first, second in draw_points(seed=2, share=0.0)]
    truth, _ = fields(draw_points(seed=1, share=0.5))  # the fixed image's place in the moving one is its inverse
    result = optimise(start, **pair, steps=40, learning_rate=0.05)
    back = compose(truth, result.disp)  # identity where the deformation is result
    before = truth.norm(dim=1, keepdim=True)[pair["fixed_mask"]].mean()
    assert float(back.norm(dim=1, keepdim=True)[pair["fixed_mask"]].mean()) < 0.75 * float(before)


def test_exchanging_the_images_exchanges_the_results(pair: dict[str, Tensor], optimised: Optimised) -> None:
    start = draw_points(seed=2, share=0.2)
    result = optimise([(reverse, points) for points, reverse in start], **exchanged(pair), steps=8)
    assert torch.equal(result.disp, optimised.disp_inv) and torch.equal(result.disp_inv, optimised.disp)
    assert result.objective == optimised.objective and result.steps == optimised.steps
    for (points, reverse), (swapped, swapped_reverse) in zip(
        optimised.control_points, result.control_points, strict=True
    ):
        assert torch.equal(points, swapped_reverse) and torch.equal(reverse, swapped)


def test_exchanging_images_with_lesions_exchanges_the_results(pair: dict[str, Tensor]) -> None:
    lesion = torch.zeros_like(pair["fixed_mask"])
    lesion[..., 8:12, 8:12, 8:12] = True
    start = draw_points(seed=2, share=0.2)
    plain = optimise(start, **pair, steps=3, fixed_lesion=lesion)
    swapped = optimise([update[::-1] for update in start], **exchanged(pair), steps=3, moving_lesion=lesion)
    assert torch.equal(plain.disp, swapped.disp_inv) and torch.equal(plain.disp_inv, swapped.disp)


@pytest.mark.parametrize("learning_rate", [0.02, 3.0])
def test_updates_stay_within_their_bounds(pair: dict[str, Tensor], learning_rate: float) -> None:
    """However far a step goes: the bound keeps each update invertible."""
    result = optimise(
        draw_points(seed=2, share=1.0), **pair, steps=4, learning_rate=learning_rate, diffusion_weight=0.0
    )
    for level, update in zip(reversed(range(LEVELS)), result.control_points, strict=True):
        bound = control_point_bound((2**level,) * 3)
        for points in update:
            assert float(points.abs().max()) < bound
            field = upsample_control_points(points, 2**level, SHAPE)
            assert float(compose(field, invert(field, tolerance=1e-4)).abs().max()) < 1e-3


def test_coarser_levels_stay_as_predicted(pair: dict[str, Tensor], optimised: Optimised) -> None:
    """Only the finest ones change, two or as many as asked for, and the fields are what all compose to."""
    start = draw_points(seed=2, share=0.2)
    result = optimise(start, **pair, steps=4, levels=1)
    assert result.improved and len(result.control_points) == LEVELS

    def same(first: Any, second: Any) -> list[bool]:
        return [
            torch.equal(a, b)
            for update, old in zip(first, second, strict=True)
            for a, b in zip(update, old, strict=True)
        ]

    assert same(result.control_points, start) == [True, True, True, True, False, False]
    assert same(optimised.control_points, start) == [True, True, False, False, False, False]
    assert in_brain(result, result.control_points, pair) < WITHIN
    sampled = optimise(start, **pair, steps=4, levels=1, exact_share=0)
    assert torch.equal(sampled.disp, fields(sampled.control_points)[0])


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_the_exact_map_is_what_gains(pair: dict[str, Tensor], share: float) -> None:
    """Whatever share of the steps compares images by it: prediction and result are measured by it."""
    start = draw_points(seed=2, share=0.2)
    result, none = (optimise(start, **pair, steps=steps, exact_share=share) for steps in (4, 0))
    assert result.improved and result.objective[1] < result.objective[0] and 4 - result.steps <= 4 * share
    assert result.objective[0] == pytest.approx(none.objective[0], abs=0.01)  # what lies around the brains differs
    assert result.objective[0] != optimise(start, **pair, steps=4, exact_share=0).objective[0]


def test_refinement_does_not_fold(pair: dict[str, Tensor], optimised: Optimised) -> None:
    predicted, _ = fields(draw_points(seed=2, share=0.2))
    assert ndv(predicted[0]) == 0
    assert ndv(optimised.disp[0]) == ndv(optimised.disp_inv[0]) == 0


def test_a_folded_prediction_is_unfolded(pair: dict[str, Tensor]) -> None:
    """With a heavy penalty on a start that folds."""
    start = draw_points(seed=7, share=1.0)
    before = sum(float(ndv_sum(field)) for field in fields(start))
    assert before > 0.01
    result = optimise(start, **pair, steps=8, ndv_weight=1e-2, exact_share=0)
    assert sum(float(ndv_sum(field)) for field in (result.disp, result.disp_inv)) < 0.5 * before


@pytest.mark.parametrize("similarity", ["mind", "lncc"])
def test_what_a_lesion_shows_does_not_matter(pair: dict[str, Tensor], similarity: str) -> None:
    lesions = {}
    for role, where in (("fixed", slice(8, 12)), ("moving", slice(11, 15))):
        lesions[f"{role}_lesion"] = torch.zeros_like(pair["fixed_mask"])
        lesions[f"{role}_lesion"][..., where, where, where] = True
    changed = dict(pair)
    for role in ("fixed", "moving"):
        changed[role] = torch.where(lesions[f"{role}_lesion"], torch.rand(1, 1, *SHAPE), pair[role])
    start = draw_points(seed=2, share=0.2)
    options: dict[str, Any] = {"steps": 3, "similarity": similarity, "window": 5}
    assert_equal(optimise(start, **changed, **lesions, **options), optimise(start, **pair, **lesions, **options))
    without = optimise(start, **changed, **options)
    assert not torch.equal(without.disp, optimise(start, **pair, **options).disp)  # but would without the lesion masks


def test_a_lesion_moves_with_its_surroundings(pair: dict[str, Tensor]) -> None:
    """Nothing inside is compared, yet the regularisers and its neighbours move it."""
    lesion = torch.zeros_like(pair["fixed_mask"])
    lesion[..., 9:14, 9:14, 9:14] = True
    start = [(torch.zeros_like(first), torch.zeros_like(second)) for first, second in draw_points(seed=2, share=0.0)]
    result = optimise(start, **pair, steps=8, fixed_lesion=lesion)
    assert float(result.disp[0, :, 11, 11, 11].norm()) > 1e-3


def test_no_step_gives_the_prediction(pair: dict[str, Tensor]) -> None:
    start = draw_points(seed=2, share=0.2)
    result = optimise(start, **pair, steps=0)
    assert in_brain(result, start, pair) < WITHIN
    sampled = optimise(start, **pair, steps=0, exact_share=0)
    assert torch.equal(sampled.disp, fields(start)[0]) and torch.equal(sampled.disp_inv, fields(start)[1])
    assert result.steps == 0 and not result.improved and result.objective[0] == result.objective[1]


def test_what_cannot_be_improved_is_kept(pair: dict[str, Tensor]) -> None:
    """An image and itself from the identity: each step could only make it worse."""
    start = [(torch.zeros_like(first), torch.zeros_like(second)) for first, second in draw_points(seed=2, share=0.0)]
    same = {"fixed": pair["fixed"], "moving": pair["fixed"]}
    masks = {"fixed_mask": pair["fixed_mask"], "moving_mask": pair["fixed_mask"]}
    result = optimise(start, **same, **masks, steps=3)
    assert not result.improved and float(result.disp.abs().max()) == 0


def test_a_step_that_overshoots_is_not_kept(pair: dict[str, Tensor]) -> None:
    start = draw_points(seed=2, share=0.1)
    result = optimise(start, **pair, steps=2, learning_rate=50.0)
    assert not result.improved and result.objective[1] == result.objective[0]
    assert in_brain(result, start, pair) < WITHIN


def test_it_is_deterministic(pair: dict[str, Tensor], optimised: Optimised) -> None:
    """Whatever the number of threads, and called in inference mode, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            alike = {name: value.clone() for name, value in pair.items()}
            assert_equal(optimise(draw_points(seed=2, share=0.2), **alike, steps=8), optimised)
    finally:
        torch.set_num_threads(threads)


def test_it_starts_from_what_a_network_predicts(pair: dict[str, Tensor]) -> None:
    """Of an ensemble: the averages; neither they nor the images are written to."""
    torch.manual_seed(3)
    sizes = {"features": [4] * LEVELS, "head_features": [4] * LEVELS}
    members = [SITReg(**sizes).eval() for _ in range(2)]  # type: ignore[arg-type]
    mind = Mind()
    with torch.inference_mode():
        stages = run_stages(
            members, fixed=mind(pair["fixed"]), moving=mind(pair["moving"]), levels=range(LEVELS), disagreement=True
        )
    start = control_points_of(stages, LEVELS)
    copies = [(points.clone(), reverse.clone()) for points, reverse in start]
    kept = optimise(start, **pair, steps=0, exact_share=0)
    torch.testing.assert_close(kept.disp, stages[-1].disp, rtol=0, atol=1e-5)
    assert optimise(start, **pair, steps=3).improved
    for update, copy in zip(start, copies, strict=True):
        assert torch.equal(update[0], copy[0]) and torch.equal(update[1], copy[1])
    with pytest.raises(ValueError, match=r"stages of all 3 levels .* got \[0\]"):
        control_points_of(stages[-1:], LEVELS)


def test_descriptors_are_compared_channel_by_channel(pair: dict[str, Tensor]) -> None:
    """Alike up to a gain and an offset of each channel is all alike; one other channel costs its share."""
    features = Mind()(pair["fixed"])
    everywhere = torch.ones_like(pair["fixed_mask"])
    changed = features * torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0, -2.0])[:, None, None, None] + 0.3
    alike = float(channel_lncc(features, features, everywhere, 5))
    assert float(channel_lncc(features, changed, everywhere, 5)) == pytest.approx(alike, abs=0.01) and alike < -0.8
    changed[:, 2] = torch.rand(1, *SHAPE)
    assert float(channel_lncc(features, changed, everywhere, 5)) == pytest.approx(alike * 5 / 6, abs=0.05)


def test_nothing_to_compare_leaves_the_prediction_to_the_regularisers(pair: dict[str, Tensor]) -> None:
    """All of the brain is lesion: the field may only grow smoother."""
    result = optimise(draw_points(seed=2, share=0.2), **pair, steps=2, fixed_lesion=torch.ones_like(pair["fixed_mask"]))
    assert result.dissimilarity == (0.0, 0.0) and result.objective[1] < result.objective[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moving": torch.zeros(1, 1, 24, 22, 19)}, r"moving must be \(1, 1, 24, 22, 20\) .* got \(1, 1, 24, 22, 19\)"),
        ({"fixed": torch.zeros(2, 1, *SHAPE)}, r"one pair at a time .* got \(2, 1, 24, 22, 20\)"),
        ({"fixed": torch.zeros(*SHAPE)}, "one pair at a time"),
        ({"fixed_mask": torch.ones(*SHAPE)}, "fixed_mask must be"),
        ({"moving_lesion": torch.ones(1, 1, 3, 3, 3)}, "moving_lesion must be"),
        ({"steps": -1}, "got -1"),
        ({"learning_rate": 0.0}, r"got 1, 2, 0\.0"),
        ({"bound_multiplier": 1.5}, r"0\.2 and 1\.5"),
        ({"similarity": "ssd"}, "lncc, mind, got 'ssd'"),
    ],
)
def test_what_does_not_fit_is_refused(pair: dict[str, Tensor], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimise(draw_points(seed=2, share=0.2), **{**pair, "steps": 1, **change})


def test_control_points_that_do_not_fit_are_refused(pair: dict[str, Tensor]) -> None:
    start = draw_points(seed=2, share=0.2)
    with pytest.raises(ValueError, match="control_points must not be empty"):
        optimise([], **pair, steps=1)
    with pytest.raises(ValueError, match=r"exact_share must be between 0 and 1, got 1\.5"):
        optimise(start, **pair, steps=1, exact_share=1.5)
    with pytest.raises(ValueError, match=r"level 1 must be \(1, 3, 12, 11, 10\)"):
        optimise([start[0], start[2], start[1]], **pair, steps=1)
    with pytest.raises(ValueError, match=r"level 2 .* bound"):
        optimise(draw_points(seed=2, share=2.0), **pair, steps=1)
