"""The notebooks run from top to bottom, are stored clean, and use what the package shows to everybody."""

import ast
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sitreg_lumir
from sitreg_lumir.errors import InputError
from sitreg_lumir.network.shipped import default_members

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NEED_MEMBERS = {"register_two_scans"}
SHOWN = {  # what the executed notebook must show, in its outputs
    "register_two_scans": ("image/png", "text/html", "verdict", "ITK maps the five points to the same places"),
    "score_and_compare": ("image/png", "| MIND |", "the same gap as above: True"),
    "train_on_t1": ("image/png", "MIND difference to the fixed image", "Model(tiny.ckpt"),
}
FEWER_STEPS = {  # of those that train, a quarter: they run the same code, and readers get the others
    "score_and_compare": ("pairs_per_epoch=20", "pairs_per_epoch=5"),
    "train_on_t1": ("max_epochs=4", "max_epochs=1"),
}
MOST_CELLS = 15
MOST_SECONDS = 2 * 120  # of a processor: two minutes on two cores; of a quarter of the steps, half of it

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    """The cells of a kind, ``code`` or ``markdown``."""
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def code(path: Path) -> ast.Module:
    """All code of a notebook; it is plain Python, without magics."""
    return ast.parse("\n".join("".join(cell["source"]) for cell in cells(path, "code")))


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(SHOWN)


@each_notebook
def test_it_is_stored_clean_and_short(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert len(content["cells"]) <= MOST_CELLS
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None


@each_notebook
def test_it_names_no_place_of_this_machine(path: Path) -> None:
    texts = ["".join(cell["source"]) for cell in cells(path, "markdown")]
    texts += [node.value for node in ast.walk(code(path)) if isinstance(node, ast.Constant) and type(node.value) is str]
    absolute = re.compile(r"(?:^|[\s\"'`(=])(?:/\w|~/|[A-Za-z]:[\\/])")
    assert not [text for text in texts if absolute.search(text)]


@each_notebook
def test_it_uses_public_names_only(path: Path) -> None:
    """Of this package the names at its top, of others none with an underscore."""
    names = []
    for node in ast.walk(code(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "sitreg_lumir"
            names.append(f"sitreg_lumir.{node.attr}" if own else node.attr)
    assert not [name for name in names if re.search(r"(?:^|\.)_", name)]
    own_names = {name.removeprefix("sitreg_lumir.") for name in names if name.startswith("sitreg_lumir.")}
    assert own_names and own_names <= set(sitreg_lumir.__all__)


@pytest.mark.slow
@pytest.mark.timeout(900)
@each_notebook
def test_it_runs_in_two_minutes_and_leaves_nothing_behind(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbmake", reason="runs notebooks; pip install '.[dev]'")
    if path.stem in NEED_MEMBERS:
        try:
            default_members()
        except InputError as error:
            pytest.skip(f"registers with the trained members: {error}")
    before = {file: file.stat().st_mtime_ns for file in FOLDER.rglob("*")}
    copy = tmp_path / path.name
    text = path.read_text(encoding="utf-8")
    if path.stem in FEWER_STEPS:
        assert text.count(FEWER_STEPS[path.stem][0]) == 1
        text = text.replace(*FEWER_STEPS[path.stem])
    copy.write_text(text, encoding="utf-8")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # else no pictures
    environment |= {"OMP_WAIT_POLICY": "passive", "IPYTHONDIR": str(tmp_path / "ipython")}
    command = ["-m", "pytest", "--nbmake", "--overwrite", "--nbmake-timeout=800", "-q", "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, *command, f"--rootdir={tmp_path}", "-p", "no:cacheprovider", str(copy)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = json.dumps([cell["outputs"] for cell in cells(copy, "code")])
    assert not [text for text in SHOWN[path.stem] if json.dumps(text)[1:-1] not in shown]
    assert {file: file.stat().st_mtime_ns for file in FOLDER.rglob("*")} == before
    most = MOST_SECONDS / 2 if path.stem in FEWER_STEPS else MOST_SECONDS
    assert (now.ru_utime + now.ru_stime) - (used.ru_utime + used.ru_stime) < most
