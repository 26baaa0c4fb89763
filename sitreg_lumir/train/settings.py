"""What a process that trains or predicts sets once: less chatter, and memory that is not given back in between."""

import ctypes
import logging
import sys
import warnings

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # parameter numbers of glibc's mallopt


def prepare_process() -> None:
    """Silences what says nothing to users, and keeps freed memory.

    By default glibc hands each large freed block back to the system, and the next one is paid for page by page: on
    a CPU that costs more than the arithmetic of a small operation. Elsewhere than on Linux nothing is set.
    """
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*Checkpoint directory .* exists.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*requires special attention when.*dataloader.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_MMAP_MAX, 0)
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        except (OSError, AttributeError):  # another C library: nothing to set
            return
