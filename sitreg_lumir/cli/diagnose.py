"""The verb that looks at the installation: doctor."""

import argparse
import json

from sitreg_lumir.cli.parsing import Verbs, refuse, verb
from sitreg_lumir.errors import RunStoppedError


def add_doctor(verbs: Verbs) -> None:
    """Adds the verb `doctor`."""
    more = (
        "Shows versions, processors and memory, which code computes deformations and why, the trained members that\n"
        "are used when none are named (their grids, checksums), installed extras and W&B's mode.\n"
        "Exit code 0: two scans can be registered. 1: they cannot; the last lines say why.\n\n"
        "example: sitreg-lumir doctor"
    )
    parser = verb(verbs, "doctor", "Tell what is installed and whether two scans can be registered.", more)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "doctor")
    from sitreg_lumir.train.doctor import examine, lines

    report = examine()
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))
    if not report["ready"]:
        raise RunStoppedError("doctor found what keeps two scans from being registered", 1)
