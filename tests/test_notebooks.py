"""The notebooks run from top to bottom, are stored clean, and use what the package shows to everybody."""

import ast
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from sitreg_lumir.errors import InputError
from sitreg_lumir.network.shipped import default_members

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
MOST_CELLS = 15


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["register_two_scans", "score_and_compare", "train_on_t1"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_clean_and_short(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert len(notebook["cells"]) <= MOST_CELLS
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert "/home/" not in path.read_text() and "/work" not in path.read_text() and "/tmp" not in path.read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_uses_the_public_names(path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
                     if cell["cell_type"] == "code")  # fmt: skip
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sitreg_lumir"):
            assert not any(part.startswith("_") for part in (node.module or "").split("."))
            assert not any(alias.name.startswith("_") for alias in node.names)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    try:
        default_members()
    except InputError as error:
        pytest.skip(f"no trained members: {error}")
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = "".join(json.dumps(cell.get("outputs", [])) for cell in notebook.cells)
    assert "Traceback" not in said and "image/png" in said
