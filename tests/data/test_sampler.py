"""What is drawn, who gets it, and how the batch divides."""

import math

import numpy as np
import pytest

from sitreg_lumir.data.sampler import GroupBatches, count_teams, draw_groups, split_batch, view_seed
from sitreg_lumir.errors import InputError


@pytest.mark.parametrize("size", [2, 3])
def test_all_groups_come_once_before_any_comes_again(size: int) -> None:
    number = math.perm(5, size)
    groups = draw_groups(seed=1, epoch=2, subjects=5, size=size, count=2 * number + 3)
    assert groups.shape == (2 * number + 3, size)
    assert groups.dtype == np.int64
    assert all(len(set(group)) == size for group in groups.tolist())
    for part in np.split(groups, [number, 2 * number]):
        assert len(np.unique(part, axis=0)) == len(part)
    assert set(groups.ravel()) == set(range(5))
    assert not np.array_equal(groups[:number], groups[number : 2 * number])


def test_lumirs_size() -> None:
    for size in (2, 3):
        groups = draw_groups(seed=0, epoch=0, subjects=3384, size=size, count=2000)
        assert len(np.unique(groups, axis=0)) == 2000
        assert abs(groups.mean() - 3383 / 2) < 40  # about 2.5 standard errors


GROUPS_60 = [[2, 19], [46, 5], [7, 28], [32, 9]]
SEED_0 = 1945321144695561289


def test_draws_are_pure_and_do_not_change_between_versions() -> None:
    assert draw_groups(0, 0, 60, 2, 4).tolist() == draw_groups(0, 0, 60, 2, 4).tolist() == GROUPS_60
    different = [draw_groups(*key, 60, 2, 4).tolist() for key in ((0, 1), (1, 0), (1, 1))]
    assert GROUPS_60 not in different
    assert view_seed(0, 0, 0, 0) == SEED_0
    seeds = {view_seed(s, e, i, p) for s in range(2) for e in range(3) for i in range(5) for p in range(3)}
    assert len(seeds) == 90
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_too_few_subjects() -> None:
    with pytest.raises(ValueError, match="groups of 3 from 2 subjects"):
        draw_groups(0, 0, 2, 3, 1)


def test_processes_share_each_step_in_micro_batches() -> None:
    for world_size, micro_batch in ((1, 4), (1, 1), (2, 2), (2, 1), (4, 1)):
        micro, accumulate = split_batch(4, world_size, micro_batch)
        ranks = [list(GroupBatches(11, 4, micro, rank, world_size)) for rank in range(world_size)]
        assert [len(batches) for batches in ranks] == [2 * accumulate] * world_size
        assert all(len(batch) == micro for batches in ranks for batch in batches)
        for step in range(2):  # the same groups in each step, however divided; the last three are dropped
            part = slice(step * accumulate, (step + 1) * accumulate)
            taken = [index for batches in ranks for batch in batches[part] for index in batch]
            assert taken == list(range(4 * step, 4 * step + 4))


def test_a_start_keeps_the_length() -> None:
    batches = GroupBatches(20, 4, 2, 0, 1)
    whole = list(batches)
    batches.start = 7
    assert list(batches) == whole[7:]
    assert len(batches) == 10


def test_what_does_not_divide_is_refused() -> None:
    assert split_batch(4, 2, None) == (2, 1)
    assert split_batch(12, 2, 2) == (2, 3)
    with pytest.raises(InputError, match="choose a multiple of 3, for example 3"):
        split_batch(4, 3, None)
    with pytest.raises(InputError, match="choose 1, 2, 4"):
        split_batch(4, 1, 3)
    with pytest.raises(InputError, match="does not fill one batch"):
        GroupBatches(3, 4, 4, 0, 1)


def test_teams_of_three() -> None:
    assert [count_teams(world_size) for world_size in (1, 3, 6, 9)] == [1, 1, 2, 3]
    for world_size, nearest in ((2, 3), (4, 6), (8, 9)):
        with pytest.raises(InputError, match=f"choose 1 process or a multiple of 3 .* for example {nearest}"):
            count_teams(world_size)
