"""Tables of pairs: which are read, and that pairs go on after one that cannot be registered."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from data_samples import load

from sitreg_lumir.cli import main
from sitreg_lumir.registration.pairs_table import read_pairs


@pytest.mark.slow
@pytest.mark.usefixtures("coarse_fields")
def test_a_failed_registration_ends_with_its_own_exit_code(
    t1: Path, t2: Path, members: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, affine = load(t2)
    for file in (t1, t2):
        shutil.copy(file, tmp_path / file.name)
    nib.Nifti1Image(np.ascontiguousarray(values[:, :, ::-1]), affine).to_filename(tmp_path / "upside_down.nii.gz")
    table = tmp_path / "pairs.csv"
    table.write_text(f"name,fixed,moving\nwrong,{t1.name},upside_down.nii.gz\nright,{t1.name},{t2.name}\n")
    command = ["register", "--pairs", str(table), "-o", str(tmp_path / "out"), "--members", str(members)]
    assert main([*command, "--align", "none", "--no-report"]) == 3
    assert "2 pairs: 0 ok, 1 check, 1 failed, 0 error" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "wrong" / "summary.json").read_text())
    assert summary["verdict"] == "failed" and "moving brain hardly agrees" in "; ".join(summary["reasons"])
    assert (tmp_path / "out" / "wrong" / "warped_moving.nii.gz").is_file()  # nothing is lost
    assert main([*command, "--align", "none", "--no-report"]) == 3  # nor forgotten


@pytest.mark.usefixtures("coarse_fields")
def test_pairs_go_on_after_a_bad_one(
    t1: Path, t2: Path, members: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(t1, tmp_path / "a.nii.gz")
    shutil.copy(t2, tmp_path / "b.nii.gz")
    values, affine = load(t1)
    nib.Nifti1Image(values[..., None].repeat(3, -1), affine).to_filename(tmp_path / "frames.nii.gz")
    table = tmp_path / "pairs.csv"
    table.write_text("name,fixed,moving\n,a.nii.gz,b.nii.gz\nbad,a.nii.gz,frames.nii.gz\nback,b.nii.gz,a.nii.gz\n")
    command = ["register", "--pairs", str(table), "-o", str(tmp_path / "out"), "--members", str(members)]
    assert main([*command, "--align", "none", "--no-report"]) == 2
    assert "1 of 3 pairs failed" in capsys.readouterr().err
    with (tmp_path / "out" / "pairs.csv").open(newline="") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert [*rows] == ["a_b", "bad", "back"]
    assert rows["bad"]["verdict"] == "error" and "4-D" in rows["bad"]["reasons"]
    assert float(rows["a_b"]["mind_registered"]) > 0 and not (tmp_path / "out" / "bad").exists()
    made = (tmp_path / "out" / "a_b" / "summary.json").stat().st_mtime_ns
    table.write_text("name,fixed,moving\n,a.nii.gz,b.nii.gz\n")
    assert main([*command, "--align", "none"]) == 0
    assert (tmp_path / "out" / "a_b" / "summary.json").stat().st_mtime_ns == made  # skipped
    capsys.readouterr()
    values, affine = load(tmp_path / "b.nii.gz")
    for change, expected in (
        (
            lambda: nib.Nifti1Image(np.maximum(values, 1) - 1, affine).to_filename(tmp_path / "b.nii.gz"),
            "files.moving.sha256",
        ),
        (lambda: command.extend(["--padding", "5"]), "options.padding_mm is 0.0 there, 5.0 now"),
    ):
        change()
        assert main([*command, "--align", "none", "--no-report"]) == 2
        message = capsys.readouterr().err
        assert "a_b: was registered otherwise" in message and expected in message and message.count("\n") == 1
        assert (tmp_path / "out" / "a_b" / "summary.json").stat().st_mtime_ns == made
        assert main([*command, "--align", "none", "--no-report", "--overwrite"]) == 0
        again = (tmp_path / "out" / "a_b" / "summary.json").stat().st_mtime_ns
        assert again > made
        made = again


def test_tables_of_spreadsheets(t1: Path, tmp_path: Path) -> None:
    """Semicolons, tabs, quotes, blanks, empty rows and columns, byte order marks, UTF-16, other letters."""
    names = ["a b.nii.gz", "c (1) [2].nii.gz", "M\udcfcller;x.nii.gz", "Ä.nii.gz"]
    for name in names:
        shutil.copy(t1, tmp_path / name)
    lines = {
        "utf-8": 'Fixed , moving\n\n a b.nii.gz , "c (1) [2].nii.gz"\n,\n',
        "utf-8-sig": "fixed;moving;name;;\r\na b.nii.gz;c (1) [2].nii.gz;;;\r\n;;;;\r\n",
        "utf-16": 'moving\tfixed\n"c (1) [2].nii.gz"\ta b.nii.gz\n',
        "latin-1": "sep=;\nfixed;moving\na b.nii.gz;c (1) [2].nii.gz",
    }
    for encoding, text in lines.items():
        (tmp_path / "pairs.csv").write_bytes(text.encode(encoding))
        (pair,) = read_pairs(tmp_path / "pairs.csv")
        assert pair.name == "a b_c (1) [2]"
        assert pair.files == {"fixed": str(tmp_path / names[0]), "moving": str(tmp_path / names[1])}
    for content in ('fixed;moving\n"Müller;x.nii.gz";Ä.nii.gz\n'.encode("latin-1"),):
        (tmp_path / "pairs.csv").write_bytes(content)
        (pair,) = read_pairs(tmp_path / "pairs.csv")
        assert pair.files == {"fixed": str(tmp_path / names[2]), "moving": str(tmp_path / names[3])}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no columns fixed and moving"),
        ("fixed,moving\n", "holds no pair"),
        ("fixed,moving,colour\na,b,c\n", "unknown column 'colour'"),
        ("fixed,moving\na.nii.gz\n", "line 2"),
        ("fixed,moving\na.nii.gz,gone.nii.gz\n", "no such file"),
        ("fixed,moving,name\na.nii.gz,a.nii.gz,../x\n", "no folder's"),
        ("fixed,moving,Fixed\na.nii.gz,a.nii.gz,a.nii.gz\n", "two columns fixed"),
        ("fixed,moving\na.nii.gz,a.nii.gz,a.nii.gz\n", "line 2: more values"),
        ("fixed,moving\na.nii.gz,a.nii.gz\na.nii.gz,a.nii.gz\n", "a second pair called a_a"),
    ],
)
def test_tables_that_are_none(
    text: str, expected: str, t1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(t1, tmp_path / "a.nii.gz")
    (tmp_path / "pairs.csv").write_text(text)
    assert main(["register", "--pairs", str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
