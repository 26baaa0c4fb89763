"""A disk that is full in the middle of a file, and a read-only folder: one line, and what was there is whole."""

import shutil
import subprocess
from pathlib import Path

import pytest
import warm_processes
from cli_calls import fit_tiny, predict_arguments

from sitreg_lumir.cli import main
from sitreg_lumir.network.weights import load_members, read_checkpoint

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))  # bytes of a file: as on a full disk
from sitreg_lumir.cli import main
sys.exit(main())
"""


def refused(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("sitreg-lumir: error:")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr


@pytest.mark.parametrize("limit", [1000, 3000])
@pytest.mark.parametrize("verb", ["export", "predict", "evaluate", "submit", "fit"])
def test_a_disk_that_is_full_in_the_middle_of_a_file(
    trained: tuple[Path, Path], tmp_path: Path, verb: str, limit: int
) -> None:
    (root, checkpoint), out = trained, tmp_path / "out"
    fields = root.parent / "fields"
    if verb == "submit" and not fields.exists():
        assert main(predict_arguments(root, checkpoint, fields)) == 0
    commands = {
        "export": ["export", str(checkpoint), "-o", str(out / "member.safetensors")],
        "predict": predict_arguments(root, checkpoint, out),
        "evaluate": ["evaluate", "--identity", "--report", "--data", str(root / "LUMIR_dataset.json"), "-o", str(out)],
        "submit": ["submit", str(fields), "--data", str(root / "LUMIR_dataset.json"), "-o", str(out / "fields.zip")],
        "fit": fit_tiny(root, out, root.parent / "cache"),
    }
    if verb == "predict":
        commands[verb] = [
            part.replace(str(out.parent / "cache"), str(root.parent / "cache")) for part in commands[verb]
        ]
    done = warm_processes.run(commands[verb], tmp_path, None, LIMITED.format(limit=limit))
    refused(done, "cannot be written", "File too large")
    left = [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith(".")]
    assert not left or (verb in ("fit", "evaluate") and all(path.suffix in (".yaml", ".csv", ".json") for path in left))
    if verb != "submit":
        assert main(commands[verb]) == 0


def test_a_full_disk_keeps_the_checkpoint_and_the_member(trained: tuple[Path, Path], tmp_path: Path) -> None:
    root, checkpoint = trained
    member = tmp_path / "member.safetensors"
    shutil.copytree(checkpoint.parents[2], tmp_path / "runs")
    assert main(["export", str(checkpoint), "-o", str(member)]) == 0
    saved = tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt"
    before = {path: path.read_bytes() for path in (saved, member, member.with_suffix(".json"))}
    for arguments in (
        [*fit_tiny(root, tmp_path, root.parent / "cache"), "--resume", "--trainer.max_epochs", "2"],
        ["export", str(checkpoint), "-o", str(member)],
    ):
        refused(warm_processes.run(arguments, tmp_path, None, LIMITED.format(limit=9000)), "cannot be written")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert read_checkpoint(saved)["global_step"] == 2 and len(load_members([member])) == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that the superuser cannot write to, too")
@pytest.mark.parametrize("verb", ["export", "predict", "evaluate", "fit"])
def test_a_folder_that_nobody_may_write_to(trained: tuple[Path, Path], verb: str) -> None:
    root, checkpoint = trained
    out = Path("/proc/self")  # the superuser, too, cannot make files there
    commands = {
        "export": ["export", str(checkpoint), "-o", str(out / "member.safetensors")],
        "predict": predict_arguments(root, checkpoint, out / "x"),
        "evaluate": ["evaluate", "--identity", "--data", str(root / "LUMIR_dataset.json"), "-o", str(out / "x")],
        "fit": fit_tiny(root, out, root.parent / "cache"),
    }
    cache = ["--data.cache", str(root.parent / "cache")] if verb == "predict" else []
    refused(warm_processes.run([*commands[verb], *cache]), "cannot be")
