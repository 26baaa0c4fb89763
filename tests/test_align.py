"""Each scan finds its place in the MNI152 frame by itself, however its header turns it; whole heads are told apart."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
from prepare_samples import Array, Sample, apart, brain, head, quick_alignment, turn

from sitreg_lumir.errors import InputError
from sitreg_lumir.prepare.align import Alignment, align_to_frame
from sitreg_lumir.prepare.conform import inverse, support_mask
from sitreg_lumir.prepare.frame import LUMIR_SHAPE, check_frame, load_frame, lumir_affine
from sitreg_lumir.prepare.stripped import check_stripped, outside_share

TRUTH = turn((12, -8, 20), (6, -15, 9), (1.1, 0.95, 1.05))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_alignment():
        yield


def align(sample: Sample) -> Alignment:
    return align_to_frame(sample.image, sample.affine, support_mask(sample.image, sample.affine), load_frame())


@pytest.fixture(scope="module")
def sample() -> Sample:
    """Not the template's contrast: dark and bright are swapped."""
    return brain(TRUTH, (4, 3, 3), inverted=True)


@pytest.fixture(scope="module")
def found(sample: Sample) -> Alignment:
    return align(sample)


@pytest.fixture(scope="module")
def whole() -> Sample:
    return head(TRUTH)


def test_a_known_affine_is_found_in_another_contrast(sample: Sample, found: Alignment) -> None:
    assert apart(found.prealign, TRUTH, sample) < 2
    assert found.needed
    assert found.mi_after > 3 * found.mi_before
    assert found.overlap_before < 0.85 and found.overlap_after > 0.97
    assert 20 < found.moved_mm < 60 and 20 < found.corners_mm < 80


def flipped(sample: Sample) -> tuple[Array, Array, Array]:
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = sample.image.shape[0] - 1
    return sample.image[::-1], sample.affine @ flip, np.eye(4)


def permuted(sample: Sample) -> tuple[Array, Array, Array]:
    return sample.image.transpose(2, 0, 1), sample.affine[:, [2, 0, 1, 3]], np.eye(4)


def turned_header(sample: Sample) -> tuple[Array, Array, Array]:
    header = turn((-9, 9, 8), (20, -30, 11))  # 15 degrees in all
    return sample.image, header @ sample.affine, header


@pytest.mark.parametrize("change", [flipped, permuted, turned_header])
def test_lossless_changes_end_at_the_same_place(change: Any, sample: Sample, found: Alignment) -> None:
    image, affine, header = change(sample)
    again = align(Sample(image, image > 0, affine, TRUTH))
    assert apart(again.prealign @ header, found.prealign, sample) < 0.01  # mm


def test_units_and_background_noise_do_not_matter(sample: Sample, found: Alignment) -> None:
    noise = np.random.default_rng(0).normal(0, 1e-5, sample.image.shape)
    changed = (sample.image / 255 + noise) * 2.5 - 0.7
    again = align(replace(sample, image=changed.astype(np.float32)))
    assert apart(again.prealign, found.prealign, sample) < 0.01


def test_neither_threads_nor_what_was_aligned_before_change_a_bit(sample: Sample, found: Alignment) -> None:
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads + 3)
    try:
        again = align(sample)
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    np.testing.assert_array_equal(again.prealign, found.prealign)


def test_a_brain_in_its_place_needs_no_alignment() -> None:
    small = turn((0, 0, 0), (1, -1, 1), 1.02)
    assert not align(brain(small, (3, 3, 3))).needed


def test_minilumir_is_in_its_place_in_both_contrasts(shared: Any) -> None:
    from sitreg_lumir.io.read import read_image

    for modality in ("0000", "0001"):
        scan = read_image(shared / f"minilumir/2mm/imagesVal/LUMIRMRI_0101_{modality}.nii.gz")
        found = align(Sample(scan.data, scan.data > 0, scan.affine, np.eye(4)))
        assert not found.needed and found.moved_mm < 2 and found.overlap_after > 0.93


def test_a_whole_head_is_aligned_without_a_mask(whole: Sample) -> None:
    found = align_to_frame(whole.image, whole.affine, None, load_frame())
    assert apart(found.prealign, TRUTH, whole) < 5
    assert np.isnan(found.overlap_after)


def test_a_whole_head_is_told_from_a_brain(whole: Sample, sample: Sample, found: Alignment) -> None:
    frame = load_frame()
    check_stripped(support_mask(sample.image, sample.affine), sample.affine, found.prealign, frame, "brain.nii")
    seen = support_mask(whole.image, whole.affine)
    with pytest.raises(InputError, match=r"head\.nii: looks like a whole head.*litres.*--fixed-mask"):
        check_stripped(seen, whole.affine, None, frame, "head.nii")
    small = turn((0, 0, 0), scale=0.8)  # a child's head: no larger than a grown-up's brain can be
    prealign = align_to_frame(whole.image, small @ whole.affine, seen, frame).prealign
    check_stripped(seen, small @ whole.affine, None, frame, "child.nii")
    with pytest.raises(InputError, match=r"child\.nii: looks like a whole head.*outside a brain"):
        check_stripped(seen, small @ whole.affine, prealign, frame, "child.nii")


def test_the_share_outside_the_brain_is_none_for_the_brain_and_all_beside_it() -> None:
    frame = load_frame()
    assert outside_share(frame.mask, frame.affine, np.eye(4), frame) == 0
    assert outside_share(frame.mask, frame.affine, turn((0, 0, 0), (300, 0, 0)), frame) == 1


@pytest.mark.parametrize("unit", [1000.0, 100.0, 0.1])
def test_voxel_sizes_in_another_unit_are_refused(unit: float, sample: Sample) -> None:
    affine = np.diag([unit, unit, unit, 1]) @ sample.affine
    with pytest.raises(InputError, match=r"scan\.nii: .*mend the voxel size in the header"):
        align_to_frame(sample.image, affine, sample.mask, load_frame(), "scan.nii")
    if unit > 1:
        with pytest.raises(InputError, match=r"scan\.nii: .*mend the voxel size in the header"):
            align_to_frame(sample.image, affine, None, load_frame(), "scan.nii")


def test_a_model_of_another_world_is_refused() -> None:
    check_frame(load_frame(), LUMIR_SHAPE, lumir_affine(), "model")
    with pytest.raises(InputError, match=r"model: its grid holds \d+% of the MNI152 brain.*--align none"):
        check_frame(load_frame(), LUMIR_SHAPE, turn((0, 0, 0), (0, 40, 0)) @ lumir_affine(), "model")


def test_lumirs_grid_is_that_of_its_files(shared: Any) -> None:
    from sitreg_lumir.io.read import read_grid

    shape, affine = read_grid(shared / "minilumir/1mm/imagesVal/LUMIRMRI_0101_0000.nii.gz")
    assert shape == LUMIR_SHAPE
    np.testing.assert_allclose(affine, lumir_affine())
    coarse = inverse(affine) @ read_grid(shared / "minilumir/2mm/imagesVal/LUMIRMRI_0101_0000.nii.gz")[1]
    np.testing.assert_allclose(coarse[:3, 3], 0.5)  # the first coarse voxel's centre lies within, in fine voxels
