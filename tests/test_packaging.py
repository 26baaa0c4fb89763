"""The wheel and the sdist hold what they must, and the installed wheel works outside the clone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that has to succeed, away from this process's Python path."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a virtual environment outside the clone with the wheel in it.

    The dependencies are this environment's; its editable install is not seen, since a path that a .pth file
    adds is not searched for further .pth files.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return python.parent


def test_the_wheel_holds_every_config(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"sitreg_lumir/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs
    assert configs <= names
    assert "sitreg_lumir/demo/data.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)


def test_the_sdist_holds_what_the_tests_and_make_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for path in (
        "Makefile",
        "constraints.txt",
        ".ci/run",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "README.md",
    ):
        assert path in names
    assert "tests/test_packaging.py" in names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")} <= names


def test_the_installed_package_is_the_wheel_s(installed: Path, tmp_path: Path) -> None:
    code = "import sitreg_lumir; print(sitreg_lumir.__file__)"
    imported = Path(run(installed / "python", "-c", code, cwd=tmp_path).strip())
    assert imported.is_relative_to(installed.parent)


def test_help_works_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    text = run(installed / "sitreg-lumir", "--help", cwd=tmp_path)
    assert all(verb in text for verb in ("fit", "predict", "evaluate", "demo"))
    assert run(installed / "python", "-m", "sitreg_lumir.cli", "--help", cwd=tmp_path)


def test_a_config_s_name_means_its_file(installed: Path, tmp_path: Path) -> None:
    by_name = run(installed / "sitreg-lumir", "fit", "--config", "ens_seed3", "--print_config", cwd=tmp_path)
    path = ROOT / "configs" / "ens_seed3.yaml"
    by_path = run(installed / "sitreg-lumir", "fit", "--config", path, "--print_config", cwd=tmp_path)
    assert by_name == by_path
    assert "seed_everything: 3" in by_name
