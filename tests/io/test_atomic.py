"""Files and folders appear whole or not at all, whatever ends the process that writes them, and leave nothing."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from sitreg_lumir.errors import InputError
from sitreg_lumir.io import atomic, temporary
from sitreg_lumir.io.atomic import alone, temporary_folder_beside, writing, writing_folder, writing_together

OWN, LAST = ("a.txt", "b.txt", "gone.txt", "summary.json"), "summary.json"


def write_result(folder: Path, text: str, names: tuple[str, ...] = ("a.txt", "b.txt", LAST)) -> None:
    with writing_folder(folder, own=OWN, last=LAST) as content:
        for name in names:
            (content / name).write_text(text)


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def in_child(action: Callable[[], None]) -> int:
    """Runs in a forked process, as a start of its own; its exit code."""
    child = os.fork()
    if child == 0:
        temporary._used.clear()
        code = 1
        try:
            action()
            code = 0
        except InputError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class System:
    """Stands for the module ``os`` in the writer: ends the process, or fails, at one of its operations."""

    OPERATIONS = ("rename", "replace", "unlink", "rmdir", "mkdir", "open", "fsync")

    def __init__(self, at: int, error: int | None) -> None:
        self.at, self.error, self.count = at, error, 0

    def __getattr__(self, name: str) -> object:
        original = getattr(os, name)
        if name not in self.OPERATIONS:
            return original

        def operation(*args: object, **options: object) -> object:
            self.count += 1
            if self.count == self.at:
                if self.error is None:
                    os._exit(99)
                raise OSError(self.error, os.strerror(self.error))
            return original(*args, **options)

        return operation


def write_until_fault(write: Callable[[], None], at: int, error: int | None) -> int:
    def action() -> None:
        system = System(at, error)
        for module in (atomic, temporary):
            module.os = system  # type: ignore[attr-defined]
        write()
        os._exit(50 if system.count < at else 0)  # 50: all operations are behind

    return in_child(action)


@pytest.mark.parametrize("error", [None, 28], ids=["killed", "disk full"])
@pytest.mark.parametrize("before", ["nothing", "empty", "a result", "a result and other files"])
def test_a_folder_is_whole_after_a_fault_at_any_operation(tmp_path: Path, before: str, error: int | None) -> None:
    old, new = dict.fromkeys(("a.txt", "gone.txt", LAST), "old"), dict.fromkeys(("a.txt", "b.txt", LAST), "new")
    for at in range(1, 200):
        folder = tmp_path / str(at) / "out"
        folder.parent.mkdir()
        if before != "nothing":
            folder.mkdir()
        if "result" in before:
            write_result(folder, "old", tuple(old))
        foreign = {"notes.txt": "mine"} if "other" in before else {}
        for name, text in foreign.items():
            (folder / name).write_text(text)
        code = write_until_fault(lambda folder=folder: write_result(folder, "new"), at, error)  # type: ignore[misc]
        clean(folder)
        wholes = [{**new, **foreign}, {**(old if "result" in before else {}), **foreign}]
        left = texts(folder) if folder.exists() else {}
        assert left in wholes, (at, code)
        assert {path.name for path in folder.parent.iterdir()} <= {"out"}, at
        write_result(folder, "new")
        assert texts(folder) == wholes[0]
        if code == 50:
            break
    assert 10 < at < 199


def clean(folder: Path) -> None:
    temporary.clean_leftovers(folder.parent)
    temporary.clean_leftovers(folder)


@pytest.mark.parametrize("error", [None, 28], ids=["killed", "disk full"])
def test_files_that_belong_together_are_of_one_time_after_a_fault(tmp_path: Path, error: int | None) -> None:
    def write(folder: Path, text: str) -> None:
        with writing_together(folder / "x.bin", folder / "x.json") as files:
            for file in files:
                file.write_text(text)

    for at in range(1, 200):
        folder = tmp_path / str(at)
        write(folder, "old")
        code = write_until_fault(lambda folder=folder: write(folder, "new"), at, error)  # type: ignore[misc]
        clean(folder)
        assert texts(folder) in ({"x.bin": text, "x.json": text} for text in ("old", "new")), (at, code)
        if code == 50:
            break
    assert 10 < at < 199


def test_what_a_killed_process_left_goes_at_the_next_start_and_what_lives_stays(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from sitreg_lumir.io.atomic import writing
with writing(Path(sys.argv[1])) as file:
    file.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
        for name in ("killed.txt", "living.txt")
    ]
    try:
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.glob(".sitreg-lumir-*"))) == 2
        running[0].send_signal(signal.SIGKILL)
        running[0].wait()
        assert in_child(lambda: write_text(tmp_path / "next.txt")) == 0
        (left,) = tmp_path.glob(".sitreg-lumir-*")
        assert [path.name for path in (left / "content").iterdir()] == ["living.txt"]
    finally:
        for process in running:
            process.kill()
            process.communicate()


def write_text(path: Path, text: str = "new") -> None:
    with writing(path) as file:
        file.write_text(text)


def test_folders_that_only_look_like_leftovers_stay(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".sitreg-lumir-abcdefgh").symlink_to(tmp_path / "precious")
    (tmp_path / ".sitreg-lumir-mine").mkdir()
    (tmp_path / ".sitreg-lumir-12345678").mkdir()
    (tmp_path / ".sitreg-lumir-12345678" / "file").touch()
    temporary.clean_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4 and (tmp_path / "precious" / "file").exists()


def test_a_list_of_renames_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    planted = tmp_path / "results" / ".sitreg-lumir-abcdefgh"
    (planted / "content").mkdir(parents=True)
    (planted / "lock").touch()
    (tmp_path / "precious").write_text("mine")
    (planted / "commit.json").write_text('{"files": [], "remove": ["../precious"]}')
    temporary.clean_leftovers(tmp_path / "results")
    assert (tmp_path / "precious").read_text() == "mine"


def test_temporary_names_are_random_and_closed_to_others(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with writing(tmp_path / "out.txt") as file:
            place = file.parent.parent
            names.add(place.name)
            assert stat.S_IMODE(place.stat().st_mode) == 0o700 and str(os.getpid()) not in file.name
            file.write_text("x")
    assert len(names) == 3


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_results_have_the_rights_that_the_user_s_mask_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_result(tmp_path / "out", "new")
        write_text(tmp_path / "file.txt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o666 & ~mask


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    write_result(tmp_path / "elsewhere", "old")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    write_result(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink() and set(texts(tmp_path / "elsewhere").values()) == {"new"}


def test_where_names_cannot_be_exchanged_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "_exchange", lambda first, second: False)
    write_result(tmp_path / "out", "old", ("gone.txt", LAST))
    write_result(tmp_path / "out", "new")
    assert texts(tmp_path / "out") == dict.fromkeys(("a.txt", "b.txt", LAST), "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for kill_at in range(1, 60):
        folder = tmp_path / f"out{kill_at}"
        write_result(folder, "old")
        code = write_until_fault(lambda folder=folder: write_result(folder, "new"), kill_at, None)  # type: ignore[misc]
        clean(folder)
        assert set(texts(folder).values()) in ({"old"}, {"new"}), kill_at
        if code == 50:
            break
    assert code == 50


def fail(context: AbstractContextManager[Path], error: Exception) -> None:
    with context as path:
        (path / "a.txt" if path.is_dir() else path).write_text("half")
        raise error


def test_a_full_disk_and_a_missing_right_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out\.txt: cannot be written \(No space left") as refusal:
        fail(writing(tmp_path / "new" / "out.txt"), OSError(28, "No space left on device"))
    assert "\n" not in str(refusal.value) and list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"Not a directory|File exists"), writing(tmp_path / "file" / "out.txt"):
        pass


def test_an_error_leaves_the_former_result_and_no_new_folder(tmp_path: Path) -> None:
    write_result(tmp_path / "out", "old")
    for folder in (tmp_path / "out", tmp_path / "deep" / "er" / "out"):
        with pytest.raises(ZeroDivisionError):
            fail(writing_folder(folder, own=OWN, last=LAST), ZeroDivisionError())
    assert set(texts(tmp_path / "out").values()) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_process_is_refused_where_another_writes(tmp_path: Path) -> None:
    with alone(tmp_path / "out"):
        assert in_child(lambda: alone(tmp_path / "out").__enter__()) == 2
        assert in_child(lambda: alone(tmp_path / "other").__enter__()) == 0
    assert in_child(lambda: alone(tmp_path / "out").__enter__()) == 0
    with alone(tmp_path / "out"):
        pass
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_scratch_folders_are_gone_afterwards(tmp_path: Path) -> None:
    with temporary_folder_beside(tmp_path / "deep" / "out.zip") as scratch:
        (scratch / "big").mkdir()
        assert scratch.is_relative_to(tmp_path / "deep")
    assert list((tmp_path / "deep").iterdir()) == []
