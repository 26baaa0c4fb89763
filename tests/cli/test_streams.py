"""A closed or full standard output, or one that lacks letters, ends no computation."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from sitreg_lumir.io.points import read_points

COMMAND = f"{sys.executable} -m sitreg_lumir.cli"
POINTS = "NAME;X;y;z\r\nKante ü;1,5;-2;3\r\n;;;\r\n"


@pytest.mark.parametrize(
    ("redirect", "code"),
    [("| (exec 0<&-; sleep 1)", 0), (">&-", 0), (">&- 2>&-", 0), ("> /dev/full", 1), ("> /dev/full 2>&1", 1)],
)
def test_results_are_written_whatever_happens_to_the_output(redirect: str, code: int, tmp_path: Path) -> None:
    folder = tmp_path / "Mü [1] \udcfc"
    folder.mkdir()
    (folder / "points.csv").write_bytes(POINTS.encode("latin-1"))
    (folder / "identity.tfm").write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        "Parameters: 1 0 0 0 1 0 0 0 1 0 0 1\nFixedParameters: 0 0 0\n"
    )
    run = f"{COMMAND} apply -t identity.tfm --points points.csv -o out/moved.csv {redirect}"
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", run], cwd=folder, env=environment, capture_output=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert (b"all results are written" in done.stderr) == (redirect == "> /dev/full")
    content = (folder / "out" / "moved.csv").read_bytes()
    assert content == "NAME;X;y;z\nKante ü;1,500000;-2,000000;4,000000\n".encode("latin-1")


def test_names_without_letters_of_the_locale_are_printed(tmp_path: Path) -> None:
    folder = tmp_path / "Mü \udcfc"
    folder.mkdir()
    nibabel.Nifti1Image(np.ones((4, 4, 4)), np.eye(4)).to_filename(folder / "flat.nii.gz")
    run = [*COMMAND.split(), "apply", "-t", "x.tfm", "--image", str(folder / "flat.nii.gz"), "-o", "out.nii.gz"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(b"sitreg-lumir: error: x.tfm")


def test_points_of_spreadsheets(tmp_path: Path) -> None:
    for text, encoding in (
        ("x,y,z\n1.5,-2,3\n", "utf-8-sig"),
        ("x;y;z;;\n1,5;-2;3;;\n;;;;\n", "utf-8"),
        ("\n\nz\tx\ty\n3\t1,5\t-2\n", "utf-16"),
        (' X , Y , Z \n"1.5", -2, 3\n', "utf-8"),
    ):
        (tmp_path / "p.csv").write_bytes(text.encode(encoding))
        np.testing.assert_array_equal(read_points(tmp_path / "p.csv").points, [[1.5, -2, 3]])
