"""`segmill convert weights`: the weights of any checkpoint in another format."""

from __future__ import annotations

import logging
from pathlib import Path

from segmill.checkpoint.read import CheckpointError
from segmill.convert.weights import (
    SUFFIXES,
    Array,
    Weights,
    check_out,
    out_file,
    read_weights,
    write_weights,
)
from segmill.errors import SegmillError
from segmill.options import options, suggestion

log = logging.getLogger(__name__)
OPENED_BY = {
    "safetensors": "segmill.load(MODEL, weights={out!r}), or safetensors.torch.load_file",
    "torch": "torch.load({out!r}, weights_only=True)",
    "jittor": "jt.load({out!r})",
}


def run_weights(
    file: Path,
    to: str,
    out: Path | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the weights in `file` in another format; nothing is left behind after an error."""
    if to not in SUFFIXES:
        hint = suggestion(to, SUFFIXES) or "."
        raise SegmillError(f"to={to}: no such format{hint} There are {', '.join(SUFFIXES)}.")
    weights = read_weights(file)
    target = out_file(weights.path, to) if out is None else out
    check_out(target, weights.path, overwrite=overwrite)
    arrays, metadata = dict(weights.arrays), weights.metadata
    if model is not None:
        arrays, metadata = _renamed(weights, model), {}
    write_weights(target, arrays, to, metadata)
    _say_what(weights, target, arrays, to)


def _renamed(weights: Weights, model: str) -> dict[str, Array]:
    """The arrays under the variant's own names, by its key rules; says what would not load."""
    known = options("model")
    if model not in known:
        hint = suggestion(model, known) or ". All: segmill models"
        raise SegmillError(f"model={model}: no such variant{hint}")
    # Only this needs torch, which takes seconds to import.
    from segmill.checkpoint.inspect import Variant, match
    from segmill.checkpoint.keys import apply_rules
    from segmill.checkpoint.load import choose_rules
    from segmill.commands.variants import meta_network

    variant = Variant(model, model, lambda classes: meta_network(model, classes))
    found = match(weights.arrays, variant)
    if not found.report.loaded:
        raise CheckpointError(
            f"{weights.path} shares no name with {model}, so there is nothing to rename. "
            f"segmill weights inspect {weights.path} says which variant it fits."
        )
    _, rules = choose_rules(meta_network(model, found.num_classes or 1), weights.arrays)
    renamed = apply_rules(weights.arrays, rules)
    log.info("names     %s, from those of %s", model, found.keys)
    if found.report.problems:
        log.info("%s", found.report.text())
    return renamed


def _say_what(weights: Weights, out: Path, arrays: dict[str, Array], to: str) -> None:
    values = sum(array.size for array in arrays.values())
    log.info("read      %s", weights.path)
    log.info("wrote     %s (%s): %s arrays, %s values", out, to, len(arrays), f"{values:,}")
    if weights.bfloat16:
        log.info("note      bfloat16 was read as float32, exactly, and is written as float32")
    if to == "jittor" and any(array.dtype.itemsize > 4 for array in arrays.values()):
        log.info("note      Jittor itself reads 64-bit numbers as 32-bit ones")
    if weights.beside:
        log.info(
            "left out  %s: weights only, so training starts at step 0", _listed(weights.beside)
        )
    if weights.metadata and to != "safetensors":
        log.info("left out  the metadata of the file: %s has no place for it", to)
    log.info("opens     %s", OPENED_BY[to].format(out=str(out)))
    log.info("Next: segmill weights inspect %s", out)


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown}, ... ({len(names)})"
