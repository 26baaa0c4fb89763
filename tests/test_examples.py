"""The scans that come with the package are what they are said to be."""

import nibabel as nib
import numpy as np
import pytest

from sitreg_lumir.data.demo_brain import STRUCTURES
from sitreg_lumir.data.examples import EXAMPLES, FOLDER, grid_of, labels_of
from sitreg_lumir.io.read import read_image


@pytest.mark.parametrize("example", EXAMPLES)
def test_scan_and_labels_lie_on_the_grid_and_go_together(example: str) -> None:
    shape, affine = grid_of(example)
    scan, labels = read_image(FOLDER / EXAMPLES[example]), read_image(labels_of(example))
    for one in (scan, labels):
        assert one.shape == shape and one.data.dtype == np.uint8
        np.testing.assert_allclose(one.affine, affine, atol=1e-4)
    assert set(np.unique(labels.data)) == {0, *STRUCTURES}
    assert labels.says_labels and not scan.says_labels
    assert not (labels.data[scan.data == 0] > 0).any()  # structures are brain
    litres = (scan.data > 0).sum() * abs(np.linalg.det(affine)) / 1e6
    assert 1.2 < litres < 2.2


def test_they_are_small() -> None:
    files = list(FOLDER.glob("*.nii.gz"))
    assert len(files) == 4 and sum(file.stat().st_size for file in files) < 5e6
    assert all(nib.load(file).header["descrip"].item() == b"" for file in files)  # type: ignore[attr-defined]
