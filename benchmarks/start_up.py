"""Benchmark 14: how long a command takes before it works. Target of --help and import: 0.3 s.

Wall time of whole processes, interleaved, median and spread; `python -c pass` is the floor, and
`import torch` what every command that builds a model must pay.

    python benchmarks/start_up.py [--repeats 20]
"""

import argparse
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

CASES = {
    "python -c pass": ["-c", "pass"],
    "import segmill": ["-c", "import segmill"],
    "segmill --help": ["-m", "segmill", "--help"],
    "segmill train --help": ["-m", "segmill", "train", "--help"],
    "import torch": ["-c", "import torch"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats: int = parser.parse_args().repeats
    taken: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(repeats):
        for name, arguments in CASES.items():
            taken[name].append(seconds(arguments))
    table = Table(title=f"start-up, {repeats} runs each")
    for column in ("process", "median ms", "fastest", "slowest"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for name, times in taken.items():
        row = (statistics.median(times), min(times), max(times))
        table.add_row(name, *(f"{value * 1e3:.0f}" for value in row))
    Console().print(table)


if __name__ == "__main__":
    main()
