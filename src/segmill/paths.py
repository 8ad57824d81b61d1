"""Where the Hydra tree lies: beside the package in a wheel, at the root in a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
CONFIGS = (
    _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parents[1] / "configs"
)
