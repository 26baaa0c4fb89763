"""A small training, for all tests of the command line that need its checkpoint."""

from pathlib import Path

import data_samples
import pytest
from cli_calls import fit_tiny

from sitreg_lumir.cli import main


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set, and the checkpoint of a short training on it."""
    folder = tmp_path_factory.mktemp("trained")
    root = data_samples.make_dataset(folder / "data")
    assert main(fit_tiny(root, folder, folder / "cache")) == 0
    return root, folder / "runs" / "tiny" / "checkpoints" / "last.ckpt"
