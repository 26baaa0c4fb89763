"""The public names: listed, quick to import, typed, and each with an example that runs."""

import ast
import doctest
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import data_samples
import nibabel
import numpy as np
import pytest
import torch
from documents import PAGES, commands

import sitreg_lumir
from sitreg_lumir.cli import main
from sitreg_lumir.demo.examples import labels_of

NAMES = sorted(set(sitreg_lumir.__all__) - {"__version__"})
WITH_EXAMPLES = [name for name in NAMES if not name.isupper()]
PROMISED = {
    "register", "apply", "preprocess", "load_model", "evaluate", "Registration", "LumirDataModule", "MindRegistration",
    "RawRegistration", "NdvPenalty", "GroupConsistency",
}  # fmt: skip
REGISTERS = {"register", "Registration", "SplineMap", "apply", "load_map"}
SLOW = {*REGISTERS, "build_template", "preprocess", "make_demo_data", "predict"}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL

each_name = pytest.mark.parametrize("name", NAMES)


def test_the_names_are_listed() -> None:
    assert set(NAMES) >= PROMISED
    assert dir(sitreg_lumir) == sorted(sitreg_lumir.__all__)
    assert set(sitreg_lumir._HOMES) == set(NAMES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sitreg_lumir.nothing


@each_name
def test_each_name_exists_and_is_documented(name: str) -> None:
    value = getattr(sitreg_lumir, name)
    if name.isupper():
        return
    assert value.__name__ == name
    assert value.__module__ == f"sitreg_lumir.{sitreg_lumir._HOMES[name]}"


def test_type_checkers_see_the_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(sitreg_lumir.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert homes == {name: f"sitreg_lumir.{home}" for name, home in sitreg_lumir._HOMES.items()}
    assert files("sitreg_lumir").joinpath("py.typed").is_file()


@pytest.mark.parametrize(
    "code", ["import sitreg_lumir; dir(sitreg_lumir)", "from sitreg_lumir.cli import command_line; command_line()"]
)
def test_nothing_heavy_is_imported_before_it_is_used(code: str) -> None:
    """Seconds of a processor, since the clock counts what else runs on the machine."""
    show = "import json, sys, time; print(json.dumps([sorted(sys.modules), time.process_time()]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    modules, seconds = json.loads(done.stdout)
    assert not {"torch", "numpy", "lightning", "nibabel", "numba", "matplotlib"} & set(modules)
    assert seconds < 1


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder of the examples: a data set of tiny volumes, a member, a head and its mask."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data_samples.make_dataset(folder / "LUMIR")
        image = nibabel.load(sitreg_lumir.labels_of("EXAMPLE-T1").with_name("example_t1.nii.gz"))
        values, affine = np.asarray(image.dataobj)[::2, ::2, ::2], image.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
        nibabel.save(nibabel.Nifti1Image(values, affine), "head.nii.gz")
        nibabel.save(nibabel.Nifti1Image((values > 0).astype(np.uint8), affine), "head_brain.nii.gz")
        yield folder


def make_member(folder: Path) -> None:
    """``member.ckpt``, trained for a step."""
    arguments = [
        "fit", "--name", "member", "--wandb", "off", "--data.root", "LUMIR", "--data.cache", "cache",
        "--data.batch_size", "1", "--data.pairs_per_epoch", "1", "--data.num_workers", "0", "--trainer.max_epochs", "1",
        "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu",
        "--trainer.log_every_n_steps", "1", "--model.features=[4,4]", "--model.head_features=[4,4]",
        "--model.recompute=false",
    ]  # fmt: skip
    assert main(arguments) == 0
    (folder / "runs/member/checkpoints/last.ckpt").rename(folder / "member.ckpt")


@pytest.mark.timeout(900)  # the first one to ask for it waits for the registration
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in WITH_EXAMPLES]
)
def test_its_example_runs(
    name: str, workplace: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registrations are taken from the one that all tests share."""
    monkeypatch.chdir(workplace)
    if name in REGISTERS:
        folder, registration = request.getfixturevalue("example_registration")
        if not Path("registration").exists():
            Path("registration").symlink_to(folder)
        monkeypatch.setattr(sitreg_lumir, "register", remembered(registration), raising=False)
    if name == "predict" and not Path("member.ckpt").exists():
        make_member(workplace)
    value = getattr(sitreg_lumir, name) if name != "register" else registration_function()
    names = {"sitreg_lumir": sitreg_lumir, "torch": torch, "np": np}
    examples = doctest.DocTestParser().get_doctest(value.__doc__ or "", names, name, None, None)
    assert examples.examples, f"{name} has no example"
    printed: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(examples, out=printed.append)
    assert result.failed == 0, "".join(printed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_on_two_scans_run(
    example_registration: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first command, which the fixture runs, and every `apply` by the folder that it makes, of all pages."""
    monkeypatch.chdir(tmp_path)
    folder, _ = example_registration
    (tmp_path / "registration").symlink_to(folder)
    (tmp_path / "moving_labels.nii.gz").write_bytes(labels_of("EXAMPLE-T2").read_bytes())
    (tmp_path / "lesion.nii.gz").write_bytes(labels_of("EXAMPLE-T2").read_bytes())
    (tmp_path / "moving_flair.nii.gz").write_bytes(labels_of("EXAMPLE-T2").with_name("example_t2.nii.gz").read_bytes())
    (tmp_path / "moving_points.csv").write_text("x,y,z,name\n10,-20,5,here\n-25,-20,30,there\n")
    done = set()
    for page, arguments in [(path, command) for path in PAGES for command in commands(path)]:
        if arguments[:3] == ["apply", "-t", "registration"] and tuple(arguments) not in done:
            assert main(arguments) == 0, f"{page}: {arguments}"
            done.add(tuple(arguments))
    assert len(done) >= 4
    fixed, moved = (
        np.asarray(nibabel.load(path).dataobj)
        for path in (labels_of("EXAMPLE-T1"), tmp_path / "labels_on_fixed.nii.gz")
    )
    dice = [2 * ((fixed == k) & (moved == k)).sum() / ((fixed == k).sum() + (moved == k).sum()) for k in range(1, 10)]
    assert np.mean(dice) > 0.75
    assert "nan" not in (tmp_path / "points_in_fixed.csv").read_text().lower()


def registration_function() -> Any:
    """``register`` itself, not what stands in for it."""
    return sitreg_lumir.__getattr__("register")


def remembered(registration: Any) -> Any:
    """Stands in for ``register`` where the example scans are registered with the defaults."""

    def register(fixed: str, moving: str) -> Any:
        assert (fixed, moving) == ("EXAMPLE-T1", "EXAMPLE-T2")
        return registration

    return register
