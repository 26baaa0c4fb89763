"""Metrics and folded volume on small synthetic volumes."""

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sitreg_lumir.deform.jacobian import COLUMNS, determinant, jacobian_determinant, non_diffeomorphic_volume
from sitreg_lumir.metrics import PairTable, dsc, hd95, ndv, score_pair, tre, warp_nearest
from sitreg_lumir.metrics.surface import area_table, robust_hausdorff

SHAPE = (12, 14, 10)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def cube(start: int = 3, stop: int = 7) -> NDArray[np.bool_]:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[start:stop, start:stop, start:stop] = True
    return mask


def test_areas_of_simple_surface_elements() -> None:
    table = area_table()
    assert table[0] == table[255] == 0
    assert table[0b11110000] == pytest.approx(1)  # a plane
    assert table[0b11000000] == pytest.approx(math.sqrt(0.5))  # an edge
    assert table[0b10000000] == pytest.approx(math.sqrt(3) / 8)  # a corner
    np.testing.assert_allclose(table, table[::-1])  # inside and outside share their surface
    np.testing.assert_allclose(area_table((2.0, 2.0, 2.0)), 4 * table)
    assert area_table((1.0, 2.0, 3.0))[0b11110000] == pytest.approx(6)


def test_distance_between_shifted_cubes() -> None:
    assert robust_hausdorff(cube(), cube()) == 0
    assert robust_hausdorff(cube(), np.roll(cube(), 2, axis=1)) == 2
    assert robust_hausdorff(cube(), np.roll(cube(), 2, axis=1), (1.0, 1.5, 1.0)) == 3
    assert math.isinf(robust_hausdorff(cube(), np.zeros_like(cube())))
    assert math.isnan(robust_hausdorff(np.zeros_like(cube()), np.zeros_like(cube())))


def test_robust_hausdorff_refuses_other_shapes_and_spacings() -> None:
    with pytest.raises(ValueError, match="alike"):
        robust_hausdorff(cube(), cube()[1:])
    with pytest.raises(ValueError, match="three positive"):
        robust_hausdorff(cube(), cube(), (1.0, 0.0, 1.0))


def test_warp_nearest_rounds_half_up_and_is_zero_outside(generator: np.random.Generator) -> None:
    volume = generator.integers(1, 9, SHAPE).astype(np.uint8)
    assert np.array_equal(warp_nearest(volume, np.zeros((3, *SHAPE))), volume)
    disp = np.zeros((3, *SHAPE), dtype=np.float32)
    disp[0] = 0.5
    warped = warp_nearest(volume, disp)
    assert warped.dtype == volume.dtype
    assert np.array_equal(warped[:-1], volume[1:])
    assert not warped[-1].any()
    disp[0] = -0.1
    assert not warp_nearest(volume, disp)[0].any()


def test_labels_that_are_absent_or_lost() -> None:
    fixed, moving = cube().astype(np.int32), 2 * cube().astype(np.int32)
    moving[8:10, 8:10, 8:10] = 1
    disp = np.zeros((3, *SHAPE))
    labels = [0, 1, 2, 7]
    warped = warp_nearest(moving, disp)
    overlap, distance = dsc(fixed, moving, warped, labels), hd95(fixed, moving, warped, labels)
    assert np.isnan(overlap).tolist() == np.isnan(distance).tolist() == [False, False, True, True]
    assert overlap[1] == 0
    disp[:] = 100  # everything is pulled from outside
    warped = warp_nearest(moving, disp)
    assert math.isinf(hd95(fixed, moving, warped, [1])[0])
    assert dsc(fixed, moving, warped, [1])[0] == 0


def test_landmark_error_and_its_unit() -> None:
    fixed = np.zeros(SHAPE, dtype=np.int32)
    fixed[2, 2, 2], fixed[8, 8, 8] = 1, 5
    warped = np.roll(fixed, 1, axis=0)
    assert tre(fixed, warped) == pytest.approx(1)
    assert tre(fixed, warped, (2.0, 1.0, 1.0)) == pytest.approx(2)
    warped[warped == 5] = 0
    assert math.isnan(tre(fixed, warped))


def test_identity_has_unit_determinants() -> None:
    disp = torch.zeros(2, 3, *SHAPE)
    inner = (2, *(size - 2 for size in SHAPE))
    for name in COLUMNS:
        expected = torch.full(inner, 2.0 if name.startswith("star") else 1.0)
        torch.testing.assert_close(determinant(disp, name), expected)
    torch.testing.assert_close(jacobian_determinant(disp), torch.ones(inner))
    assert not non_diffeomorphic_volume(disp).any()


def test_reflection_folds_everything() -> None:
    disp = torch.zeros(1, 3, *SHAPE)
    disp[0, 0] = -2.0 * torch.arange(SHAPE[0], dtype=torch.float32)[:, None, None]
    assert (jacobian_determinant(disp) == -1).all()
    torch.testing.assert_close(non_diffeomorphic_volume(disp), torch.ones(1, 1, *(size - 2 for size in SHAPE)))
    assert ndv(disp[0]) == pytest.approx(100)
    half = np.zeros(SHAPE, dtype=bool)
    half[:6] = True
    assert ndv(disp[0], half) == pytest.approx(100)
    assert math.isnan(ndv(disp[0], np.zeros(SHAPE)))


