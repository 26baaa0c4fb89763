"""Standard output and error that never end a computation: closed, full, or of an encoding that lacks a letter."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LenientStream:
    """A text stream that goes on when it cannot be written to; all else is the stream's own.

    Attributes:
        error: the first failure, or None.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes, unless it failed before; the number of characters."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes, unless it failed before."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Any) -> None:
        if self.error is not None:
            return
        try:
            action()
        except OSError as error:
            self.error = error
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # what is still in the stream's buffer goes there
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lenient_streams() -> Iterator[None]:
    """Within the block, standard output and error are lenient; closed ones lead nowhere."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else a result would take the number of a closed stream
        pass
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    try:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the program)
            setattr(sys, name, LenientStream(stream))
        yield
    finally:
        sys.stdout, sys.stderr = before


def lost_output() -> str | None:
    """Why standard output was lost; None if it was written, or if its reader has enough, as `head -1` has."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    return None if error is None or error.errno == errno.EPIPE else str(error.strerror)
