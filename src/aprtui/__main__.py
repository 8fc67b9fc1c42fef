"""`python -m aprtui`."""

import sys

from aprtui.cli import main

if __name__ == "__main__":
    sys.exit(main())
