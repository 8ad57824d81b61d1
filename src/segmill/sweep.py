"""Several values for a key (`model=a,b seed=0,1`): every combination, one run after the other.

Each run is a process of its own: Lightning starts a run's other ranks with the run's own command
line, and a failed or killed run must not take the rest with it.
"""

from __future__ import annotations

import itertools
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from segmill.configuration import compose, parse_overrides
from segmill.errors import SegmillError

log = logging.getLogger(__name__)
INTERRUPTED = 130


def jobs_of(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every run; lists in brackets and quoted text are single values."""
    choices = []
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    return [list(job) for job in itertools.product(*choices)]


def check_jobs(config: str, jobs: Sequence[Sequence[str]]) -> None:
    """Compose every run first, so that the last one's misspelt key stops the first one too."""
    problems = {}
    for job in jobs:
        try:
            compose(config, job)
        except SegmillError as error:
            problems.setdefault(str(error), shlex.join(job))
    if problems:
        raise SegmillError("\n".join(f"{job}: {text}" for text, job in problems.items()))


def run_jobs(verb: str, jobs: Sequence[Sequence[str]], *, flags: Sequence[str]) -> int:
    """Run all jobs, then list how each ended; the worst exit status is the answer."""
    ended: list[tuple[Sequence[str], int, float]] = []
    for number, job in enumerate(jobs, start=1):
        log.info("Run %d of %d: segmill %s %s", number, len(jobs), verb, shlex.join(job))
        command = [sys.executable, "-m", "segmill", *verb.split(), *job, *flags]
        started = time.perf_counter()
        status = _status(command)
        ended.append((job, status, time.perf_counter() - started))
        if status == INTERRUPTED:
            break
    log.info("%d of %d runs:", len(ended), len(jobs))
    for job, status, seconds in ended:
        word = {0: "ok", INTERRUPTED: "stopped"}.get(status, f"failed ({status})")
        log.info("  %-12s %7.1f s  %s", word, seconds, shlex.join(job))
    failed = next((job for job, status, _ in ended if status not in {0, INTERRUPTED}), None)
    if failed is not None:
        log.info("Next: segmill %s %s --trace", verb, shlex.join(failed))
    return max(abs(status) for _, status, _ in ended)


def _status(command: Sequence[str]) -> int:
    """Exit status of a run. Ctrl-C reaches it too, and it needs time to write last.ckpt."""
    interrupted = False
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
    return INTERRUPTED if interrupted else process.returncode
