"""`python -m segmill`: how Lightning starts the other ranks of a run."""

import sys

from segmill.cli import main

if __name__ == "__main__":
    sys.exit(main())
