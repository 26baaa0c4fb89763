"""`dataset`: a folder, a BIDS tree or a table of T1 scans becomes a data set that `fit` takes as it is."""

import csv
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from cli_calls import refused
from prepare_samples import Array, brain, head

import sitreg_lumir
from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.lock import locked
from sitreg_lumir.preprocessing import place, strip
from sitreg_lumir.preprocessing.align import Alignment
from sitreg_lumir.preprocessing.dataset_split import draw_validation
from sitreg_lumir.preprocessing.find_scans import find_scans

SMALL = ["--spacing", "4", "--no-bias-correction"]
TINY = [
    "--wandb", "off", "--data.batch_size", "1", "--data.pairs_per_epoch", "2", "--data.num_workers", "0",
    "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
    "--trainer.accelerator", "cpu", "--model.features", "[4,4]", "--model.head_features", "[4,4]",
    "--panels-every", "100",
]  # fmt: skip


@pytest.fixture(autouse=True)
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares alignments: the samples lie on the template."""
    known = Alignment(np.eye(4), 0.1, 1.0, 0.5, 0.97, 20.0, 30.0)
    for module in (place, strip):
        monkeypatch.setattr(module, "align_to_template", lambda *_: known)


@pytest.fixture(scope="module")
def stripped() -> tuple[Array, Array]:
    sample = brain(np.eye(4), (4, 4, 4))
    return sample.image.astype(np.float32), sample.affine


def save(path: Path, values: Array, affine: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(values, affine).to_filename(path)
    return path


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "scans.csv").open(newline="") as stream:
        return {row["name"]: row for row in csv.DictReader(stream)}


def listing(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "LUMIR_dataset.json").read_text()))


@pytest.fixture
def bids(tmp_path: Path, stripped: tuple[Array, Array]) -> Path:
    """Six people, two of them scanned twice, one of them with another contrast, with label maps and a broken scan."""
    values, affine = stripped
    root = tmp_path / "bids tree"
    for number in range(1, 7):
        for session in ("1", "2") if number < 3 else ("1",):
            folder, stem = root / f"sub-0{number}/ses-{session}/anat", f"sub-0{number}_ses-{session}"
            save(folder / f"{stem}_T1w.nii.gz", values + number * (values > 0), affine)
            save(folder / f"{stem}_T2w.nii.gz", values, affine)
            segmented = root / f"derivatives/seg/sub-0{number}/ses-{session}/anat/{stem}_dseg.nii.gz"
            save(segmented, np.where(values > 100, 3000, 2 * (values > 0)).astype(np.int32), affine)
    (root / "sub-06/ses-1/anat/sub-06_ses-1_T1w.nii.gz").write_bytes(b"\x1f\x8b no scan")
    (root / "dataset_description.json").write_text("{}")
    return root


def test_a_bids_tree_becomes_a_data_set_and_the_next_line_trains(
    bids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "my data"
    command = ["dataset", str(bids), "-o", str(out), *SMALL, "--validation", "2"]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert "8 scans: 7 prepared, 0 as before, 1 failed" in printed.out
    assert "sub-06_ses-1_T1w.nii.gz" in printed.err.splitlines()[-1] and "1 of 8 scans failed" in printed.err
    table = rows(out)
    assert [*table] == ["01-ses1", "01-ses2", "02-ses1", "02-ses2", "03-ses1", "04-ses1", "05-ses1", "06-ses1"]
    assert table["06-ses1"]["error"] and not table["06-ses1"]["split"]
    for subject in {row["subject"] for row in table.values()}:
        assert len({row["split"] for row in table.values() if row["subject"] == subject}) == 1
    dataset = sitreg_lumir.read_dataset(out, training=True, validation=True)
    validated = {row["subject"] for row in table.values() if row["split"] == "validation"}
    assert {image.who for image in dataset.training} == {"01", "02", "03", "04", "05"} - validated
    assert len(validated) == len(dataset.validation) == 2 and dataset.shape == (40, 56, 48)
    image = nibabel.load(dataset.validation[0].fixed.path)
    labels = dataset.validation[0].fixed.labels
    assert labels is not None
    stored, values = nibabel.load(labels), np.asarray(image.dataobj)
    assert np.array_equal(stored.affine, image.affine) and set(np.unique(stored.dataobj)) == {0, 2, 3000}
    assert values.dtype == np.uint8 and ((np.asarray(stored.dataobj) > 0) == (values > 0)).mean() > 0.99
    line = next(line for line in printed.out.splitlines() if line.startswith("next: "))
    arguments = shlex.split(line.removeprefix("next: "))[1:]
    assert arguments[:3] == ["fit", "--config", "minilumir/mind_small"]
    assert main([*arguments, *TINY, "--data.cache", "cache"]) == 0
    printed = capsys.readouterr()
    assert "LUMIR_dataset_multimodal.json of the config is not in" in printed.err
    line = next(line for line in printed.out.splitlines() if line.startswith("next: "))
    arguments = shlex.split(line.removeprefix("next: "))[1:]
    assert main([*arguments, "--data.num_workers", "0", "--data.cache", "cache"]) == 0
    printed = capsys.readouterr()
    line = next(line for line in printed.out.splitlines() if line.startswith("next: "))
    assert main(shlex.split(line.removeprefix("next: "))[1:]) == 0


def test_started_again_it_does_what_is_left_and_refuses_what_differs(
    bids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (3, 4, 5):
        shutil.rmtree(bids / f"sub-0{number}")
    out = tmp_path / "out"
    command = ["dataset", str(bids), "-o", str(out), *SMALL, "--validation", "0"]
    assert main(command) == 2
    made = out / "images/T1_01-ses1_0000.nii.gz"
    before = made.stat().st_mtime_ns
    (out / "made/T1_02-ses1_0000.json").unlink()  # as if killed before it was complete
    shutil.copy(bids / "sub-02/ses-2/anat/sub-02_ses-2_T1w.nii.gz", bids / "sub-06/ses-1/anat/sub-06_ses-1_T1w.nii.gz")
    capsys.readouterr()
    assert main(command) == 0
    assert "5 scans: 2 prepared, 3 as before, 0 failed" in capsys.readouterr().out
    assert made.stat().st_mtime_ns == before and len(listing(out)["training"]) == 5
    refused(
        capsys,
        [*command, "--spacing", "2"],
        "was prepared otherwise: options.spacing is 4.0 there, 2.0 now",
        "--overwrite",
    )
    shutil.copy(bids / "sub-02/ses-2/anat/sub-02_ses-2_T1w.nii.gz", bids / "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz")
    refused(capsys, command, "T1_01-ses1_0000.nii.gz: was prepared otherwise: files.image.sha256")
    assert made.stat().st_mtime_ns == before
    assert main([*command, "--overwrite"]) == 0
    assert "1 prepared, 4 as before" in capsys.readouterr().out and made.stat().st_mtime_ns > before
    with locked(out / ".dataset.lock"):
        refused(capsys, command, "another process is making this data set")


def test_heads_are_refused_until_they_are_stripped(
    tmp_path: Path, stripped: tuple[Array, Array], capsys: pytest.CaptureFixture[str]
) -> None:
    sample = head(np.eye(4), (4, 4, 4))
    save(tmp_path / "in/head.nii.gz", sample.image, sample.affine)
    save(tmp_path / "in/brain.nii.gz", *stripped)
    save(tmp_path / "in/masked.nii.gz", sample.image, sample.affine)
    save(tmp_path / "in/masked_mask.nii.gz", sample.mask.astype(np.uint8), sample.affine)
    command = ["dataset", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *SMALL]
    refused(capsys, command, "head.nii.gz: looks like a whole head", "add --strip deepbet", "1 of 3 scans failed")
    assert main([*command, "--strip", "template"]) == 0
    assert "1 prepared, 2 as before" in capsys.readouterr().out  # brains stay as they are
    refused(capsys, [*command, "--strip"], "head_0000.nii.gz: was prepared otherwise: options.strip")
    table = rows(tmp_path / "out")
    assert "the template's brain" in table["head"]["remarks"]
    assert [table[name]["made"] for name in ("brain", "masked")] == ["before", "before"]
    assert len(listing(tmp_path / "out")["training"]) == 3 and listing(tmp_path / "out")["validation"] == []


@pytest.mark.slow
def test_workers_prepare_the_same(tmp_path: Path, stripped: tuple[Array, Array]) -> None:
    """By other processes, which see nothing of what a test replaces; the scans lie where they are aligned to."""
    for name in "ab":
        save(tmp_path / f"in/{name}.nii.gz", *stripped)
    (tmp_path / "in/d.nii.gz").write_bytes(b"")
    assert main(["dataset", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *SMALL, "--workers", "2"]) == 2
    first, second = (tmp_path / f"out/images/T1_{name}_0000.nii.gz" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert "d.nii.gz" in rows(tmp_path / "out")["d"]["error"]


FOLDERS = [
    (["anna.nii.gz", "ben.nii", "carl.mgz", "._ben.nii"], ["anna", "ben", "carl"]),
    (["anna_ses1.nii.gz", "anna_ses2.nii.gz", "ben_T1.nii.gz"], ["anna", "anna", "ben"]),
    (["anna/t1.nii.gz", "ben/t1.nii.gz"], ["anna", "ben"]),
    (["anna/2020-01-02/t1.nii.gz", "anna/visit2/t1.nii.gz", "ben/20210304/t1.nii.gz"], ["anna", "anna", "ben"]),
    (["T1/anna.nii.gz", "T1/ben.nii.gz"], ["anna", "ben"]),
    ([f"site/{name}.nii.gz" for name in "abcdefghijklmn"] + ["other/z.nii.gz"], ["other", *"abcdefghijklmn"]),
    (["imagesTr/LUMIRMRI_0001_0000.nii.gz", "imagesTr/LUMIRMRI_0002_0001.nii.gz"], ["0001"]),
    (["a.nii.gz", "a_mask.nii.gz", "a_dseg.nii.gz", "b_T2w.nii.gz", "c.img", "c.hdr"], ["a", "c"]),
    (["sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_space-MNI_T1w.nii.gz", "sub-1/anat/x.nii"], ["1"]),
    (["sub-1_run-1_T1w.nii.gz", "sub-1_run-2_T1w.nii.gz", "sub-2_T1w.nii.gz"], ["1", "1", "2"]),
]


@pytest.mark.parametrize(("files", "subjects"), FOLDERS, ids=[files[0] for files, _ in FOLDERS])
def test_who_a_scan_shows(files: list[str], subjects: list[str], tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    scans = find_scans(tmp_path, without=tmp_path / "out").scans
    assert [scan.subject for scan in scans] == subjects
    assert len({scan.name.casefold() for scan in scans}) == len(scans)


def test_masks_labels_and_tables(tmp_path: Path) -> None:
    for file in ("in/a.nii.gz", "in/a_mask.nii.gz", "in/b.nii.gz", "maps/b_seg.nii.gz", "maps/a.nii.gz"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    first, second = find_scans(tmp_path / "in", labels=tmp_path / "maps").scans
    assert first.mask == tmp_path / "in/a_mask.nii.gz" and second.mask is None
    assert (first.labels, second.labels) == (tmp_path / "maps/a.nii.gz", tmp_path / "maps/b_seg.nii.gz")
    table = tmp_path / "scans.csv"
    table.write_text("image;subject;labels\nin/a.nii.gz;anna;maps/a.nii.gz\nin/b.nii.gz;anna;\n")
    first, second = find_scans(table).scans
    assert first.subject == second.subject == "anna" and first.name != second.name and second.labels is None
    wrong = {"picture\na\n": "unknown column", "image\n": "names no scan", "image,mask\n,x\n": "empty"}
    for text, words in wrong.items():
        table.write_text(text)
        with pytest.raises(InputError, match=words):
            find_scans(table)
    with pytest.raises(InputError, match="holds no T1 scan"):
        find_scans(tmp_path / "maps", without=tmp_path)
    with pytest.raises(InputError, match="no such folder or table"):
        find_scans(tmp_path / "nowhere")


def test_the_draw_is_by_subject_and_hardly_changes_when_scans_are_added() -> None:
    subjects = [f"subject{number}" for number in range(100)]
    drawn = draw_validation(subjects, 10, 0, "x")
    assert len(drawn) == 10 and drawn == draw_validation(subjects[::-1], 10, 0, "x")
    assert drawn != draw_validation(subjects, 10, 1, "x")
    assert len(drawn & draw_validation([*subjects, "another"], 10, 0, "x")) >= 9
    assert [len(draw_validation(subjects[:count], None, 0, "x")) for count in (2, 3, 4, 30, 100)] == [0, 0, 2, 3, 10]
    for count, wanted in ((3, 2), (10, 1), (10, 9)):
        with pytest.raises(InputError, match="`validation`"):
            draw_validation(subjects[:count], wanted, 0, "x")
