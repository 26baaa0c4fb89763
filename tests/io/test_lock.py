"""Locks: one holder at a time, refused in one line, free as soon as the holder has ended in whatever way."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.lock import lock_if_free, locked

HOLDER = """
import os, sys, time
from pathlib import Path
from sitreg_lumir.io.lock import locked
with locked(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(60)  # outlives the holder
    print("held", flush=True)
    time.sleep(60)
"""


def start_holder(path: Path, how: str = "alone") -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), how], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_second_process_is_refused_until_the_holder_is_killed(tmp_path: Path, how: str) -> None:
    path = tmp_path / ".writing.lock"
    holder = start_holder(path, how)
    try:
        with pytest.raises(InputError, match=r"another process is writing there; wait until") as refusal, locked(path):
            pass
        assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)
        with lock_if_free(path) as free:
            assert not free
        assert path.exists()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked(path):
            pass
        assert not path.exists()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_waiting_ends_when_the_holder_releases(tmp_path: Path) -> None:
    path = tmp_path / ".table.lock"
    order: list[str] = []

    def second() -> None:
        with locked(path, wait=True):
            order.append("second")

    with locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and not path.exists()


def test_no_two_hold_a_lock_whose_file_comes_and_goes(tmp_path: Path) -> None:
    path, inside, most = tmp_path / ".lock", [0], [0]

    def take_turns() -> None:
        for _ in range(50):
            with locked(path, wait=True):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0002)
                inside[0] -= 1

    threads = [threading.Thread(target=take_turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] and not path.exists()


def test_a_free_lock_is_taken_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / ".task.lock"
    path.touch()  # of a process that was killed
    with lock_if_free(path) as free:
        assert free and path.exists()
    assert not path.exists()


def test_a_symlink_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(InputError, match="cannot be written"), locked(tmp_path / ".lock"):
        pass
    assert not target.exists()


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"cannot be written \(No such file"),
        locked(tmp_path / "nowhere" / ".lock", busy="unused"),
    ):
        pass


def test_an_error_in_the_block_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / ".lock"):
        raise ZeroDivisionError
    with lock_if_free(tmp_path / ".lock") as free:
        assert free
