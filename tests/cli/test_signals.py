"""SIGTERM and SIGINT end every verb within five seconds, with 143 and 130, and leave nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm_processes
from cli_calls import fit_tiny, predict_arguments

from sitreg_lumir.cli import main

MOST = 5.0  # seconds

SMALL_VERB = """
import os, subprocess, sys, threading, time
from pathlib import Path
from sitreg_lumir import cli, stop
from sitreg_lumir.io.atomic import writing, writing_together

def ready():
    print("ready", flush=True)

def in_python():
    ready()
    time.sleep(60)

def in_a_long_call():
    import hashlib
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # compiled, minutes long

def swallowing():
    ready()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

def waiting_for_a_thread():
    from concurrent.futures import ThreadPoolExecutor
    ready()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(time.sleep, 60)

def ending():
    import atexit
    atexit.register(time.sleep, 60)
    ready()
    time.sleep(60)

with_child = lambda: (subprocess.Popen(["sleep", "61.25"]), in_a_long_call())

def run(options, rest):
    with writing_together(Path("a.txt"), Path("b.txt")) as files, writing(Path("c.txt")) as last:
        for file in (*files, last):
            file.write_text("half")
        globals()[sys.argv[1]]()

cli._run = lambda argv: run(None, None) or 0
if __name__ == "__main__":
    sys.exit(cli.main())
"""


def wait_for_line(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None and process.stdout.readline() == line


@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("in_python", signal.SIGTERM),
        ("in_python", signal.SIGINT),
        ("in_python", signal.SIGHUP),
        ("in_a_long_call", signal.SIGTERM),
        ("in_a_long_call", signal.SIGINT),
        ("swallowing", signal.SIGTERM),
        ("waiting_for_a_thread", signal.SIGTERM),
        ("ending", signal.SIGTERM),
        ("with_child", signal.SIGTERM),
    ],
)
def test_whatever_the_main_thread_does(tmp_path: Path, how: str, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_VERB, how], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_line(process, "ready\n")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert bool(children) == (how == "with_child")
    start = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - start < MOST
    assert process.returncode == 128 + number
    assert error == f"sitreg-lumir: stopped by {number.name}\n"
    assert list(tmp_path.iterdir()) == []
    for child in children:
        assert not is_running(int(child))


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_renames_that_belong_together_are_finished_first(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from pathlib import Path
from sitreg_lumir import cli
from sitreg_lumir.io import temporary
from sitreg_lumir.io.atomic import writing_together

class System:
    def __getattr__(self, name):
        return getattr(os, name)
    def replace(self, source, target):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        os.replace(source, target)

def run(argv):
    with writing_together(Path("a.txt"), Path("b.txt")) as files:
        for file in files:
            file.write_text("whole")
        temporary.os = System()
    print("not to be seen")

cli._run = run
sys.exit(cli.main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt"}


def test_a_forked_process_keeps_its_signals_to_itself(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from sitreg_lumir import cli

def run(argv):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    time.sleep(0.3)
    return 0

cli._run = run
sys.exit(cli.main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "-15\n", "")


BLOCKED = """
import hashlib, sys
from pathlib import Path
from sitreg_lumir.io import atomic

original, place = atomic.sync_file, Path({place!r})

def blocked(path):
    original(path)
    if place in path.parents:
        Path({ready!r}).touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

atomic.sync_file = blocked
from sitreg_lumir.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("verb", "number"),
    [
        ("fit", signal.SIGINT),
        ("predict", signal.SIGTERM),
        ("predict by two", signal.SIGTERM),
        ("container", signal.SIGTERM),
        ("evaluate", signal.SIGINT),
        ("export", signal.SIGTERM),
    ],
)
def test_a_verb_stopped_while_it_writes(
    trained: tuple[Path, Path], tmp_path: Path, verb: str, number: signal.Signals
) -> None:
    (root, checkpoint), out = trained, tmp_path / "out"
    commands = {
        "fit": fit_tiny(root, tmp_path / "out", tmp_path / "out" / "cache"),
        "predict": predict_arguments(root, checkpoint, out),
        "predict by two": [*predict_arguments(root, checkpoint, out), "--devices", "2", "--device", "cpu"],
        "container": [
            *("container", "--data", str(root / "LUMIR_dataset.json"), "--images", str(root)),
            *("--members", str(checkpoint), "-o", str(out)),
        ],
        "evaluate": ["evaluate", "--identity", "--data", str(root / "LUMIR_dataset.json"), "-o", str(out)],
        "export": ["export", str(checkpoint), "-o", str(out / "member.safetensors")],
    }
    ready = tmp_path / "ready"
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    place = out / "runs" / "tiny" / "checkpoints" if verb == "fit" else out
    code = BLOCKED.format(place=str(place), ready=str(ready))
    if verb == "predict by two":
        code = code.replace("if place", "if False and place")  # they are stopped while they start
    running = warm_processes.start(commands[verb], tmp_path, environment, code)
    deadline = time.monotonic() + 100
    while not ready.exists() and not running.ended() and time.monotonic() < deadline:
        time.sleep(0.05)
        if verb == "predict by two" and len(children_of(running.pid)) >= 2:
            break
    start = time.monotonic()
    os.kill(running.pid, number)
    children = children_of(running.pid)
    ended = running.wait(timeout=60)
    assert time.monotonic() - start < MOST
    assert ended.returncode == 128 + number, ended.stderr[-2000:]
    assert ended.stderr.endswith(f"sitreg-lumir: stopped by {number.name}\n") and "Traceback" not in ended.stderr
    left = [path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.parent == tmp_path / "tmp"]
    assert left == []
    assert not list(out.rglob("*.ckpt")) and not list(out.glob("disp_*")) and not list(out.glob("*.safetensors"))
    assert not any(is_running(child) for child in children)
    if verb == "fit":
        assert main(commands["fit"]) == 0  # the same command starts again


def children_of(process: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True)
    return [int(child) for child in done.stdout.split()]
