"""Whatever a file holds, a command ends well or by one line and exit code 2: no traceback, no hang, no gigabytes."""

import os
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed; pip install -e '.[dev]' brings it")

from doors import DOORS, Door, bombs, make
from fuzz_calls import Worker
from hypothesis import given
from hypothesis import strategies as st
from mutations import edited, edits, inside_gzip, inside_zip, with_checksum

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is measured by /proc")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("doors")
    make(folder)
    for suffix in (".safetensors", ".json"):
        shutil.copy(folder / f"whole{suffix}", folder / f"w{suffix}")
    worker = Worker(folder)
    yield worker
    worker.stop()
    if os.environ.get("FUZZ_INPUTS"):
        print("\n| door | inputs tried |\n|---|---|")
        print("\n".join(f"| {door} | {count} |" for door, count in worker.tried.items()))


def check(worker: Worker, door: Door, files: Mapping[str, bytes | Callable[[Path], object]]) -> None:
    """Runs a door's command with other files, which are put back.

    Args:
        worker: that runs it.
        door: of the first file.
        files: the content of each, or what makes it.
    """
    before = {name: (worker.folder / name).read_bytes() for name in files}
    kept = _stamps(worker.folder, files)
    try:
        for name, content in files.items():
            (worker.folder / name).unlink()
            content(worker.folder / name) if callable(content) else (worker.folder / name).write_bytes(content)
        answer = worker.run(door.arguments)
    finally:
        for name, whole in before.items():
            path = worker.folder / name
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(whole)
    lines = [line for line in answer["stderr"].splitlines() if line.strip()]
    assert answer["code"] in (0, 2), (answer["code"], answer["stderr"][-3000:])
    if answer["code"] == 2:
        assert "not enough memory" not in answer["stderr"], answer["stderr"]
        assert door.leaves or _stamps(worker.folder, files) == kept
        errors = [line for line in lines if line.startswith("sitreg-lumir: error: ")]
        assert len(errors) == 1 and lines[-1] == errors[0] and "Traceback" not in answer["stderr"], answer["stderr"]
        assert errors[0].isprintable() and len(errors[0]) < 4000, errors[0]


@pytest.mark.parametrize("name", DOORS)
def test_a_valid_file_goes_through(worker: Worker, name: str) -> None:
    answer = worker.run(DOORS[name].arguments)
    assert answer["code"] == DOORS[name].code, answer["stderr"]


@pytest.mark.parametrize("name", DOORS)
def test_a_changed_file_ends_well_or_in_one_line(worker: Worker, name: str) -> None:
    door = DOORS[name]
    content = (worker.folder / door.file).read_bytes()

    @given(edits(text=door.form == "text"), st.integers(0, 3))
    def change(changes: Any, choice: int) -> None:
        apply = lambda data: edited(data, changes)  # noqa: E731 (passed on)
        if door.form == "gzip" and choice:
            changed = inside_gzip(apply)(content)
        elif door.form.startswith("zip:") and choice:
            compression = zipfile.ZIP_DEFLATED if choice == 1 else zipfile.ZIP_STORED
            record = "/data/0" if choice == 2 else door.form.partition(":")[2]
            changed = inside_zip(apply, record, compression)(content)
        else:
            changed = apply(content)
        files = {door.file: changed}
        if door.beside and choice:
            files[door.beside] = with_checksum((worker.folder / door.beside).read_bytes(), changed)
        worker.tried[name] = worker.tried.get(name, 0) + 1
        check(worker, door, files)

    change()


def _stamps(folder: Path, without: Collection[str]) -> dict[Path, int]:
    """All files and when they were changed."""
    paths = (path for path in folder.rglob("*") if str(path.relative_to(folder)) not in without)
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


NO_FILES: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "nowhere": lambda path: path.symlink_to("nowhere"),
    "itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("name", DOORS)
def test_what_is_no_file_is_refused_and_not_waited_for(worker: Worker, name: str) -> None:
    for make_one in NO_FILES.values():
        check(worker, DOORS[name], {DOORS[name].file: make_one})


@pytest.mark.parametrize("name", bombs())
def test_what_no_machine_holds_is_refused(worker: Worker, name: str) -> None:
    door, content = bombs()[name]
    check(worker, DOORS[door], {DOORS[door].file: content()})
