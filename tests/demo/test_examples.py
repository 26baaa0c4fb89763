"""The scans that come with the package are what they are said to be."""

import nibabel as nib
import numpy as np
import pytest

from sitreg_lumir.demo.brain import STRUCTURES
from sitreg_lumir.demo.examples import grid_of, labels_of
from sitreg_lumir.io.read import read_image
from sitreg_lumir.registration.scan import EXAMPLES, EXAMPLES_FOLDER


@pytest.mark.parametrize("example", EXAMPLES)
def test_scan_and_labels_lie_on_the_grid_and_go_together(example: str) -> None:
    shape, affine = grid_of(example)
    scan, labels = read_image(EXAMPLES_FOLDER / EXAMPLES[example]), read_image(labels_of(example))
    for volume in (scan, labels):
        assert volume.shape == shape and volume.data.dtype == np.uint8
        np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    assert set(np.unique(labels.data)) == {0, *STRUCTURES}
    assert labels.says_labels and not scan.says_labels
    assert not (labels.data[scan.data == 0] > 0).any()  # structures are brain
    litres = (scan.data > 0).sum() * abs(np.linalg.det(affine)) / 1e6
    assert 1.2 < litres < 2.2


def test_they_are_small() -> None:
    files = list(EXAMPLES_FOLDER.glob("*.nii.gz"))
    assert len(files) == 4 and sum(file.stat().st_size for file in files) < 5e6
    assert all(nib.load(file).header["descrip"].item() == b"" for file in files)  # type: ignore[attr-defined]
