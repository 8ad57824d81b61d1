"""Write configs/model/sizes.json, which `segmill models` reads: python scripts/measure_models.py.

With names of variants it measures only these and keeps the other rows.
"""

import logging
import sys

from segmill.commands.models import variants, write_sizes

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_sizes(sys.argv[1:] or variants())
