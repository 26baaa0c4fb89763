"""Profiles of hypothesis, a dozen cases for every door in `make test` and thousands by `make fuzz`; and the process."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

FOLDER = Path(__file__).resolve().parent
_COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}
settings.register_profile("few", max_examples=12, derandomize=True, **_COMMON)
settings.register_profile("thousands", max_examples=int(os.environ.get("FUZZ_INPUTS", "2000")), **_COMMON)
settings.load_profile("thousands" if os.environ.get("FUZZ_INPUTS") else "few")


class Worker:
    """A process that runs calls of the command line; started again when one ends it.

    Attributes:
        folder: with a valid file for every door, where calls run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tried: dict[str, int] = {}
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: tuple[str, ...]) -> dict[str, Any]:
        """What a call answered; its ``code`` is the signal's name where it ended the process."""
        if self._process is None or self._process.poll() is not None:
            weights = str(self.folder / "w.safetensors")
            self._process = subprocess.Popen(
                [sys.executable, str(FOLDER / "fuzz_worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "SITREG_LUMIR_WEIGHTS": weights},
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"folder": str(self.folder), "arguments": arguments}), file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], 200)[0]:
            self._process.kill()
            return {"code": "hang", "stderr": ""}
        line = self._process.stdout.readline()
        if not line:
            return {"code": f"ended by signal {-self._process.wait()}", "stderr": ""}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
