"""Commands and code in processes of their own that need not import everything again: forked from a process that has.

Importing PyTorch and Lightning takes seconds of a processor, several times what a small command does. What is promised
of the start itself (the installed script, what is imported, Lightning's further processes) needs ``cli_calls.shell`` or
``subprocess``; what is promised of any other process, such as how it ends by a signal, can be tested with these.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_SERVER = """
import atexit, gc, json, os, signal, sys, threading, traceback
import torch
import sitreg_lumir.challenge.predict, sitreg_lumir.registration.register, sitreg_lumir.train.run
from sitreg_lumir.cli import main

gc.collect()
gc.freeze()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    call = json.loads(line)
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if child == 0:
            break
        for name, value in (("started", lambda: child), ("ended", lambda: os.waitpid(child, 0)[1])):
            with open(call["folder"] + "/writing", "w") as file:
                file.write(str(value()))
            os.rename(file.name, call["folder"] + "/" + name)
        os._exit(0)
else:
    os._exit(0)

os.setsid()
os.chdir(call["cwd"])
os.environ.clear()
os.environ.update(call["environment"])
for descriptor, path in ((0, os.devnull), (1, call["folder"] + "/stdout"), (2, call["folder"] + "/stderr")):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
sys.stdin = open(os.devnull)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))
sys.argv = ["sitreg-lumir", *call["arguments"]]
try:
    if call["code"] is None:
        sys.exit(main(sys.argv[1:]))
    exec(call["code"], {"__name__": "__main__"})
    code = 0
except SystemExit as stop:
    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
except BaseException:
    traceback.print_exc()
    code = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # taking all modules apart would take longer than most commands
"""


@cache
def _server() -> "subprocess.Popen[str]":
    """It ends when its input does, with this process."""
    return subprocess.Popen([sys.executable, "-P", "-c", _SERVER], stdin=subprocess.PIPE, text=True)


@dataclass(frozen=True)
class Running:
    """A process, the first of a session and of a process group of its own."""

    pid: int
    folder: Path

    def ended(self) -> bool:
        return (self.folder / "ended").is_file()

    def wait(self, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        """How it ended and what it wrote, as of :func:`subprocess.run`."""
        status = int(_wait_for(self.folder / "ended", timeout))
        written = [(self.folder / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(status), *written)


def _wait_for(file: Path, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while not file.is_file():
        assert time.monotonic() < deadline, f"no {file.name} after {timeout} s"
        time.sleep(0.02)
    return file.read_text()


def start(
    arguments: list[str], folder: Path | None = None, environment: dict[str, str] | None = None, code: str | None = None
) -> Running:
    """Starts the command with these arguments in a working folder, or Python code that finds them in ``sys.argv``."""
    place = Path(tempfile.mkdtemp(prefix="warm-process-"))
    call: dict[str, Any] = {"arguments": arguments, "cwd": str(folder or Path.cwd()), "code": code}
    call |= {"environment": dict(os.environ if environment is None else environment), "folder": str(place)}
    stream = _server().stdin
    assert stream is not None
    stream.write(json.dumps(call) + "\n")
    stream.flush()
    return Running(int(_wait_for(place / "started", 300)), place)


def run(arguments: list[str], *settings: Any, timeout: float = 120, **more: Any) -> "subprocess.CompletedProcess[str]":
    """As :func:`start`, and waits until it has ended."""
    return start(arguments, *settings, **more).wait(timeout)