def test_gradient_of_the_folded_volume() -> None:
    generator = torch.Generator().manual_seed(0)
    disp = (2 * torch.randn(1, 3, 3, 4, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(non_diffeomorphic_volume, disp)


@pytest.mark.parametrize("shape", [(3, 5, 5, 5), (1, 2, 5, 5, 5), (1, 3, 2, 5, 5)])
def test_jacobian_refuses_other_forms(shape: tuple[int, ...]) -> None:
    for function in (jacobian_determinant, non_diffeomorphic_volume):
        with pytest.raises(ValueError, match=r"\(B, 3, X, Y, Z\)"):
            function(torch.zeros(shape))


def test_scores_without_a_list_cover_the_labels_of_both_maps() -> None:
    fixed, moving = cube().astype(np.int32), cube().astype(np.int32)
    fixed[0, 0, 0], moving[0, 0, 0] = 5, 6
    scores = score_pair(np.zeros((3, *SHAPE)), fixed_labels=fixed, moving_labels=moving)
    assert {key for key in scores if key.startswith("dsc/")} == {"dsc/0", "dsc/1"}
    assert "tre" not in scores
    listed = score_pair(np.zeros((3, *SHAPE)), fixed_labels=fixed, moving_labels=moving, labels=[1], voxel_size=2.0)
    assert listed["dsc"] == 1
    assert listed["hd95_mm"] == 0


def test_uneven_voxels_give_other_millimetres() -> None:
    fixed = cube().astype(np.int32)
    moving = np.roll(fixed, 2, axis=1)
    scores = score_pair(
        np.zeros((3, *SHAPE)), fixed_labels=fixed, moving_labels=moving, labels=[1], voxel_size=(1.0, 3.0, 1.0)
    )
    assert (scores["hd95"], scores["hd95_mm"]) == (2, 6)


def _add(table: PairTable, contrasts: str, shift: int) -> None:
    fixed = torch.from_numpy(cube().astype(np.int32))
    maps: dict[str, Any] = {"fixed_labels": fixed, "moving_labels": fixed.roll(shift, 0), "labels": [1]}
    table.add(score_pair(torch.zeros(3, *SHAPE), **maps), contrasts=contrasts)


def test_the_table_keeps_contrasts_apart_and_processes_put_their_rows_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, first, second = PairTable(), PairTable(), PairTable()
    pairs = (("T1-T1", 0), ("T1-T2", 1), ("T1-T2", 2), ("T2-T2", 1), ("T1-T2", 3))
    for index, (contrasts, shift) in enumerate(pairs):
        _add(whole, contrasts, shift)
        _add((first, second)[index % 2], contrasts, shift)
    result = whole.means()
    assert result["dsc/T1-T1"] == 1
    torch.testing.assert_close(result["dsc/T1-T2"], torch.tensor((0.75 + 0.5 + 0.25) / 3, dtype=torch.float64))
    torch.testing.assert_close(result["gap"], result["dsc/T1-T1"] - result["dsc/T1-T2"])
    assert result["hd95/other"] == 1
    assert result["ndv"] == 0
    assert not any(key.startswith("tre") for key in result)

    def gather(into: list[Any], own: Any) -> None:
        assert own is first.rows
        into[:] = [first.rows, second.rows]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert first.means() == result  # to the last bit: the rows come back in the order of the pairs
    monkeypatch.undo()
    whole.clear()
    assert whole.means() == {}


def test_the_table_counts_infinite_distances() -> None:
    table = PairTable()
    _add(table, "T1-T1", 0)
    fixed = cube().astype(np.int32)
    lost = score_pair(np.full((3, *SHAPE), 99.0), fixed_labels=fixed, moving_labels=fixed, labels=[1])
    table.add(lost, contrasts="T1-T1", group="in-domain")
    result = table.means()
    assert result["hd95/T1-T1"].isinf() and result["hd95/in-domain"].isinf()
    assert result["hd95_infinite/T1-T1"] == 1


def test_a_large_label_takes_no_memory_for_those_below() -> None:
    first, second = (np.random.default_rng(seed).integers(0, 3, (6, 7, 8), dtype=np.int32) for seed in (0, 1))
    large = [np.where(volume == 2, 2**31 - 1, volume).astype(np.int32) for volume in (first, second)]
    names = {0: 0, 1: 1, 2: 2**31 - 1}
    tracemalloc.start()
    of_large = [metric(large[0], large[1], large[1], names.values()) for metric in (dsc, hd95)]
    distance = tre(*large)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    for metric, values in zip((dsc, hd95), of_large, strict=True):
        np.testing.assert_array_equal(metric(first, second, second, names), values)
    assert tre(first, second) == distance
