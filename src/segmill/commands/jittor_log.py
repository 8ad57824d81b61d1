"""What a Jittor run logs: metrics.csv in Lightning's form, and W&B where it is asked for."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from segmill.commands.accounts import has_wandb_key
from segmill.commands.run_folder import keep_older_metrics
from segmill.commands.trainer_settings import LoggingSettings, WandbSettings
from segmill.errors import SegmillError
from segmill.files import write_whole

log = logging.getLogger(__name__)


def checked_logging(settings: LoggingSettings) -> LoggingSettings:
    """The same, or an error for what this runtime does not have."""
    if settings.tensorboard:
        raise SegmillError(
            "logging.tensorboard=true: its writer is a part of torch, which runtime=jittor does "
            "without. Use logging.wandb.enabled=true, or metrics.csv, which is always written."
        )
    if settings.wandb.enabled and find_spec("wandb") is None:
        raise SegmillError(
            "logging.wandb.enabled=true, but wandb is not installed in this environment: "
            "pip install wandb."
        )
    return settings


class RunLog:
    """Rows of metrics.csv; every row has a step, and columns may come later."""

    def __init__(self, settings: LoggingSettings, folder: Path) -> None:
        keep_older_metrics(folder)
        self._path = folder / "metrics.csv"
        self._rows: list[dict[str, float]] = []
        self._wandb = _wandb_run(settings.wandb, folder) if settings.wandb.enabled else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row, and write the file anew, whole."""
        self._rows.append({"epoch": 0, "step": step, **values})
        names = dict.fromkeys(name for row in self._rows for name in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names))
        writer.writeheader()
        writer.writerows(self._rows)
        write_whole(self._path, text.getvalue().encode("utf-8"))
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def finish(self) -> None:
        """End the W&B run, so that everything is sent."""
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(settings: WandbSettings, folder: Path) -> Any:
    import wandb  # an option of this environment

    online = settings.mode == "online" or (settings.mode == "auto" and has_wandb_key())
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=folder.name,
        dir=str(folder),
        mode="online" if online else "offline",
    )
