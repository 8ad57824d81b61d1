"""What `segmill predict` decides before a runtime predicts."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from segmill.errors import SegmillError


def output_folder(config: DictConfig) -> Path:
    """`output_dir`, else `predictions` in the folder of the run or of its file."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    run = Path(config.run)
    if run.is_dir():
        return run / "predictions"
    return (run.parent if run.is_file() else Path()) / "predictions"


def require_depth(run: str, *, channels: int, depth: str | None) -> None:
    """Refuse depth for a model without it, and a model with depth without any."""
    if (channels == 4) != (depth is not None):
        raise SegmillError(
            f"{run} takes {'RGB and depth' if channels == 4 else 'RGB only'}, and "
            f"depth={depth}. A model with depth needs depth=FILE or depth=FOLDER (NAME.png "
            f"for every image); one without it takes none."
        )
