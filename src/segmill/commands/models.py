"""`segmill models`: every variant with its size, its published scores and its recipe.

Sizes are read from configs/model/sizes.json (scripts/measure_models.py writes it); a variant that
is not in there, such as the user's own, is measured. Scores are those of the experiment files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from segmill.checkpoint.pretrained import TimmBackbone
from segmill.configuration import build, compose
from segmill.cost import count_flops, count_parameters
from segmill.errors import SegmillError
from segmill.models.encoder_decoder import EncoderDecoder
from segmill.options import config_folders, fitting, options, suggestion
from segmill.paths import CONFIGS

log = logging.getLogger(__name__)

SIZES = CONFIGS / "model" / "sizes.json"
NUM_CLASSES, SIDE = 150, 512
FORMATS = ("table", "markdown")
HEADINGS = ("model", "family", "M parameters", "GFLOPs", "mIoU", "ms+flip", "experiment")
LEFT = (0, 1, 6)  # text; the other columns are numbers
NOTE = (
    f"Sizes at {SIDE} x {SIDE} and {NUM_CLASSES} classes, two operations for each multiply-add. "
    "mIoU in percent, one scale and ms+flip, with pretrained backbones: MMSegmentation's, those of "
    "DFormer its authors'. "
    "`...` stands for the model's name."
)


@dataclass(frozen=True)
class Size:
    """What a variant is, as its built network tells."""

    family: str  # the file in models/families of its head
    parameters: int
    flops: int  # of one image of 512 x 512
    timm: str | None  # what `weights=timm` loads


class Recipe(NamedTuple):
    """An experiment that trains a variant, with what it reached elsewhere if it says so."""

    name: str
    mIoU: float | None  # noqa: N815  (the standard term)
    mIoU_ms_flip: float | None  # noqa: N815
    checkpoint: str | None

    @property
    def best(self) -> float:
        """Recipes are ordered by it: one scale where that was published, else ms+flip, else 0."""
        return self.mIoU or self.mIoU_ms_flip or 0.0


def run(word: str = "", format: str = "table") -> None:
    """List the variants that have `word` in their name or family; of a single one, everything."""
    if format not in FORMATS:
        raise SegmillError(f"format={format}: there are {' and '.join(FORMATS)}.")
    names = _chosen(word)
    console = Console(highlight=False, soft_wrap=True)
    single = len(names) == 1 and format == "table"
    for line in _details(names[0]) if single else _listed(names, format):
        console.print(line, markup=False)


def sizes(names: Sequence[str]) -> dict[str, Size]:
    """From the table, or measured."""
    table = sizes_file()
    return {name: table.get(name) or measured(name) for name in names}


def measured(name: str) -> Size:
    """Build the variant without memory and count."""
    model = _configuration(name)
    with torch.device("meta"):
        network: nn.Module = build(model).network
    trunk: Any = dict(network.named_children()).get("backbone")  # transformers has another name
    known = isinstance(trunk, TimmBackbone) and timm.is_model_pretrained(trunk.name)
    part = network.decode_head if isinstance(network, EncoderDecoder) else network
    return Size(
        family=type(part).__module__.rpartition(".")[2],
        parameters=count_parameters(network),
        flops=count_flops(network, channels=len(model.mean), height=SIDE, width=SIDE),
        timm=trunk.name if known else None,
    )


def write_sizes(names: Sequence[str]) -> None:
    """Measure these variants and write them into the table; what no longer exists leaves it."""
    table = sizes_file()
    for name in names:
        table[name] = measured(name)
        log.info("%s: %s", name, table[name])
    kept = sorted(table.keys() & set(variants()))
    lines = (f"{json.dumps(name)}: {json.dumps(asdict(table[name]))}" for name in kept)
    SIZES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def variants() -> list[str]:
    """Every model that can be trained."""
    return sorted(fitting("train", "model"))


def recipes() -> dict[str, list[Recipe]]:
    """Variant -> its experiments, the highest published score first."""
    found: dict[str, list[Recipe]] = {}
    for name, option in options("experiment").items():
        content: Any = OmegaConf.load(_file("experiment", option))
        chosen = [each["override /model"] for each in content.get("defaults", []) if _model(each)]
        if not chosen:
            continue
        published = content.get("experiment", {}).get("published") or {}
        scores = (published.get(key) for key in ("mIoU", "mIoU_ms_flip", "checkpoint"))
        found.setdefault(chosen[0].rpartition("/")[2], []).append(Recipe(name, *scores))
    for each in found.values():
        each.sort(key=lambda recipe: (-recipe.best, recipe.name))
    return found


def sizes_file() -> dict[str, Size]:
    """What has been measured."""
    rows = json.loads(SIZES.read_text(encoding="utf-8"))
    return {name: Size(**row) for name, row in rows.items()}


def _configuration(name: str) -> Any:
    """The variant's keys for 150 classes and as many channels as it has means."""
    keys = [f"model={name}", f"data.num_classes={NUM_CLASSES}"]
    channels = len(compose("load", [*keys, "data.channels=3"]).model.mean)
    return compose("load", [*keys, f"data.channels={channels}"]).model


