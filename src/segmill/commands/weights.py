"""`segmill weights inspect`: where a checkpoint comes from and what would load into which model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from segmill.checkpoint.inspect import Inspection, Match, Variant, inspect_file
from segmill.checkpoint.load import find_file
from segmill.configuration import build, compose
from segmill.errors import SegmillError
from segmill.options import config_folders, suggestion

FOLDER = "model/discriminative"


def run_inspect(file: Path, model: str | None = None) -> None:
    """Print what `file` (or a run folder, or a hub id) holds; with `model`, how it fits that."""
    files = {path.stem: path for path in _variant_files()}
    if model is not None and model not in files:
        raise SegmillError(f"model={model}: no such variant{suggestion(model, files)}.")
    names = sorted(files) if model is None else [model]
    inspection = inspect_file(find_file(file), [_variant(name, files) for name in names])
    console = Console(highlight=False, soft_wrap=True)
    for line in _lines(inspection):
        console.print(line, markup=False)


def _lines(inspection: Inspection) -> Iterator[str]:
    yield f"file      {inspection.path}"
    yield f"origin    {inspection.origin}"
    where = " > ".join(inspection.wrappers) or "top level"
    yield f"weights   {inspection.arrays} arrays, {inspection.values:,} values, at {where}"
    if inspection.beside:
        yield f"beside    {', '.join(inspection.beside)}"
    if inspection.training:
        yield f"training  a training state: it has {', '.join(inspection.training)}"
    else:
        yield "training  weights only: training from this file starts at step 0"
    for key, value in inspection.metadata.items():
        yield f"metadata  {key} = {value if len(value) < 100 else value[:97] + '...'}"
    yield from _match_lines(inspection.best, inspection)


def _match_lines(best: Match | None, inspection: Inspection) -> Iterator[str]:
    if best is None:
        yield "model     none of the variants shares a name with this file"
        yield "next      segmill weights inspect FILE model=NAME   (docs/checkpoints.md)"
        return
    exact = "fits exactly" if not best.report.problems else "fits best"
    yield f"model     {best.variant} {exact}, names of {best.keys}"
    if best.num_classes is not None:
        yield f"classes   {best.num_classes}"
    yield ""
    yield from best.report.text().split("\n")
    classes = f", num_classes={best.num_classes}" if best.num_classes is not None else ""
    yield ""
    yield f'next      segmill.load("{best.variant}", weights="{inspection.path}"{classes})'


def _variant_files() -> list[Path]:
    return [path for folder in config_folders() for path in (folder / FOLDER).glob("*.yaml")]


def _variant(name: str, files: dict[str, Path]) -> Variant:
    raw = _raw(files[name], files)
    network = raw["network"]
    head = network.get("decode_head", {}).get("_target_")
    return Variant(
        name, str(head or network.get("_target_", name)), _builder(name, len(raw["mean"]))
    )


def _builder(name: str, channels: int) -> Callable[[int], nn.Module]:
    def network(num_classes: int) -> nn.Module:
        sizes = [f"data.num_classes={num_classes}", f"data.channels={channels}"]
        return build(compose("load", [f"model={name}", *sizes]).model.network)

    return network


def _raw(path: Path, files: dict[str, Path]) -> Any:
    """The YAML over its parent's, unresolved: cheaper than composing every variant."""
    content: Any = OmegaConf.load(path)
    raw: Any = OmegaConf.create({"network": {}, "mean": [None] * 3})
    for parent in content.get("defaults", []):
        name = parent.partition("@")[0].rpartition("/")[2] if isinstance(parent, str) else ""
        if name in files:
            raw = _raw(files[name], files)
    return OmegaConf.merge(raw, content)
