"""The documentation: its code runs, its names exist, and the site builds without a warning and without the network."""

import ast
import csv
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import data_samples
import pytest
import torch
import yaml
from documents import DOCS, PAGES, ROOT, Block, blocks, commands, name_of

import sitreg_lumir
from sitreg_lumir.cli import main
from sitreg_lumir.train.configs import config_names

ADDING = ("loss-term", "variant", "input-transform")
SMALL_SIZES = ["--model.features=[4,4]", "--model.head_features=[4,4]"]
SMALL_RUN = [
    "--wandb", "off", "--data.batch_size", "1", "--data.pairs_per_epoch", "2", "--data.num_workers", "0",
    "--data.cache", "cache", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false",
    "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu",
]  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with data sets of tiny volumes; modules that are imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    data_samples.make_dataset(tmp_path / "LUMIR")
    before = {name: module for name, module in sys.modules.items() if name.startswith("my_")}
    for name in before:
        del sys.modules[name]
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]
    sys.modules.update(before)


def write_files(page: Path, folder: Path) -> None:
    """The files that a page shows, as it shows them."""
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text)


def run_at_once(arguments: list[str]) -> None:
    """A command of a page, on few and small data."""
    small = {"fit": [*SMALL_RUN, *SMALL_SIZES], "predict": ["--data.num_workers", "0", "--data.cache", "cache"]}
    assert main([*arguments, *small[arguments[0]]]) == 0, arguments


@pytest.mark.slow
@pytest.mark.parametrize("name", ADDING)
def test_the_pages_on_adding_things_run_as_they_stand(name: str, workplace: Path) -> None:
    page = DOCS / "contributing" / f"{name}.md"
    write_files(page, workplace)
    shown = commands(page)
    assert shown and shown[0][0] == "fit"
    for arguments in shown:
        run_at_once(arguments)
    made = {path.parts[1] for path in Path("runs").glob("*/checkpoints/last.ckpt")}
    assert made == {arguments[arguments.index("--name") + 1] for arguments in shown if arguments[0] == "fit"}
    if name != "loss-term":
        assert len(list(Path("predictions").glob("disp_*.nii.gz"))) == 3
    if name == "loss-term":
        with Path("runs/small/metrics.csv").open() as stream:
            assert any(row["train/displacement"] for row in csv.DictReader(stream))
    if name == "variant":
        card = torch.load("runs/narrow/checkpoints/last.ckpt", weights_only=True)["sitreg_lumir"]
        assert card["mind"]["sigma"] == 0.7 and card["training"]["variant"] == "NarrowRegistration"


def test_the_backend_of_the_page_agrees_with_plain_torch(workplace: Path) -> None:
    page = DOCS / "contributing" / "backend.md"
    write_files(page, workplace)
    (code,) = [block.text for block in blocks(page) if block.language == "python" and not block.title]
    exec(compile(code, str(page), "exec"), {})


def test_a_data_set_of_ones_own_is_listed_and_trained_on(workplace: Path) -> None:
    page = DOCS / "how-to" / "own-data.md"
    data_samples.make_dataset(workplace / "MINE")
    for old in (workplace / "MINE").glob("*.json"):
        old.unlink()
    (code,) = [block.text for block in blocks(page) if block.title == "list_images.py"]
    exec(compile(code, str(page), "exec"), {})
    dataset = sitreg_lumir.read_dataset("MINE", training=True, validation=True)
    assert len(dataset.training) == 5
    assert [pair.name for pair in dataset.validation] == ["0101_0100", "0102_0101", "0100_0102"]
    arguments = [arguments for arguments in commands(page) if arguments[0] == "fit"][-1]
    assert arguments[-1] == "MINE"
    run_at_once(arguments)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_of_the_pages_uses_public_names(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict)
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sitreg_lumir":
                assert node.attr in sitreg_lumir.__all__, node.attr
            if isinstance(node, ast.ImportFrom) and node.module == "sitreg_lumir":
                assert {alias.name for alias in node.names} <= set(sitreg_lumir.__all__)


def test_the_reference_has_every_public_name_once() -> None:
    text = "".join((DOCS / "reference" / name).read_text() for name in ("python.md", "settings.md"))
    shown = re.findall(r"^::: sitreg_lumir\.(\w+)$", text, re.M)
    assert sorted(shown) == sorted(set(sitreg_lumir.__all__) - {"__version__"})


def test_the_reference_tells_every_environment_variable() -> None:
    text = (DOCS / "reference" / "environment.md").read_text()
    for source in (ROOT / "sitreg_lumir").rglob("*.py"):
        for name in re.findall(r"\bSITREG_[A-Z_]*[A-Z]\b", source.read_text()):
            assert f"`{name}`" in text, f"{source.relative_to(ROOT)}: {name}"


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    """The script that makes pages from the package."""
    path = DOCS / "scripts" / "generated_pages.py"
    columns = os.environ.get("COLUMNS")
    spec = importlib.util.spec_from_file_location("generated_pages", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if columns is None:
        os.environ.pop("COLUMNS", None)
    else:
        os.environ["COLUMNS"] = columns
    return module


def test_the_command_line_reference_has_every_verb_and_option(generated: ModuleType) -> None:
    text = generated.command_line_page()
    assert len(generated.verbs()) >= 14
    for name, parser in generated.verbs().items():
        assert f"\n## {name}\n" in text
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        options = [option for action in parser._actions for option in action.option_strings]
        assert options and all(option in section for option in options)


def test_the_configs_reference_has_every_config(generated: ModuleType) -> None:
    headings = re.findall(r"^## (.+)$", generated.configs_page(), re.M)
    assert headings == config_names()


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="builds the documentation; pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment: dict[str, Any] = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= 40
    fetched = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^\"]+\"")
    for page in pages:
        elsewhere = [tag for tag in fetched.findall(page.read_text()) if 'rel="canonical"' not in tag]
        assert not elsewhere, f"{page.name}: {elsewhere[0]}"
    assert '<h2 id="register"' in (tmp_path / "reference" / "cli.html").read_text()
    assert not list(tmp_path.rglob("*.py"))


def test_blocks_are_found() -> None:
    page = DOCS / "contributing" / "loss-term.md"
    assert [block.title for block in blocks(page)] == ["my_loss.py", "my_loss.yaml", ""]
    assert Block("yaml", "my_loss.yaml", "").language == blocks(page)[1].language
