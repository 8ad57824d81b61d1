"""What an adaptation does not do, and what it lacks here: said before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from segmill.checkpoint.choose import RUN_WEIGHTS
from segmill.checkpoint.load import find_file
from segmill.commands.settings import TTASettings
from segmill.configuration import build
from segmill.errors import SegmillError
from segmill.model_file import read_description
from segmill.protocol import Protocol
from segmill.segmenter import open_segmenter

RANDOM, TIMM = "random", "timm"
WITHOUT = (
    "Methods without a guide (source, bn, tent, eata, sar, cotta, rotta, memo) run with "
    "model.generative=null."
)
_WITH_DEPTH = 4  # channels


def refuse_protocol(protocol: Protocol) -> None:
    """The model learns from the image as the loader gives it, and tables leave absent classes out.

    Windows and several views are refused where the images are read (`TaskData`).
    """
    if protocol.resizes_on_device:
        raise SegmillError(
            f"protocol={protocol.name} resizes the image on the device, after normalisation, and "
            "segmill adapt does not: its methods learn from the image as it is read. Set "
            "protocol=whole, and score the model under this protocol with segmill eval."
        )
    if protocol.pad_divisor is not None:
        raise SegmillError(
            f"protocol.pad_divisor={protocol.pad_divisor}: adaptation takes images as they are. "
            "Set protocol.pad_divisor=null, or protocol.multiple to stretch them."
        )
    if protocol.pad_to is not None:
        raise SegmillError(
            f"protocol.pad_to={list(protocol.pad_to)}: adaptation takes images as they are, or a "
            "model would learn from black borders. Set protocol.pad_to=null."
        )
    if protocol.absent_class == "zero":
        raise SegmillError(
            f"protocol={protocol.name} has protocol.absent_class=zero, which counts classes that "
            "never occur as 0; the tables and intervals of segmill adapt leave them out. Set "
            "protocol.absent_class=drop."
        )


def refuse_dependent(tta: TTASettings) -> None:
    """A part of the tasks can stand alone only where no task depends on another."""
    if tta.continual or tta.mixed:
        raise SegmillError(
            "tasks: with tta.continual or tta.mixed a task depends on the others. Leave it out."
        )


def refuse_channels(config: DictConfig) -> None:
    """A model of colour and depth adapts to images with depth, any other to images without."""
    channels = _channels_of_model(config)
    if channels is None or channels == config.data.channels:
        return
    name = "The model" if config.run is None else f"run={config.run}"
    if channels == _WITH_DEPTH:
        remedy = "Set data.channels=4"
        if "depth" not in config.data:
            remedy = "Choose a data set with depth"
        elif config.data.depth is None:
            remedy += ", and data.depth to the pattern of the depth files (it is null)"
        raise SegmillError(
            f"{name} takes colour and depth, but data.channels={config.data.channels} leaves depth "
            f"out of data={config.data.name}. {remedy}."
        )
    raise SegmillError(
        f"{name} takes {channels} channels and no depth, but data.channels="
        f"{config.data.channels} adds depth to the images of data={config.data.name}. Set "
        "data.channels=3, or choose a model that takes depth."
    )


def refuse_missing(config: DictConfig, *, guided: bool) -> None:
    """Data, weights and guide are looked for together: one answer instead of three tries."""
    missing: list[str] = []

    def look(check: Callable[[], Any]) -> None:
        try:
            check()
        except SegmillError as error:
            missing.append(str(error))

    look(lambda: build(config.data, protocol=build(config.protocol), seed=config.seed))
    if config.run is not None:
        look(lambda: _require_run(config.run))
    elif config.weights is None:
        missing.append(
            "There is no model to adapt: give run=runs/NAME, or weights=FILE for "
            "model/discriminative=NAME."
        )
    elif config.weights == TIMM:
        look(lambda: _require_timm(config.model.discriminative.network))
    elif config.weights != RANDOM:
        look(lambda: _require_file(find_file(config.weights)))
    if guided:
        node = config.model.generative
        target: Any = build({"_target_": node["_target_"], "_partial_": True}).func
        absent = target.missing(**{k: v for k, v in node.items() if k != "_target_"})
        missing += absent
        if absent:
            missing[-1] += f" {WITHOUT}"
    if len(missing) == 1:
        raise SegmillError(missing[0])
    if missing:
        lines = "\n".join(f"  {number}. {each}" for number, each in enumerate(missing, start=1))
        raise SegmillError(
            f"{len(missing)} things are missing here; nothing was started. What to do:\n{lines}"
        )


def _channels_of_model(config: DictConfig) -> int | None:
    """None where there is no model; `refuse_missing` says so."""
    if config.run is not None:
        file = _weights_of(config.run)
        return len(read_description(file).config["mean"]) if file.is_file() else None
    return None if config.weights is None else len(config.model.discriminative.mean)


def _require_run(run: str) -> None:
    if not _weights_of(run).is_file():
        open_segmenter(run)  # says what is wrong with it


def _weights_of(run: str) -> Path:
    path = Path(run)
    return path / RUN_WEIGHTS if path.is_dir() else path


def _require_timm(network: DictConfig) -> None:
    """Of a classifier or a backbone of timm; of others load_weights says what is wrong."""
    from segmill.checkpoint.pretrained import timm_file  # timm takes seconds to import

    name = network.get("model_name") or (network.get("backbone") or {}).get("name")
    if name is not None:
        timm_file(name)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise SegmillError(f"weights={path} does not exist (seen from {Path.cwd()}).")
