"""`python -m sitreg_lumir.cli` is `sitreg-lumir`."""

import sys

from sitreg_lumir.cli import main

if __name__ == "__main__":
    sys.exit(main())
