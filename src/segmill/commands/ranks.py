"""When one process of a run ends, the others end too, with a message: nobody waits for the dead.

A process that waits in a collective operation hears nothing from Python, so a thread looks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from segmill.errors import SegmillError

PERIOD = 0.5  # seconds between two looks
FAILED = 1


class WatchRanks(Callback):
    """The first process looks after those that it started, and they after it."""

    def __init__(self) -> None:
        self._children: list[Any] = []

    def setup(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,  # noqa: ARG002
        stage: str,  # noqa: ARG002
    ) -> None:
        """Start looking, once for each process of the run."""
        if trainer.world_size == 1 or any(
            each.name == "watch-ranks" for each in threading.enumerate()
        ):
            return
        if trainer.local_rank == 0:
            launcher: Any = trainer.strategy.launcher
            children = self._children = [] if launcher is None else list(launcher.procs)
            _start(lambda: _dead_child(children), children)
        else:
            parent = os.getppid()
            _start(lambda: _dead_parent(parent), [])

    def on_exception(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,  # noqa: ARG002
        exception: BaseException,
    ) -> None:
        """Where the collective operation itself fails: say who is gone, not how it failed."""
        if isinstance(exception, RuntimeError) and self._children:
            time.sleep(2 * PERIOD)
            if message := _dead_child(self._children):
                raise SegmillError(message) from exception


def _start(look: Any, children: list[Any]) -> None:
    def watch() -> None:
        while (message := look()) is None:
            time.sleep(PERIOD)
        if message:
            _end(message, children)

    threading.Thread(target=watch, name="watch-ranks", daemon=True).start()


def _dead_child(children: list[Any]) -> str | None:
    """None: all well. Empty: they have finished. Otherwise what to tell the user."""
    codes = [child.poll() for child in children]
    if all(code == 0 for code in codes):
        return ""
    for rank, code in enumerate(codes, start=1):
        if code:
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
            return (
                f"Process {rank} of {len(children) + 1} ended {how} before the run was over, so "
                "the run was stopped. Its own message stands above; without one, look for a device "
                "that ran out of memory, or a machine that did. Finished tasks are kept: go on "
                "with resume=RUN."
            )
    return None


def _dead_parent(parent: int) -> str | None:
    if os.getppid() == parent:
        return None
    rank = os.environ.get("LOCAL_RANK", "?")
    return f"The first process of the run has ended, so process {rank} ends too."


def _end(message: str, children: list[Any]) -> None:
    sys.stderr.write(f"segmill: {message}\n")
    sys.stderr.flush()
    for child in children:
        child.kill()
    # A process inside a collective operation cannot be ended by an exception.
    os._exit(FAILED)