def _chosen(word: str) -> list[str]:
    names = variants()
    if word in names:
        return [word]
    family = {name: size.family for name, size in sizes(names).items()}
    found = [name for name in names if word in name or word == family[name]]
    if not found:
        hint = suggestion(word, [*names, *family.values()]) or "."
        raise SegmillError(f"No model has {word!r} in its name{hint} All: segmill models")
    return found


def _listed(names: Sequence[str], format: str) -> Iterator[str]:
    known, by_model = sizes(names), recipes()
    rows = [_row(name, known[name], by_model.get(name, [])) for name in names]
    yield from _markdown(rows) if format == "markdown" else _aligned(rows)
    yield ""
    yield NOTE
    if format == "table":
        yield "Next: segmill models NAME, or segmill train experiment=NAME"


def _row(name: str, size: Size, known: Sequence[Recipe]) -> tuple[str, ...]:
    best = known[0] if known else Recipe("", None, None, None)
    short = best.name.replace(name, "...", 1) if best.name.startswith(name) else best.name
    counts = (f"{size.parameters / 1e6:.2f}", f"{size.flops / 1e9:.1f}")
    return (name, size.family, *counts, _percent(best.mIoU), _percent(best.mIoU_ms_flip), short)


def _percent(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    for row in (HEADINGS, *rows):
        cells = (
            cell.ljust(width) if place in LEFT else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _markdown(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(HEADINGS)} |"
    rule = ("---" if place in LEFT else "---:" for place in range(len(HEADINGS)))
    yield f"| {' | '.join(rule)} |"
    for name, family, *counts, recipe in rows:
        yield f"| {' | '.join((f'`{name}`', family, *counts, f'`{recipe}`' if recipe else ''))} |"


def _details(name: str) -> Iterator[str]:
    size = sizes([name])[name]
    yield f"model       {name}"
    yield from (f"            {line}" for line in _comment(name))
    yield f"family      {size.family}"
    yield f"size        {size.parameters:,} parameters, {size.flops / 1e9:.1f} GFLOPs an image"
    yield f"            of {SIDE} x {SIDE}, {NUM_CLASSES} classes, two a multiply-add"
    loads = f"weights=timm loads {size.timm}" if size.timm else "timm has none for this backbone"
    yield f"pretrained  {loads}"
    known = recipes().get(name, [])
    for each in known:
        yield f"recipe      experiment={each.name}"
        if each.best:
            scores = (each.mIoU, each.mIoU_ms_flip)
            ends = ("", "" if each.mIoU else " (ms+flip)")
            shown = (f"{_percent(s)}{end}" for s, end in zip(scores, ends, strict=True) if s)
            yield f"published   {' / '.join(shown)} mIoU"
            yield f"            {each.checkpoint}"
    yield ""
    keys = OmegaConf.to_container(_configuration(name), resolve=True)
    yield OmegaConf.to_yaml(OmegaConf.create({"model": keys})).rstrip()
    yield ""
    start = f"experiment={known[0].name}" if known else f"model={name} data=NAME"
    yield f"Next: segmill train {start} --dry-run"


def _comment(name: str) -> list[str]:
    """What the variant's file says about itself at its top."""
    text = _file("model", fitting("train", "model")[name]).read_text(encoding="utf-8")
    found = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        found.append(line.lstrip("# "))
    return found


def _file(group: str, option: str) -> Path:
    """The file of an option; the user's own folder comes last and wins."""
    files = [folder / group / f"{option}.yaml" for folder in config_folders()]
    return next(file for file in reversed(files) if file.is_file())


def _model(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "override /model" in entry
