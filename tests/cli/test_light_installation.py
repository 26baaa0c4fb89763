"""Without the extra `train` all that concerns two scans is there; what is not says in one line how to get it."""

import subprocess
import sys

from sitreg_lumir.errors import TRAINING_PACKAGES

_WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({sorted(TRAINING_PACKAGES)!r}))\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _WITHOUT + code], capture_output=True, text=True)


def test_what_two_scans_need_is_imported_without_it() -> None:
    modules = (
        "registration.register", "registration.batch", "registration.save", "registration.apply", "report.report",
        "report.sheet", "average.build", "preprocessing.preprocess", "challenge.evaluate", "challenge.submission",
        "challenge.resample_field", "train.doctor", "demo.examples",
    )  # fmt: skip
    done = run(f"import importlib\nfor name in {modules!r}: importlib.import_module('sitreg_lumir.' + name)\n"
               "from sitreg_lumir.preprocessing.template import load_template; load_template()")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_needs_it_says_so_in_one_line() -> None:
    for arguments in (["fit", "--config", "mind"], ["predict", "--data", ".", "-o", "x"], ["demo", "-o", "x"]):
        done = run(f"from sitreg_lumir.cli import main; sys.exit(main({arguments!r}))")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"{arguments[0]}: " in done.stderr and "pip install 'sitreg-lumir[train]'" in done.stderr
    done = run(
        "import sitreg_lumir\ntry: sitreg_lumir.LumirDataModule\nexcept ModuleNotFoundError as error: print(error)"
    )
    assert "pip install 'sitreg-lumir[train]'" in done.stdout
