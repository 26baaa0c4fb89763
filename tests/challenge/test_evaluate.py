"""`evaluate`: the right fields, the right numbers, nothing scored that does not belong."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from sitreg_lumir.challenge.evaluate import evaluate
from sitreg_lumir.challenge.means import summarise
from sitreg_lumir.challenge.provenance import make_provenance, save_field
from sitreg_lumir.cli import main
from sitreg_lumir.data.lumir import LumirDataset, read_dataset
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.write import save_disp, save_volume

SHAPE = (14, 16, 12)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
SHIFT = {"0100": 0, "0101": 1, "0102": 2}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three subjects, each the same brain shifted by some voxels along the first axis, as T1 and T2."""
    folder = tmp_path / "data"
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[3:7, 3:9, 3:9], labels[7:11, 3:9, 3:9] = 1, 2
    landmarks = np.zeros(SHAPE, dtype=np.uint8)
    landmarks[5:7, 5:7, 5:7] = 1
    image = np.random.default_rng(0).integers(1, 250, SHAPE).astype(np.uint8) * (labels > 0)
    for subject, shift in SHIFT.items():
        for modality, contrast in (("0000", image), ("0001", (255 - image) * (labels > 0))):
            name = f"LUMIRMRI_{subject}_{modality}.nii.gz"
            for kind, volume in (("images", contrast), ("labels", labels), ("landmarks", landmarks)):
                save_volume(folder / f"{kind}Val" / name, np.roll(volume, shift, axis=0), AFFINE)
    for file, modality in (("LUMIR_dataset.json", "0000"), ("multimodal.json", "0001")):
        pairs = [
            {
                "fixed": f"./imagesVal/LUMIRMRI_{fixed}_0000.nii.gz",
                "moving": f"./imagesVal/LUMIRMRI_{moving}_{modality}.nii.gz",
            }
            for fixed, moving in (("0100", "0101"), ("0101", "0102"))
        ]
        content = {
            "name": "tiny",
            "tensorImageShape": {"0": list(SHAPE)},
            "modality": {"0": "T1w", "1": "T2w"},
            "evaluation_labels": {"1": "left", "2": "right"},
            "training": [],
            "validation": pairs,
        }
        (folder / file).write_text(json.dumps(content))
    return folder


@pytest.fixture
def datasets(root: Path) -> list[LumirDataset]:
    return [read_dataset(root / name, validation=True) for name in ("LUMIR_dataset.json", "multimodal.json")]


def write_fields(folder: Path, datasets: list[LumirDataset]) -> None:
    disp = np.zeros((3, *SHAPE), dtype=np.float32)
    disp[0] = 1  # the exact answer for each pair
    pairs = [pair for dataset in datasets for pair in dataset.validation]
    for pair in pairs:
        name = pair.name if len(datasets) == 1 else pair.long_name
        save_field(folder / f"disp_{name}.nii.gz", disp, AFFINE, make_provenance(pair, [], {}))


