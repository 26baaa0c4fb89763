"""What each part of one `register` costs, in a fresh process: seconds of the clock and of the processors.

    python benchmarks/register_parts.py FIXED MOVING

The first run on a machine also compiles the CPU kernels: run it twice. Parts that `register` does at the same time are
done one after the other here, so that the sum of the clock's seconds is more than `register` takes.
"""

import sys
import tempfile
import time
from pathlib import Path

_last = (time.perf_counter(), time.process_time())


def lap(part: str) -> None:
    """Prints what passed since the last call."""
    global _last
    now = (time.perf_counter(), time.process_time())
    print(f"{part:<42} {now[0] - _last[0]:6.2f} s {now[1] - _last[1]:6.2f} CPU s", flush=True)
    _last = now


def main(fixed: str, moving: str) -> None:
    """Registers a pair step by step."""
    from sitreg_lumir.registration.options import RegisterOptions
    from sitreg_lumir.registration.register import register_scans
    from sitreg_lumir.registration.save import save_registration

    lap("imports")
    from sitreg_lumir.preprocessing.align import _template_levels
    from sitreg_lumir.preprocessing.template import load_template
    from sitreg_lumir.registration.model import load_model

    model = load_model(device="cpu")
    lap("members")
    _template_levels(load_template(), True)
    lap("template")
    registration = register_scans(fixed, moving, None, model, RegisterOptions())
    lap("read, align, predict, measure")
    for part, seconds in registration.summary["seconds"].items():
        print(f"    {part:<38} {seconds:6.2f} s")
    _ = registration.warped
    lap("moving image on the fixed grid")
    _ = registration.warped_fixed
    lap("fixed image on the moving grid")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for outputs in ("warped", "transforms", "map", "picture", "report"):
            save_registration(
                registration, folder / outputs, padding_mm=0, report=True, overwrite=False, outputs=frozenset({outputs})
            )
            size = sum(path.stat().st_size for path in (folder / outputs).iterdir()) / 1e6
            lap(f"writing {outputs}, {size:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
