"""The verb that makes a data set of one's own scans: dataset."""

import argparse
from collections import Counter
from pathlib import Path

from sitreg_lumir.cli.parsing import Verbs, add_header_options, add_strip, of_arguments, refuse, verb
from sitreg_lumir.errors import InputError

_LISTED = 20  # scans whose errors are printed
MORE = """\
SCANS is a BIDS tree (*_T1w of all subjects and sessions; label maps *_dseg of its derivatives), any other folder of T1
scans (subfolders, too; masks X_mask and label maps X_dseg, X_labels, X_seg beside X), or a CSV with a column image and,
if wanted, subject, mask, labels. All formats that `register` reads. Scans that show the brain alone are recognised;
heads need --strip, or masks.

Each scan is made a LUMIR-like volume as by `preprocess`. OUT gets
  LUMIR_dataset.json      what is trained on, and pairs to validate on: `fit --data OUT` takes it as it is
  images/, labels/        the volumes, and label maps on the same grid where there are some
  made/                   masks, affines, and what each volume was made from
  scans.csv               a row for each scan: subject, training or validation, what was done, or why it failed
Validation subjects are drawn by --seed; all scans of a subject are on one side. Whose a scan is says sub- of its name,
a folder of a few scans, the name without what names a visit, or the column subject of a CSV.

A scan that cannot be used is reported and left out, and the others go on; the exit code is then 2. Started again, what
was prepared from the same file with the same options stays as it is.

example: sitreg-lumir dataset scans -o mine --workers 4
         sitreg-lumir dataset bids --strip --spacing 2 --validation 12 -o mine_2mm
"""


def add_dataset(verbs: Verbs) -> None:
    """Adds the verb `dataset`."""
    parser = verb(verbs, "dataset", "Make a data set of your own T1 scans, for training.", MORE)
    parser.add_argument("source", type=Path, metavar="SCANS", help="folder, BIDS tree, or CSV")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder of the data set")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share the scans (default: 1)"
    )
    add_strip(parser)
    parser.add_argument(
        "--no-bias-correction", dest="bias_correction", action="store_false", help="leave bias fields as they are"
    )
    parser.add_argument(
        "--spacing", type=float, default=1.0, metavar="MM", help="voxel size of the volumes: 1, 2 or 4 (default: 1)"
    )
    parser.add_argument("--labels", type=Path, metavar="FOLDER", help="folder of label maps, named as the scans")
    parser.add_argument(
        "--validation",
        type=int,
        metavar="N",
        help="subjects that are validated on, a pair for each (default: a tenth, 2 to 12)",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the validation subjects (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="prepare scans again that were prepared otherwise")
    add_header_options(parser)
    parser.set_defaults(run=_dataset)


def _dataset(options: argparse.Namespace, rest: list[str]) -> None:
    refuse(rest, "dataset")
    from sitreg_lumir.cli.progress import show_progress
    from sitreg_lumir.preprocessing.dataset import LISTING, DatasetOptions, make_dataset, next_command

    show_progress()
    made = make_dataset(
        options.source,
        options.output,
        options=of_arguments(DatasetOptions, options),
        labels=options.labels,
        validation=options.validation,
        seed=options.seed,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    counts = Counter(row["made"] for row in made.rows)
    training, validation = (
        len({row["subject"] for row in made.rows if row["split"] == split}) for split in ("training", "validation")
    )
    print(f"{len(made.rows)} scans: {counts['now']} prepared, {counts['before']} as before, {len(made.failed)} failed")
    trained = f"training: {made.training} volumes of {training} subjects"
    print(f"{trained}; validation: {made.validation} pairs of {validation} subjects")
    print(f"written: {options.output / LISTING}")
    if training > 1:
        print(f"next: {next_command(options.output, options.spacing)}")
    for row in made.failed[:_LISTED]:
        print(f"failed: {row['error']}")
    if made.failed:
        more = f" (and {len(made.failed) - 1} more, see scans.csv)" if len(made.failed) > 1 else ""
        raise InputError(
            f"{made.failed[0]['error']}{more}; {len(made.failed)} of {len(made.rows)} scans failed, the others are done"
        )
