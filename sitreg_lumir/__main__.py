"""`python -m sitreg_lumir` is `sitreg-lumir`; the package leaves the working folder out of what is imported."""

import sys

from sitreg_lumir.cli import main

if __name__ == "__main__":
    sys.exit(main())
