"""Each scan is aligned to MNI152 independently, however its header turns it; whole heads are refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its usual name)
from prepare_samples import Array, Sample, apart, brain, head, quick_alignment, turn

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.read import Scan
from sitreg_lumir.preprocessing.align import Alignment, align_to_template
from sitreg_lumir.preprocessing.intensity import inverse, support_mask
from sitreg_lumir.preprocessing.place import align_brain
from sitreg_lumir.preprocessing.skull_check import check_brain, outside_share, refuse_head
from sitreg_lumir.preprocessing.template import LUMIR_SHAPE, check_model_world, load_template, lumir_grid

TRUTH = turn((12, -8, 20), (6, -15, 9), (1.1, 0.95, 1.05))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_alignment():
        yield


def align(sample: Sample) -> Alignment:
    return align_to_template(sample.image, sample.affine, support_mask(sample.image, sample.affine), load_template())


@pytest.fixture(scope="module")
def sample() -> Sample:
    """Not the template's contrast: dark and bright are swapped."""
    return brain(TRUTH, (4, 3, 3), inverted=True)


@pytest.fixture(scope="module")
def alignment(sample: Sample) -> Alignment:
    return align(sample)


@pytest.fixture(scope="module")
def whole() -> Sample:
    return head(TRUTH)


def test_a_known_affine_is_found_in_another_contrast(sample: Sample, alignment: Alignment) -> None:
    assert apart(alignment.prealign, TRUTH, sample) < 2
    assert alignment.needed
    assert alignment.mi_after > 3 * alignment.mi_before
    assert alignment.overlap_before < 0.85 and alignment.overlap_after > 0.97
    assert 20 < alignment.moved_mm < 60 and 20 < alignment.corners_mm < 80


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
def test_lossless_changes_end_at_the_same_place(change: Any, sample: Sample, alignment: Alignment) -> None:
    image, affine, header = change(sample)
    realigned = align(Sample(image, image > 0, affine, TRUTH))
    assert apart(realigned.prealign @ header, alignment.prealign, sample) < 0.01  # mm


def test_units_and_background_noise_do_not_matter(sample: Sample, alignment: Alignment) -> None:
    noise = np.random.default_rng(0).normal(0, 1e-5, sample.image.shape)
    changed = (sample.image / 255 + noise) * 2.5 - 0.7
    realigned = align(replace(sample, image=changed.astype(np.float32)))
    assert apart(realigned.prealign, alignment.prealign, sample) < 0.01


def test_neither_threads_nor_what_was_aligned_before_change_a_bit(sample: Sample, alignment: Alignment) -> None:
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads + 3)
    try:
        realigned = align(sample)
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    np.testing.assert_array_equal(realigned.prealign, alignment.prealign)


def test_a_brain_in_its_place_needs_no_alignment() -> None:
    small = turn((0, 0, 0), (1, -1, 1), 1.02)
    assert not align(brain(small, (3, 3, 3))).needed


def test_minilumir_is_in_its_place_in_both_contrasts(shared: Any) -> None:
    from sitreg_lumir.io.read import read_image

    for modality in ("0000", "0001"):
        scan = read_image(shared / f"minilumir/2mm/imagesVal/LUMIRMRI_0101_{modality}.nii.gz")
        alignment = align(Sample(scan.data, scan.data > 0, scan.affine, np.eye(4)))
        assert not alignment.needed and alignment.moved_mm < 2 and alignment.overlap_after > 0.93


def test_a_whole_head_is_aligned_without_a_mask(whole: Sample) -> None:
    alignment = align_to_template(whole.image, whole.affine, None, load_template())
    assert apart(alignment.prealign, TRUTH, whole) < 5
    assert np.isnan(alignment.overlap_after)


def as_scan(name: str, image: Array, affine: Array) -> Scan:
    return Scan(Path(name), image, affine, "sform", nibabel.Nifti1Header())


def test_a_whole_head_is_distinguished_from_a_brain(whole: Sample, sample: Sample, alignment: Alignment) -> None:
    template = load_template()
    brain_scan = as_scan("brain.nii", sample.image, sample.affine)
    check_brain(brain_scan, support_mask(sample.image, sample.affine), alignment.prealign, template)
    visible = support_mask(whole.image, whole.affine)
    with pytest.raises(InputError, match=r"head\.nii: looks like a whole head.*litres.*`fixed_mask`"):
        check_brain(as_scan("head.nii", whole.image, whole.affine), visible, None, template)
    small = turn((0, 0, 0), scale=0.8)  # a child's head: no larger than a grown-up's brain can be
    child = as_scan("child.nii", whole.image, small @ whole.affine)
    check_brain(child, visible, None, template)
    tenfold = as_scan("cm.nii", whole.image, np.diag([10.0, 10, 10, 1]) @ whole.affine)
    with pytest.raises(InputError, match=r"cm\.nii: \d+ litres are too many for a head; correct the voxel size"):
        check_brain(tenfold, visible, None, template)
    with pytest.raises(InputError, match=r"m\.nii: its field of view has .* litres.*correct the voxel size"):
        support_mask(whole.image, np.diag([1e-3, 1e-3, 1e-3, 1]) @ whole.affine, "m.nii")
    with pytest.raises(InputError, match=r"child\.nii: looks like a whole head.*outside a brain"):
        align_brain(child, visible, template, refuse_head)


def test_the_share_outside_the_brain_is_none_for_the_brain_and_all_beside_it() -> None:
    template = load_template()
    assert outside_share(template.mask, template.affine, np.eye(4), template) == 0
    assert outside_share(template.mask, template.affine, turn((0, 0, 0), (300, 0, 0)), template) == 1


@pytest.mark.parametrize("unit", [1000.0, 100.0, 0.1])
def test_voxel_sizes_in_another_unit_are_refused(unit: float, sample: Sample) -> None:
    affine = np.diag([unit, unit, unit, 1]) @ sample.affine
    with pytest.raises(InputError, match=r"scan\.nii: .*correct the voxel size in the header"):
        align_to_template(sample.image, affine, sample.mask, load_template(), "scan.nii")
    if unit > 1:
        with pytest.raises(InputError, match=r"scan\.nii: .*correct the voxel size in the header"):
            align_to_template(sample.image, affine, None, load_template(), "scan.nii")


def test_a_model_of_another_world_is_refused() -> None:
    check_model_world(load_template(), LUMIR_SHAPE, lumir_grid()[1], "model")
    with pytest.raises(InputError, match=r"model: its grid holds \d+% of the MNI152 brain.*`align=none`"):
        check_model_world(load_template(), LUMIR_SHAPE, turn((0, 0, 0), (0, 40, 0)) @ lumir_grid()[1], "model")


def test_lumirs_grid_is_that_of_its_files(shared: Any) -> None:
    from sitreg_lumir.io.read import read_grid

    shape, affine = read_grid(shared / "minilumir/1mm/imagesVal/LUMIRMRI_0101_0000.nii.gz")
    assert shape == LUMIR_SHAPE
    np.testing.assert_allclose(affine, lumir_grid()[1])
    coarse = inverse(affine) @ read_grid(shared / "minilumir/2mm/imagesVal/LUMIRMRI_0101_0000.nii.gz")[1]
    np.testing.assert_allclose(coarse[:3, 3], 0.5)  # the first coarse voxel's centre lies within, in fine voxels
