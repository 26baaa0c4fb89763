"""Alignment of what a wrong header turned, and of parts of a brain, by their structures."""

from collections.abc import Iterator

import numpy as np
import pytest
from prepare_samples import Array, Sample, apart, brain, quick_alignment, turn

from sitreg_lumir.preprocessing.align import Alignment, align_to_template
from sitreg_lumir.preprocessing.search import turn_of
from sitreg_lumir.preprocessing.structure import structure_match
from sitreg_lumir.preprocessing.template import load_template

TRUTH = turn((6, -5, 8), (4, -9, 6), (1.1, 1.02, 1.06))
HALF_TURN = turn((180, 0, 0), (0, -30, 12))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_alignment():
        yield


@pytest.fixture(scope="module")
def sample() -> Sample:
    return brain(TRUTH, (4, 3, 3), inverted=True)


def align(image: Array, affine: Array) -> Alignment:
    return align_to_template(image, affine, image > 0, load_template())


def part_of(sample: Sample, axis: int, side: int) -> Array:
    """Half of the brain, by its middle along an array axis; zero elsewhere, as hemispheres are stored."""
    middle = int(np.argwhere(sample.mask)[:, axis].mean())
    index = np.indices(sample.mask.shape)[axis]
    return np.where(index < middle if side == 0 else index >= middle, sample.image, 0)


def test_a_half_turned_header_is_turned_back(sample: Sample) -> None:
    alignment = align(sample.image, HALF_TURN @ sample.affine)
    assert apart(alignment.prealign @ HALF_TURN, TRUTH, sample) < 3  # mm
    assert alignment.needed and not alignment.part
    assert alignment.turn == "180 degrees about the left-right axis" and "turned by 180 degrees" in alignment.remark


def test_a_mirrored_header_is_turned_upright_and_never_mirrored_back(sample: Sample) -> None:
    upside_down = np.diag([1.0, 1, -1, 1])
    alignment = align(sample.image, upside_down @ sample.affine)
    assert np.linalg.det(alignment.prealign[:3, :3]) > 0
    assert alignment.turn == "180 degrees about the back-front axis"
    mirrored = np.diag([-1.0, 1, 1, 1]) @ TRUTH  # the template is symmetric: left and right may be exchanged
    assert apart(alignment.prealign @ upside_down, mirrored, sample) < 4


@pytest.mark.parametrize(
    ("axis", "side"),
    [(0, 0), pytest.param(0, 1, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)],
)
def test_half_a_brain_keeps_its_size_wherever_its_header_puts_it(axis: int, side: int, sample: Sample) -> None:
    away = turn((5, 8, -6), (35, -40, 30))
    alignment = align(part_of(sample, axis, side), away @ sample.affine)
    scales = np.linalg.svd(alignment.prealign[:3, :3], compute_uv=False)
    assert alignment.part and "part of a brain" in alignment.remark
    assert scales.max() < 1.2 and scales.min() > 0.9  # not stretched by 1.76 onto the whole brain
    assert apart(alignment.prealign @ away, TRUTH, sample) < 15
    assert not alignment.turn


def test_a_header_that_places_half_a_brain_is_kept() -> None:
    placed = brain(np.eye(4), (3, 3, 3))
    alignment = align(part_of(placed, 0, 0), placed.affine)
    assert not alignment.needed or alignment.moved_mm < 5
    assert np.abs(np.linalg.svd(alignment.prealign[:3, :3], compute_uv=False) - 1).max() < 0.1


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ((0, 0, 0), ""),
        ((20, -30, 10), ""),
        ((180, 10, 5), "180 degrees about the left-right axis"),
        ((0, 190, 0), "180 degrees about the back-front axis"),
        ((0, 0, 80), "90 degrees about the bottom-top axis"),
        ((90, 0, 90), "120 degrees about the diagonal axis"),
    ],
)
def test_turns_have_names(degrees: tuple[float, float, float], words: str) -> None:
    assert turn_of(turn(degrees, (10, 20, 30), 1.2)) == words


def test_structures_agree_in_any_contrast_and_by_chance_only_elsewhere() -> None:
    placed = brain(np.eye(4), (3, 3, 3))
    inverted = np.where(placed.mask, 300 - placed.image, 0)

    def match(image: Array, mask: Array) -> tuple[float, float]:
        result = structure_match(placed.image, placed.mask, image, mask, 3.0)
        return result.correlation, result.by_chance

    same, chance = match(inverted, placed.mask)
    assert same > 0.95 and chance < 0.3
    upside_down, better = match(placed.image[:, :, ::-1], placed.mask[:, :, ::-1])
    assert upside_down < 0.3 and better == pytest.approx(1, abs=0.05)
    noise = np.where(placed.mask, np.random.default_rng(0).normal(100, 30, placed.mask.shape), 0)
    of_noise, its_chance = match(noise, placed.mask)
    assert of_noise < 0.2 and of_noise < 1.3 * its_chance
    assert np.isnan(match(placed.image, np.zeros_like(placed.mask))[0])
