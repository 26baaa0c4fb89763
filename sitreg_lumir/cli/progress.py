"""What long verbs report while they work: messages on standard output, warnings on standard error."""

import logging
import sys


def show_progress() -> None:
    """Shows the package's messages."""
    package = logging.getLogger("sitreg_lumir")
    package.setLevel(logging.INFO)
    package.handlers.clear()
    messages = logging.StreamHandler(sys.stdout)
    messages.addFilter(lambda record: record.levelno < logging.WARNING)
    warned = logging.StreamHandler(sys.stderr)
    warned.setLevel(logging.WARNING)
    for handler in (messages, warned):
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
    package.propagate = False
