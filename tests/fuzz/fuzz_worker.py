"""A process that runs the command line on one set of arguments after another, in bounded memory and time.

It reads a line of JSON for each call and answers with one: exit code, standard error, seconds, and memory at most.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

MEMORY = 3 << 30
"""Bytes of address space that a call may take beyond what the libraries take."""

SECONDS = 20
"""Processor time that a call may take."""


class TooSlowError(BaseException):
    """A call took longer than it may."""


def call(arguments: list[str]) -> dict[str, Any]:
    from sitreg_lumir.cli import main

    def stop(number: int, frame: Any) -> None:
        raise TooSlowError

    with tempfile.TemporaryFile() as stream:
        saved = os.dup(2)
        os.dup2(stream.fileno(), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 (closed below)
        signal.signal(signal.SIGVTALRM, stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        start = time.process_time()
        code: Any
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:
            code = type(error).__name__
            traceback.print_exc()
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
        seconds = time.process_time() - start
        stream.seek(0)
        return {"code": code, "stderr": stream.read().decode(errors="replace"), "seconds": round(seconds, 3)}


def run() -> None:
    import torch

    import sitreg_lumir.train.run  # noqa: F401 (before the limit)

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        request = json.loads(line)
        os.chdir(request["folder"])
        print(json.dumps(call(request["arguments"])), file=answers, flush=True)


if __name__ == "__main__":
    run()