def test_exact_fields_score_full_marks(
    tmp_path: Path, datasets: list[LumirDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    write_fields(folder, datasets)
    result = evaluate(folder, datasets)
    for group in ("T1-T1", "T1-T2"):
        scores = result.summary["groups"][group]
        assert scores["pairs"] == 2
        assert {name: scores[name]["mean"] for name in ("dsc", "hd95", "tre", "ndv")} == {
            "dsc": 1.0,
            "hd95": 0.0,
            "tre": 0.0,
            "ndv": 0.0,
        }
    assert result.summary["gap"] == 0
    shown = capsys.readouterr().out
    assert "T1-T2" in shown
    assert "1.000" in shown
    with (folder / "evaluation.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["pair"] for row in rows] == [case["pair"] for case in result.cases]
    assert {float(row["dsc/2"]) for row in rows} == {1.0}
    means = json.loads((folder / "evaluation.json").read_text())
    assert means["groups"]["all"]["pairs"] == 4
    assert means["labels"]["2"] == {"name": "right", "dsc": 1.0}


def test_identity_is_the_score_before(tmp_path: Path, datasets: list[LumirDataset]) -> None:
    result = evaluate(None, datasets[:1], tmp_path / "before", identity=True)
    scores = result.summary["groups"]["T1-T1"]
    assert scores["tre"]["mean"] == pytest.approx(1)
    assert scores["tre_mm"]["mean"] == pytest.approx(2)
    assert scores["hd95_mm"]["mean"] == pytest.approx(2)
    assert scores["dsc"]["mean"] == pytest.approx(0.75)
    assert sorted(path.name for path in (tmp_path / "before").iterdir()) == ["evaluation.csv", "evaluation.json"]


def test_missing_fields_are_all_named(tmp_path: Path, datasets: list[LumirDataset]) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"2 of 2 fields are missing: disp_0100_0101.*disp_0101_0102") as caught:
        evaluate(tmp_path / "out", datasets[:1])
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(InputError, match="no such folder"):
        evaluate(tmp_path / "absent", datasets)


def test_extra_fields_are_named_and_left_out(
    tmp_path: Path, datasets: list[LumirDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    write_fields(tmp_path / "out", datasets[:1])
    save_disp(tmp_path / "out" / "disp_0777_0778.nii.gz", np.zeros((3, *SHAPE)), AFFINE)
    assert len(evaluate(tmp_path / "out", datasets[:1]).cases) == 2
    assert "disp_0777_0778.nii.gz" in capsys.readouterr().err


def test_fields_of_other_images_are_refused(tmp_path: Path, datasets: list[LumirDataset]) -> None:
    write_fields(tmp_path / "out", datasets[:1])
    with pytest.raises(InputError, match="another image"):
        evaluate(tmp_path / "out", datasets[1:])
    assert not (tmp_path / "out" / "evaluation.csv").exists()


def test_fields_without_provenance_are_scored_with_a_note(
    tmp_path: Path, datasets: list[LumirDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    write_fields(tmp_path / "out", datasets[:1])
    for path in (tmp_path / "out").glob("*.json"):
        path.unlink()
    evaluate(tmp_path / "out", datasets[:1])
    assert "2 fields have no provenance" in capsys.readouterr().out


def test_fields_and_labels_in_another_orientation_are_named(
    tmp_path: Path, root: Path, datasets: list[LumirDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is scored as if arrays lay as their headers do not say."""
    write_fields(tmp_path / "out", datasets[:1])
    (tmp_path / "out" / "disp_0100_0101.json").unlink()
    turned = AFFINE @ np.diag([-1.0, 1, 1, 1])
    disp = np.zeros((3, *SHAPE), dtype=np.float32)
    save_disp(tmp_path / "out" / "disp_0100_0101.nii.gz", disp, turned)
    evaluation = evaluate(tmp_path / "out", datasets[:1])
    assert any("1 fields say another orientation" in note for note in evaluation.summary["notes"])
    assert "disp_0100_0101.nii.gz" in capsys.readouterr().err
    label = root / "labelsVal" / "LUMIRMRI_0101_0000.nii.gz"
    save_volume(label, np.zeros(SHAPE, np.uint8), turned)
    assert main(["evaluate", str(tmp_path / "out"), "--data", str(root / "LUMIR_dataset.json")]) == 2
    message = capsys.readouterr().err
    assert str(label) in message and "its axes point to LAS" in message


def test_a_field_of_another_shape_is_refused(tmp_path: Path, datasets: list[LumirDataset]) -> None:
    write_fields(tmp_path / "out", datasets[:1])
    (tmp_path / "out" / "disp_0100_0101.json").unlink()
    save_disp(tmp_path / "out" / "disp_0100_0101.nii.gz", np.zeros((3, 8, 8, 8)), AFFINE)
    with pytest.raises(InputError, match="the grid is"):
        evaluate(tmp_path / "out", datasets[:1])
    assert not (tmp_path / "out" / "evaluation.csv").exists()


def test_without_labels_there_is_correlation(
    root: Path, tmp_path: Path, datasets: list[LumirDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("labels", "landmarks"):
        shutil.rmtree(root / f"{kind}Val")
    before = evaluate(None, datasets[:1], identity=True).summary["groups"]["T1-T1"]
    write_fields(tmp_path / "out", datasets[:1])
    after = evaluate(tmp_path / "out", datasets[:1]).summary["groups"]["T1-T1"]
    assert "dsc" not in after
    assert -1 <= after["lncc"]["mean"] < before["lncc"]["mean"] <= 0
    assert "no label maps" in capsys.readouterr().out


def test_summary_of_infinite_and_absent_scores() -> None:
    cases = [
        {"group": "T1-T1", "hd95": math.inf, "tre": math.nan},
        {"group": "T1-T1", "hd95": 1.0, "tre": 2.0},
    ]
    scores = summarise(cases)["groups"]["T1-T1"]
    assert math.isinf(scores["hd95"]["mean"])
    assert scores["hd95"]["infinite"] == 1
    assert scores["tre"] == {"mean": 2.0, "sd": pytest.approx(math.nan, nan_ok=True), "pairs": 1, "infinite": 0}
