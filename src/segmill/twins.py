"""Which class of the Jittor runtime stands for a `_target_`, so that one YAML serves both runtimes.

`segmill.jittor` mirrors the modules that need torch: the twin of segmill.optim.AdamW is
segmill.jittor.optim.AdamW. What needs no framework has no twin and is used as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segmill.errors import SegmillError
from segmill.paths import CONFIGS

RUNTIMES = ("torch", "jittor")
PACKAGE = Path(__file__).resolve().parent
# Below these, everything needs a framework.
FRAMEWORK = (
    "segmill.models.",
    "segmill.optim.",
    "segmill.data.datamodule.",
    "segmill.data.image_datamodule.",
)


def twin_of(target: str) -> str:
    """The Jittor class that stands for `target`, or `target` itself."""
    module, _, name = target.removeprefix("segmill.").rpartition(".")
    if not target.startswith("segmill.") or not _defines(_file_of(module), name):
        return target
    return f"segmill.jittor.{module}.{name}"


def with_twins(config: DictConfig) -> DictConfig:
    """The configuration with every `_target_` replaced by its twin; interpolations stay."""
    found = OmegaConf.create(replaced(OmegaConf.to_container(config, resolve=False)))
    assert isinstance(found, DictConfig)
    return found


def replaced(node: Any) -> Any:
    """The same plain containers with every `_target_` replaced by its twin."""
    if isinstance(node, Mapping):
        return {
            key: twin_of(value) if key == "_target_" else replaced(value)
            for key, value in node.items()
        }
    return [replaced(each) for each in node] if isinstance(node, list) else node


def prepare_runtime(runtime: str) -> None:
    """Refuse a runtime that is not installed here, and say how to get it; start Jittor."""
    if runtime not in RUNTIMES:
        raise SegmillError(f"runtime={runtime}: there are {' and '.join(RUNTIMES)}.")
    if runtime == "jittor" and find_spec("jittor") is None:
        raise SegmillError(
            "runtime=jittor: Jittor is not installed here; it lives apart from torch. `make jittor`"
            " builds its environment, and .cache/jittor/venv/bin/segmill is this command in it."
        )
    if runtime == "torch" and find_spec("torch") is None:
        raise SegmillError(
            "torch is not installed here. segmill train, eval and predict do without it: add "
            f"runtime=jittor (models: {', '.join(jittor_models())}). For everything else install "
            "it: pip install 'segmill[torch]'."
        )
    if runtime == "jittor":
        from segmill.jittor.environment import prepare  # nothing else wants its modules

        prepare()


def require_twins(config: DictConfig | Mapping[str, Any]) -> None:
    """Refuse parts that only torch has, and name the models that Jittor has."""
    tree = OmegaConf.to_container(config) if isinstance(config, DictConfig) else config
    for target in _targets(tree):
        if target.startswith(FRAMEWORK) and twin_of(target) == target:
            raise SegmillError(
                f"runtime=jittor has no {target}. What it has: AdamW, data sets with label maps, "
                f"and the models {', '.join(jittor_models())}. Choose of these, or leave "
                "runtime=jittor out."
            )


def jittor_models() -> list[str]:
    """The variants of which every part has a twin."""
    files = sorted((CONFIGS / "model" / "discriminative").glob("dformer*.yaml"))
    return [file.stem for file in files]


@cache
def _defines(file: Path, name: str) -> bool:
    """Whether the file is there and has a class or function of this name."""
    if not file.is_file():
        return False
    text = file.read_text(encoding="utf-8")
    return re.search(rf"^(class|def) {re.escape(name)}\b", text, re.MULTILINE) is not None


def _file_of(module: str) -> Path:
    return PACKAGE.joinpath("jittor", *module.split(".")).with_suffix(".py")


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_":
                yield str(value)
            else:
                yield from _targets(value)
    elif isinstance(node, list):
        for each in node:
            yield from _targets(each)
