"""Configs are code: what they may name is checked before anything is imported, and their YAML before it is read."""

import subprocess
import sys
from pathlib import Path

import pytest
from cli_calls import refused

from sitreg_lumir.cli import main

TRAP = "from pathlib import Path\nPath('sprung').touch()\nclass Trap: pass\ndef call(*args, **kwargs): pass\n"
CALLBACK = "trainer: {callbacks: [{class_path: %s}]}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "trap.py").write_text(TRAP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trap", raising=False)
    return tmp_path


def printed(config: str, *more: str) -> list[str]:
    Path("c.yaml").write_text(config)
    return ["fit", "--config", "c.yaml", "--data.root", "data", *more, "--print_config"]


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("model: {class_path: trap.Trap}", ()),
        ("model: {class_path: trap.inner.Trap}", ()),
        (CALLBACK % "trap.Trap", ()),
        ("trainer: {logger: {class_path: trap.Trap}}", ()),
        ("trainer: {plugins: [{class_path: trap.Trap}]}", ()),
        (CALLBACK % "lightning.pytorch.callbacks.LambdaCallback, init_args: {on_fit_start: trap.call}", ()),
        ("{}", ("--model", "trap.Trap")),
        ("{}", ("--model.class_path", "trap.Trap")),
        ("{}", ("--model", "RegistrationModule", "--model.input_transform", "trap.Trap")),
        ("{}", ("--trainer.callbacks+=trap.Trap",)),
    ],
)
def test_code_from_elsewhere_is_refused_before_it_is_imported(
    folder: Path, config: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, printed(config, *more), "trap.", "--allow-imports trap")
    assert not Path("sprung").exists() and "trap" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "subprocess.Popen", "lightning.pytorch.callbacks.lambda_function.os.system",
        "lightning.pytorch.trainer.trainer.os.remove", "torch.hub.load", "builtins.exec",
    ],
)  # fmt: skip
def test_functions_of_other_modules_are_refused_by_any_way(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CALLBACK % f"lightning.pytorch.callbacks.LambdaCallback, init_args: {{on_fit_start: {name}}}"
    refused(capsys, printed(config))


def test_what_is_allowed_is_imported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = CALLBACK % "lightning.pytorch.callbacks.LearningRateMonitor"
    with_exit(["fit", "--config", "minilumir/mind_small", "--data.root", "data", "--print_config"])
    for config in (known, CALLBACK % "NdvPenalty", "{model: {class_path: sitreg_lumir.train.module.RawRegistration}}"):
        with_exit(printed(config))
    own = CALLBACK % "lightning.pytorch.callbacks.LambdaCallback, init_args: {on_fit_start: trap.call}"
    with_exit(printed(own, "--allow-imports", "trap"))
    assert Path("sprung").exists()


def with_exit(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code


BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{chr(98 + level)}: &{chr(98 + level)} [{', '.join([f'*{chr(97 + level)}'] * 9)}]\n" for level in range(9)
)


@pytest.mark.parametrize(
    "config",
    [
        BOMB, "a: &a [*a]", "[" * 5000, "{a: " * 200, "seed_everything: " + "9" * 5000, "seed_everything: .nan",
        "a: 2001-99-99", "? {b: c}\n: 1", "!!python/object/apply:os.system [ls]", "seed_everything: 1e400", "\0",
        "a: !!timestamp x", "a: b: c",
        "model: {class_path: MindRegistration, init_args: {features: [1000000000000, 4]}}",
        "trainer: 3", "model: [1]", "data: x", "model: {class_path: [1]}", "trainer: {callbacks: [{class_path: 7}]}",
        "data: {batch_size: 99999999999999}", "trainer: {max_epochs: many}", "x" * (1 << 21),
    ],
)  # fmt: skip
def test_yaml_that_is_no_config_is_one_line(folder: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(config)
    refused(capsys, ["fit", "--config", "c.yaml", "--data.root", "data", "--runs", "runs"])
    assert not Path("runs").exists()


def test_the_package_is_a_command_that_leaves_the_working_folder_alone(tmp_path: Path) -> None:
    for name in ("typing", "argparse", "torch", "numpy", "difflib", "yaml", "lightning", "nibabel"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    for command in (["sitreg_lumir"], ["sitreg_lumir.cli"]):
        done = subprocess.run(
            [sys.executable, "-m", *command, "apply", "-t", "none.tfm", "--image", "none.nii", "-o", "out.nii"],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2 and "none.tfm: no such file" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "sprung").exists()


def test_lines_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[31m\x07\u202e\x9b2J\r.nii"
    assert main(["apply", "-t", str(tmp_path / name), "--image", "b.nii", "-o", "c.nii"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.rstrip("\n").isprintable() and "\\x1b[31m\\x07\\u202e\\x9b2J" in line
