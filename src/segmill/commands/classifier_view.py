"""How a classifier's images are prepared: as timm's data config of its tag says.

Where `data.view` leaves a key open (null), the classifier's own rule is filled in; what is typed
stays, and is reported where it differs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from omegaconf import DictConfig

from segmill.commands.adapt_refusals import RANDOM, TIMM
from segmill.errors import SegmillError
from segmill.options import options

log = logging.getLogger(__name__)

_RULES = ("crop_pct", "interpolation")


def follow_timm(config: DictConfig, rows: Iterable[DictConfig]) -> None:
    """Complete `data.view` of the run and of its rows; refuse statistics of another classifier."""
    name = _model_name(config)
    if name is None:
        return
    # timm takes seconds to import, and only a classifier needs it.
    from segmill.models.families.image_classifier import published

    timms = published(name)
    if timms is None:
        return  # without published weights nothing says how its images are prepared
    if config.weights == TIMM or (config.weights != RANDOM and "." in name):
        _check_statistics(config, name, timms)
    if config.data.get("view") is None:
        return
    for each in (config, *rows):
        for key in _RULES:
            if each.data.view[key] is None:
                each.data.view[key] = getattr(timms, key)
    _check_view(config, name, timms)


def _model_name(config: DictConfig) -> str | None:
    """timm's name of the classifier; None for other networks, and for a run's own model."""
    if config.run is not None or config.model.get("discriminative") is None:
        return None
    return config.model.discriminative.network.get("model_name")


def _check_statistics(config: DictConfig, name: str, timms: Any) -> None:
    """Without its own mean and std a classifier answers, but worse: nobody would notice."""
    model = config.model.discriminative
    wanted = {"mean": [*timms.mean], "std": [*timms.std]}
    if all([*model[key]] == values for key, values in wanted.items()):
        return
    keys = " ".join(f"model.discriminative.{key}={_typed(each)}" for key, each in wanted.items())
    preset = options("model/discriminative").get(name)
    choose = "" if preset is None else f"model/discriminative={preset}, or "
    text = (
        f"model.discriminative.mean={_typed(model.mean)} and std={_typed(model.std)} are not those "
        f"of {name} in timm's data config. Set {choose}{keys}."
    )
    if config.weights == TIMM:
        raise SegmillError(text)
    log.warning("%s Unless weights=%s was trained with others.", text, config.weights)


def _check_view(config: DictConfig, name: str, timms: Any) -> None:
    view, side = config.data.view, timms.input_size[-1]
    free = "img_size" in config.model.discriminative.network.options
    if timms.fixed_input_size and not free and view.size != side:
        raise SegmillError(
            f"data.view.size={view.size}, but {name} takes images of {side} x {side} only. Set "
            f"data.view.size={side}, or model.discriminative.network.options.img_size."
        )
    wanted = {"size": side, **{key: getattr(timms, key) for key in _RULES}}
    others = [f"data.view.{key}={each}" for key, each in wanted.items() if view[key] != each]
    if timms.crop_mode != "center":
        others.append(f"crop_mode {timms.crop_mode}, which data.view does not do")
    if others:
        log.warning(
            "Images are not prepared as timm's data config of %s says: %s.",
            *(name, ", ".join(others)),
        )


def _typed(values: Sequence[float]) -> str:
    return str([*values]).replace(" ", "")
