"""`segmill adapt`, for those who start scripts: python scripts/run_tta.py [key=value ...]."""

import sys

from segmill.cli import main

if __name__ == "__main__":
    sys.exit(main(["adapt", *sys.argv[1:]]))
