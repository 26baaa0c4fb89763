"""Where the data set is when the command line does not say it."""

import os
from pathlib import Path

from sitreg_lumir.errors import InputError

VARIABLE = "SITREG_LUMIR_DATA"
_USUAL = Path("data/LUMIR")


def usual_data() -> Path:
    """The data set that ``$SITREG_LUMIR_DATA`` names, else ``data/LUMIR`` in the working folder.

    Raises:
        InputError: there is neither.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    if _USUAL.exists():
        return _USUAL
    raise InputError(
        f"no data set: add --data FOLDER (or its JSON), or set {VARIABLE}; without both, {_USUAL} is taken if it exists"
    )
