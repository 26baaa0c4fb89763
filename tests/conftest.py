"""What all tests share: where stored data lies, two threads, and fixed seeds."""

import os
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from budget import Budget

FOLDER = Path(__file__).resolve().parent
SHARED = FOLDER.parents[1] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Two threads, as on the smallest machine that trains; a single one in each of several processes (pytest-xdist).

    Tests that promise something about threads set their number themselves. Processes that tests start inherit a
    single thread, too.
    """
    beside_others = "PYTEST_XDIST_WORKER" in os.environ
    torch.set_num_threads(1 if beside_others else 2)
    if beside_others:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    config.pluginmanager.register(Budget(), "budget")


# The files that take longest, first: processes that take file after file then end together.
LONGEST = (
    "network/test_threads", "test_notebooks", "test_public", "train/test_final_epochs", "deform/test_cuda_backend",
    "registration/test_register", "cli/test_cli", "train/test_processes", "train/test_memory",
    "deform/test_cpu_backend", "registration/test_optimise", "train/test_variants",
    "challenge/test_submission", "challenge/test_groups",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {FOLDER / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))  # stable: within a file nothing moves


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Each test starts from the same global random states, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries draw from the global state)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with miniLUMIR and LUMIR's lists, beside the clone."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there (miniLUMIR and LUMIR's lists)")
    return SHARED


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The folder with the reference implementation's stored values; ``SITREG_LUMIR_ORACLES`` names another one."""
    folder = Path(os.environ.get("SITREG_LUMIR_ORACLES") or os.environ.get("SITREG_ORACLES") or SHARED / "oracles")
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (stored reference values; SITREG_LUMIR_ORACLES chooses the folder)")
    return folder


@pytest.fixture(scope="session")
def example_registration(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The README's first command, run once: the folder that it wrote, and the Registration that it had.

    What ``register`` and the command line call is watched, since the command line keeps what it returns to itself.
    """
    import documents

    import sitreg_lumir
    from sitreg_lumir.cli import main

    home = import_module(f"sitreg_lumir.{sitreg_lumir._HOMES['register']}")
    original, made = home.register_scans, []

    def register_scans(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        return made[-1]

    folder = tmp_path_factory.mktemp("example") / "registration"
    arguments = documents.commands(documents.README)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "register_scans", register_scans)
        assert main([*arguments[:-1], str(folder)]) == 0
    assert made[0].verdict == "ok"
    return folder, made[0]
