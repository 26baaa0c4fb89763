"""`--transform rigid|affine`: the right map between scans of one person, its exact inverse for exchanged scans."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from prepare_samples import Sample, brain, turn

from sitreg_lumir.cli import main
from sitreg_lumir.geometry.transforms import map_points, transform_by
from sitreg_lumir.io.maps import load_map
from sitreg_lumir.io.write import plain_header, save_volume
from sitreg_lumir.preprocessing.intensity import Mask
from sitreg_lumir.registration import linear
from sitreg_lumir.registration.linear import LinearResult, register_linearly
from sitreg_lumir.registration.scan import PlacedScan

Array = NDArray[Any]
UNALIGNED = np.eye(4), np.eye(4)
TRUTH = turn((6, -8, 10), (9, -12, 7))  # the moving scan's world -> the fixed one's


def placed(sample: Sample) -> PlacedScan:
    header = plain_header(sample.image.shape, sample.affine, np.float32)
    mask: Mask = sample.mask.astype(bool)
    image = sample.image.astype(np.float32)
    return PlacedScan(
        Path("scan.nii.gz"), image, sample.affine, "sform", header, mask, None, np.eye(4), None, "as it is", None
    )


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """3 mm instead of 2 mm as the finest resolution: a third of the voxels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_FINEST_MM", 3.0)
        yield


@pytest.fixture(scope="module")
def fixed() -> PlacedScan:
    return placed(brain(np.eye(4), (2, 2, 2.5)))


@pytest.fixture(scope="module")
def moving() -> PlacedScan:
    """Dark where the fixed scan is bright, thicker slices, elsewhere in the world."""
    return placed(brain(TRUTH, (2, 2.2, 4), inverted=True))


def error_mm(matrix: Array, scan: PlacedScan, truth: Array) -> float:
    points = transform_by(scan.affine, np.argwhere(scan.brain)[::50].T.astype(np.float64))
    return float(np.linalg.norm(transform_by(matrix, points) - transform_by(truth, points), axis=0).max())


@pytest.fixture(scope="module")
def rigid_result(fixed: PlacedScan, moving: PlacedScan) -> LinearResult:
    return register_linearly(fixed, moving, UNALIGNED, rigid=True)


@pytest.mark.parametrize("rigid", [True, False])
def test_the_map_is_right_and_exchanging_the_scans_inverts_it(
    fixed: PlacedScan, moving: PlacedScan, rigid_result: LinearResult, rigid: bool
) -> None:
    result = rigid_result if rigid else register_linearly(fixed, moving, UNALIGNED, rigid=False)
    assert error_mm(result.matrix, fixed, np.linalg.inv(TRUTH)) < (0.3 if rigid else 0.8)
    assert result.apart_mm < 1 and result.mutual_information > 0.5
    exchanged = register_linearly(moving, fixed, UNALIGNED, rigid=rigid)
    np.testing.assert_allclose(exchanged.matrix @ result.matrix, np.eye(4), atol=1e-9)
    if rigid:
        np.testing.assert_allclose(result.matrix[:3, :3] @ result.matrix[:3, :3].T, np.eye(3), atol=1e-9)


def test_mirrored_storage_changes_nothing(fixed: PlacedScan, moving: PlacedScan, rigid_result: LinearResult) -> None:
    flip = np.eye(4)
    flip[0, 0], flip[0, 3] = -1, moving.shape[0] - 1
    stored = Sample(moving.data[::-1].copy(), moving.brain[::-1].copy(), moving.affine @ flip, TRUTH)
    mirrored = register_linearly(fixed, placed(stored), UNALIGNED, rigid=True)
    assert error_mm(mirrored.matrix, fixed, rigid_result.matrix) < 0.1


@pytest.mark.slow
def test_the_folder_of_a_rigid_registration_is_like_any_other(
    fixed: PlacedScan, moving: PlacedScan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, scan in (("fixed", fixed), ("moving", moving)):
        save_volume(tmp_path / f"{name}.nii.gz", scan.data, scan.affine)
    scans = ["--fixed", str(tmp_path / "fixed.nii.gz"), "--moving", str(tmp_path / "moving.nii.gz")]
    out = tmp_path / "out"
    assert main(["register", *scans, "--transform", "rigid", "--align", "none", "-o", str(out)]) == 0
    assert "verdict: ok" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    exact = load_map(out)
    points = transform_by(fixed.affine, np.argwhere(fixed.brain)[::500].T.astype(np.float64)).T
    expected = transform_by(np.array(summary["linear"]["matrix"]), points.T).T
    np.testing.assert_allclose(map_points(exact, points), expected, atol=1e-4)
    np.testing.assert_allclose(map_points(exact.inverse, expected), points, atol=1e-4)
    moved = tmp_path / "moved.nii.gz"
    to_fixed = ["-t", str(out), "--to", "fixed", "--image", str(tmp_path / "moving.nii.gz"), "-o", str(moved)]
    assert main(["apply", *to_fixed]) == 0
    assert (out / "report.html").is_file() and (out / "from-moving_to-fixed_xfm.h5").stat().st_size < 1e5


def test_options_that_do_not_go_with_it(fixed: PlacedScan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans = ["--fixed", "EXAMPLE-T1", "--moving", "EXAMPLE-T2", "-o", str(tmp_path / "out"), "--transform", "affine"]
    assert main(["register", *scans, "--refine", "5"]) == 2
    message = capsys.readouterr().err
    assert "--refine is for --transform deformable" in message and message.count("\n") == 1
