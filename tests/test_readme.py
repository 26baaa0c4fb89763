"""What the README tells to type works: every command is understood, and those on two scans are run."""

import re
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sitreg_lumir.cli import command_line, main
from sitreg_lumir.demo.examples import labels_of
from sitreg_lumir.train.configs import config_names

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
OPEN_VERBS = ("fit", "validate", "test", "predict")  # they take every setting of data, model and Trainer


def commands() -> list[list[str]]:
    """The arguments of each `sitreg-lumir` line in the README's code blocks."""
    plain, fences = [], 0
    for line in README.read_text().splitlines():
        if line.startswith("```"):
            fences = (fences + 1) % 2
        elif fences:
            plain.append(line)
    lines = "\n".join(plain).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("sitreg-lumir ")]


def test_there_are_commands_and_the_first_registers_the_example() -> None:
    assert len(commands()) > 15
    assert commands()[0][:5] == ["register", "--fixed", "EXAMPLE-T1", "--moving", "EXAMPLE-T2"]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_each_command_is_understood(arguments: list[str]) -> None:
    options, rest = command_line().parse_known_args(arguments)
    assert options.verb in OPEN_VERBS or not rest, rest
    if options.verb == "fit":
        known = set(config_names())
        assert set(options.config) <= known | {"config.yaml"}, options.config
    for argument in rest:
        assert not argument.startswith("--") or re.match(r"--(data|model|trainer)\.\w+", argument), argument


def test_files_that_the_readme_names_exist() -> None:
    text = README.read_text()
    for name in re.findall(r"python (benchmarks/[\w/]+\.py)", text) + re.findall(r"!\[.*?\]\(([^)]+)\)", text):
        assert (ROOT / name).is_file(), name


def test_configs_that_are_named_exist() -> None:
    """In the README, in the configs' own comments, in what the command line says, and in the notebooks."""
    known = set(config_names())
    sources = [README, ROOT / "Makefile", ROOT / "Dockerfile", *(ROOT / "sitreg_lumir/cli").glob("*.py")]
    sources += [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "notebooks").glob("*.ipynb")]
    named = 0
    for source in sources:
        text = source.read_text()
        names = re.findall(r"--config[ =]([\w./-]*\w)", text) + re.findall(r"`(minilumir/\w+)`", text)
        names += re.findall(r"\bconfigs/([\w/]+)\.yaml", text)
        named += len(names)
        for name in names:
            assert name in known or name.endswith("config.yaml"), f"{source.relative_to(ROOT)} names {name}"
    assert named > len(known)
    for file in (ROOT / "configs").rglob("*.yaml"):
        own = re.findall(r"--config[ =]([\w./-]*\w)", file.read_text())
        assert own in ([], [str(file.relative_to(ROOT / "configs").with_suffix(""))]), file


@pytest.mark.slow
def test_the_commands_on_two_scans_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = commands()
    assert main(told[0]) == 0
    assert "verdict: ok" in capsys.readouterr().out
    (tmp_path / "moving_labels.nii.gz").write_bytes(labels_of("EXAMPLE-T2").read_bytes())
    (tmp_path / "moving_points.csv").write_text("x,y,z,name\n10,-20,5,here\n-25,-20,30,there\n")
    for arguments in told:
        if arguments[0] == "apply":
            assert main(arguments) == 0
    fixed, moved = (
        np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
        for path in (labels_of("EXAMPLE-T1"), tmp_path / "labels_on_fixed.nii.gz")
    )
    dice = [2 * ((fixed == k) & (moved == k)).sum() / ((fixed == k).sum() + (moved == k).sum()) for k in range(1, 10)]
    assert np.mean(dice) > 0.75
    assert "nan" not in (tmp_path / "points_in_fixed.csv").read_text().lower()
