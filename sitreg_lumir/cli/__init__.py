"""The one command, `sitreg-lumir`. Heavy imports happen only in the verb that needs them."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from sitreg_lumir import __version__
from sitreg_lumir.cli.dataset import add_dataset
from sitreg_lumir.cli.diagnose import add_doctor
from sitreg_lumir.cli.lumir import add_container, add_demo, add_evaluate, add_predict, add_submit
from sitreg_lumir.cli.parsing import with_flags
from sitreg_lumir.cli.register import add_preprocess, add_register
from sitreg_lumir.cli.streams import lenient_streams, lost_output
from sitreg_lumir.cli.template import add_template
from sitreg_lumir.cli.training import add_export, add_fit, add_test, add_validate
from sitreg_lumir.cli.transforms import add_apply, add_resample_field
from sitreg_lumir.errors import InputError, RunStoppedError, StoppedBySignalError, missing_extra, printable
from sitreg_lumir.io.atomic import refusal_of
from sitreg_lumir.stop import leave, obeying_signals, received_signal

DESCRIPTION = """\
SITReg on MIND features: symmetric, inverse consistent, diffeomorphic brain MRI registration.

verbs, each with an example:
  register   register two brain scans, any NIfTI files, both ways at once
             sitreg-lumir register --fixed MNI152 --moving brain.nii.gz -o registration
  preprocess make a LUMIR-like volume of a raw head scan: bias field, skull stripping, alignment to MNI152
             sitreg-lumir preprocess head.nii.gz -o brain.nii.gz
  dataset    make a data set of your own T1 scans, for training
             sitreg-lumir dataset scans -o mine
  apply      move images, label maps and points by transforms, composed and sampled once
             sitreg-lumir apply -t registration --to fixed --labels moving_labels.nii.gz -o labels_on_fixed.nii.gz
  resample-field
             a field on another grid of the same world, most of all a finer one (formerly: carry)
             sitreg-lumir resample-field disp_0100_0101.nii.gz --to fixed_half_mm.nii.gz -o fine/disp_0100_0101.nii.gz
  template   make an unbiased average brain of many scans
             sitreg-lumir template --images brains/*.nii.gz -o average
  fit        train a network
             sitreg-lumir fit --config ens_seed3 --data LUMIR
  validate   score a checkpoint on the validation pairs
             sitreg-lumir validate --config runs/mind/config.yaml --members runs/mind/checkpoints/last.ckpt
  test       the same, by Lightning's test loop
             sitreg-lumir test --config runs/mind/config.yaml --members runs/mind/checkpoints/last.ckpt
  predict    write displacement fields for the pairs of a data set, by one network or an ensemble
             sitreg-lumir predict --members A.ckpt B.ckpt --data LUMIR -o predictions
  evaluate   score a folder of fields by the challenge's definitions
             sitreg-lumir evaluate predictions --data LUMIR/LUMIR_dataset.json
  submit     check a folder of fields and zip it for the challenge
             sitreg-lumir submit predictions --data LUMIR/LUMIR25_dataset.json -o submission.zip
  container  write the fields of the challenge's test phase, as its container does
             sitreg-lumir container --data LUMIR25_dataset.json --images LUMIR --members members -o output
  export     turn a checkpoint into safetensors + JSON
             sitreg-lumir export runs/mind/checkpoints/last.ckpt -o mind.safetensors
  demo       register an example pair; make small data, train, predict, evaluate: in minutes on a CPU
             sitreg-lumir demo -o demo
  doctor     report what is installed and whether two scans can be registered
             sitreg-lumir doctor

`sitreg-lumir VERB --help` tells a verb's options. Configs by name: see `sitreg-lumir fit --list`.
"""

_LONGEST_LINE = 2000
# verbs whose errors may have arguments of functions in backticks; in those of others, backticks are for keys of files
_NAME_ARGUMENTS = ("register", "preprocess", "dataset", "template", "predict", "demo")


def command_line() -> argparse.ArgumentParser:
    """The parser of all verbs; what a verb does is its ``run``."""
    parser = argparse.ArgumentParser(
        "sitreg-lumir",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sitreg-lumir {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, prog="sitreg-lumir")
    for add in (
        add_register, add_preprocess, add_dataset, add_apply, add_resample_field, add_template, add_fit, add_validate,
        add_test, add_predict, add_evaluate, add_submit, add_container, add_export, add_demo, add_doctor,
    ):  # fmt: skip
        add(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; 0 when it worked, 2 for a user's mistake (reported in one line), 3 for a failed registration.

    Where standard output is closed or full, the verb goes on: 1 at the end if it was full. A signal that asks for an
    end is obeyed within seconds, with 128 + its number: half-written files are removed, processes that the verb has
    started ended.
    """
    with lenient_streams():
        code = _obey(argv)
        lost = lost_output()
        if lost:
            print(f"sitreg-lumir: standard output was lost ({lost}); all results are written", file=sys.stderr)
        return 1 if lost and code == 0 else code


def _obey(argv: Sequence[str] | None) -> int:
    """Runs one verb until it has ended or a signal ends it; its exit code."""
    try:
        with obeying_signals():
            try:
                code = _run(argv)
            except BaseException:
                if received_signal() is None:
                    raise
            number = received_signal()
            if number is None:
                return code
            _say_stopped(number)
            if argv is None:  # else the caller's program goes on
                leave(128 + number)
            return 128 + number
    except StoppedBySignalError as stop:  # when the verb had just ended
        _say_stopped(stop.number)
        return 128 + stop.number


def _say_stopped(number: int) -> None:
    print(f"sitreg-lumir: stopped by {signal.Signals(number).name}", file=sys.stderr)


def _run(argv: Sequence[str] | None) -> int:
    """Runs one verb; its exit code."""
    options, rest = command_line().parse_known_args(list(sys.argv[1:] if argv is None else argv))
    run: Callable[[argparse.Namespace, list[str]], int | None] = options.run
    try:
        return run(options, rest) or 0
    except InputError as error:
        message = with_flags(str(error), options) if options.verb in _NAME_ARGUMENTS else str(error)
        print(f"sitreg-lumir: error: {_one_line(message)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        remedy = missing_extra(error)
        if remedy is None:
            raise
        print(f"sitreg-lumir: error: {options.verb}: {remedy}", file=sys.stderr)
        return 2
    except MemoryError as error:
        reason = _one_line(str(error)) or "more than there is was needed"
        print(f"sitreg-lumir: error: {options.verb}: not enough memory ({reason})", file=sys.stderr)
        return 2
    except OSError as error:
        refusal = refusal_of(error)
        if refusal is not None:
            print(f"sitreg-lumir: error: {options.verb}: {_one_line(refusal)}", file=sys.stderr)
            return 2
        if error.filename is None:
            raise
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        print(f"sitreg-lumir: error: {_one_line(name)}: {error.strerror}", file=sys.stderr)
        return 2
    except RunStoppedError as stop:
        if str(stop):
            print(f"sitreg-lumir: {printable(str(stop))}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("\nsitreg-lumir: stopped", file=sys.stderr)
        return 130


def _one_line(message: str) -> str:
    """A message as a line, without what is too much to read of a name or value in its middle."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 500]} ... {line[-500:]}"
