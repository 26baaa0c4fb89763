"""`register --strip`: raw heads in, everything out, the masks that were made kept."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from prepare_samples import Sample, head, turn

from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.read import read_image
from sitreg_lumir.io.write import save_volume
from sitreg_lumir.preprocessing import strip
from sitreg_lumir.preprocessing.template import load_template
from sitreg_lumir.registration.options import RegisterOptions
from sitreg_lumir.registration.scan import place_scan

TRUTH = turn((5, -4, 8), (4, -8, 6))


@pytest.fixture(scope="module")
def sample() -> Sample:
    return head(TRUTH)


@pytest.fixture(scope="module")
def raw(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heads") / "head.nii.gz"
    save_volume(path, sample.image.astype(np.float32), sample.affine)
    return path


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def test_a_head_is_refused_without_it_and_the_line_names_it(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = raw.with_name("out")
    assert main(["register", "--fixed", "MNI152", "--moving", str(raw), "-o", str(out)]) == 2
    assert "add --strip deepbet" in capsys.readouterr().err and not out.exists()


def test_the_templates_brain_is_put_into_the_head(raw: Path, sample: Sample) -> None:
    files = RegisterOptions(strip="template").scan_files("moving", raw)
    placed = place_scan(files, "each", None, None)
    assert placed.stripped_by == "template" and dice(placed.brain, sample.mask.astype(bool)) > 0.93


def test_a_stripped_scan_stays_as_it_is(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strip, "deepbet_mask", None)  # is not asked
    path = tmp_path / "brain.nii.gz"
    save_volume(path, np.where(sample.mask, sample.image, 0).astype(np.float32), sample.affine)
    brain, method = strip.strip_head(read_image(path), "deepbet", load_template(), mask="fixed_mask")
    assert method is None and dice(brain, sample.mask.astype(bool)) > 0.99


def test_without_deepbet_the_line_names_the_extra_and_the_mask(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deepbet", None)
    files = RegisterOptions(strip="deepbet").scan_files("moving", raw)
    with pytest.raises(InputError, match=r"pip install 'sitreg-lumir\[strip\]'; or give `moving_mask`"):
        place_scan(files, "auto", None, None)


def test_a_mask_that_is_named_wins(raw: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = raw.with_name("mask.nii.gz")
    save_volume(mask, sample.mask.astype(np.uint8), sample.affine)
    files = RegisterOptions(strip="deepbet", moving_mask=mask).scan_files("moving", raw)
    placed = place_scan(files, "none", None, None)
    assert placed.stripped_by is None and np.array_equal(placed.brain, sample.mask.astype(bool))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["template", "deepbet"])
def test_raw_heads_in_everything_out(raw: Path, sample: Sample, tmp_path: Path, method: str) -> None:
    if method == "deepbet":
        pytest.importorskip("deepbet", reason="the extra [strip] is not installed")
    out = tmp_path / "out"
    scans = ["--fixed", "MNI152", "--moving", str(raw)]
    assert main(["register", *scans, "--strip", method, "--transform", "affine", "-o", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["moving"]["stripped_by"] == method and summary["fixed"]["stripped_by"] is None
    kept = np.asarray(nibabel.load(out / "moving_brain.nii.gz").dataobj) > 0  # type: ignore[attr-defined]
    assert dice(kept, sample.mask.astype(bool)) > 0.9
    assert (out / "warped_moving.nii.gz").is_file() and (out / "report.html").is_file()
