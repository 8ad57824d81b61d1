"""When one process of a run ends, the others end too, with a message: nobody waits for the dead.

A process that waits in a collective operation hears nothing from Python, so a thread looks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy

PERIOD = 0.5  # seconds between two looks
PATIENCE = 4 * PERIOD
FAILED, INTERRUPTED = 1, 130
FIRST = "SEGMILL_FIRST_PROCESS"  # its id, for the processes that it starts
THREAD = "watch-ranks"
# What to tell the user, and the exit status; an empty text means that there is nobody left.
News = tuple[str, int]


class WatchedProcesses(ModelParallelStrategy):
    """Lightning's FSDP2, whose processes look after each other.

    The first process watches those that it has started, and they watch it. Where SLURM or torchrun
    starts them all, these do.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.environ[FIRST] = str(os.getpid())

    def setup_environment(self) -> None:
        """Look from before the processes meet: one may die on its way."""
        launcher: Any = self.launcher
        _watch([] if launcher is None else list(launcher.procs))
        super().setup_environment()

    def on_train_start(self) -> None:
        """SIGTERM ends a process, as everywhere; Lightning would have it join the others first,
        in the middle of what they do together, and wait for ever."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_exception(self, exception: BaseException) -> None:
        """Where an operation failed because another process is gone, the thread says so, and ends
        this one before the operation's own words come out."""
        if isinstance(exception, KeyboardInterrupt):
            _interrupted.set()
        elif isinstance(exception, RuntimeError):
            time.sleep(PATIENCE)


_interrupted = threading.Event()


def _watch(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Start looking, once for each process of the run."""
    if any(each.name == THREAD for each in threading.enumerate()):
        return
    first = int(os.environ.get(FIRST, os.getpid()))
    if children:
        _start(lambda: _of_children(children), children)
    elif first != os.getpid():
        _start(lambda: _of_first(first), [])


def _start(look: Callable[[], News | None], children: Sequence[subprocess.Popen[bytes]]) -> None:
    def watch() -> None:
        while (news := look()) is None:
            time.sleep(PERIOD)
        message, status = news
        if status == INTERRUPTED:  # Ctrl-C reaches all; this process may find its own way out
            time.sleep(PATIENCE)
        if message and not _interrupted.is_set():
            _end(message, status, children)

    threading.Thread(target=watch, name=THREAD, daemon=True).start()


def _of_children(children: Sequence[subprocess.Popen[bytes]]) -> News | None:
    """None: all well."""
    codes = [child.poll() for child in children]
    if all(code == 0 for code in codes):
        return "", 0
    if any(code in (INTERRUPTED, -signal.SIGINT) for code in codes):
        return "Stopped.", INTERRUPTED
    for rank, code in enumerate(codes, start=1):
        if code:
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
            return (
                f"Process {rank}, counted from 0, ended {how} before the run was over, so the "
                "run was stopped. Its own message stands above; without one, look for a device "
                "that ran out of memory, or a machine that did. Finished tasks are kept: go on "
                "with resume=RUN."
            ), FAILED
    return None


def _of_first(first: int) -> News | None:
    if os.getppid() == first:
        return None
    rank = os.environ.get("LOCAL_RANK", "?")
    return f"The first process of the run has ended, so process {rank} ends too.", FAILED


def _end(message: str, status: int, children: Sequence[subprocess.Popen[bytes]]) -> None:
    sys.stderr.write(f"segmill: {message}\n")
    sys.stderr.flush()
    for child in children:
        child.kill()
    # A process inside a collective operation cannot be ended by an exception.
    os._exit(status)
