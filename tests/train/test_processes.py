"""Two real processes that train together: whatever ends one of them ends both, in one line."""

import subprocess
import sys
import time
from pathlib import Path

import data_samples
import pytest
from triplet_runs import QUIET, arguments

BROKEN = """
import errno, os, sys
import lightning.pytorch.plugins.io as io
from sitreg_lumir.errors import InputError
from sitreg_lumir.train import module

first = os.environ.get("LOCAL_RANK", "0") == "0"
kind = {kind!r}
clean = module.RegistrationModule.clean
step = module.RegistrationModule.validation_step

def degraded(self, stored):
    image, mask = clean(self, stored)
    if kind == "image" and not first and not self._on_trial and self.global_step == 2:
        image = image * float("nan")
    if kind == "bug" and not first and not self._on_trial and self.global_step == 2:
        raise KeyError("a mistake")
    return image, mask

def unreadable(self, batch, batch_idx):
    if kind == "labels" and not first:
        raise InputError("labelsVal/LUMIRMRI_0101_0000.nii.gz: truncated")
    return step(self, batch, batch_idx)

def full(self, *arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")

module.RegistrationModule.clean = degraded
module.RegistrationModule.validation_step = unreadable
if kind == "disk" and first:
    io.TorchCheckpointIO.save_checkpoint = full

from sitreg_lumir.cli import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""

KINDS = {  # what breaks -> words of the one line, and the exit code
    "image": (("the loss is not finite at step 2", "_0000", "of process 1", "last.ckpt"), 2),
    "labels": (("labelsVal/LUMIRMRI_0101_0000.nii.gz: truncated", "process 1 of 2"), 2),
    "disk": (("last.ckpt: cannot be written (No space left on device)", "--resume", "process 0 of 2"), 2),
    "bug": (("KeyError: 'a mistake'",), 1),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_samples.make_dataset(tmp_path_factory.mktemp("processes") / "data", training=6)


@pytest.mark.slow  # each process imports everything again
@pytest.mark.parametrize("kind", KINDS)
def test_what_ends_one_process_ends_both_in_one_line(root: Path, tmp_path: Path, kind: str) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(kind=kind))
    two = arguments(root, tmp_path / "runs", kind, "--data.batch_size", "2", start=50, epochs=2, pairs=8)
    two[two.index("--trainer.devices") + 1] = "2"
    command = [sys.executable, str(script), *two, "--trainer.strategy", "ddp"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=QUIET, timeout=150)  # both have ended then
    words, code = KINDS[kind]
    assert done.returncode == code, done.stderr[-3000:]
    printed = [line for line in done.stderr.splitlines() if line.startswith("sitreg-lumir:")]
    assert len(printed) == (1 if code == 2 else 0), done.stderr[-3000:]
    text = printed[0] if printed else done.stderr
    for word in words:
        assert word in text, text
    assert ("Traceback" in done.stderr) == (code == 1)
    assert time.monotonic() - started < 120
    assert not list((tmp_path / "runs").rglob(".last.ckpt*")), "nothing half-written"
