"""`segmill convert config`: a Python config of another code base as an experiment file of ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from segmill.configuration import compose
from segmill.convert import dformer, mmseg, mmseg_data
from segmill.convert.experiment import experiment_text
from segmill.convert.optimizer import optimizer_and_schedule
from segmill.convert.python_config import Config, read_config
from segmill.convert.table import Row, Table, shown
from segmill.errors import SegmillError
from segmill.files import write_whole
from segmill.options import config_folders, fitting, options, suggestion

log = logging.getLogger(__name__)

# Where a recipe starts that no experiment of ours has: without rules for parameters.
PLAIN_OPTIM = {
    ("AdamW", "Poly"): "adamw_poly",
    ("SGD", "Poly"): "sgd_poly_80k",
    ("AdamW", "MultiStep"): "knet_80k",
}
KINDS = ("mapped", "same by default", "check", "dropped", "not read", "no setting")


@dataclass(frozen=True)
class Start:
    """Options of ours that the keys are added to, and what they compose to."""

    options: dict[str, str]
    ours: Mapping[str, Any]


def run_config(
    file: Path,
    out: Path | None = None,
    name: str | None = None,
    model: str | None = None,
    data: str | None = None,
    gpus: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the experiment file, and print what became of every field of the config."""
    if gpus is not None and gpus < 1:
        raise SegmillError(f"gpus={gpus}: this should be 1 or more.")
    config = read_config(file)
    fields = dformer.fields_of(config.values)
    if fields is not None:
        start, table = _dformer(fields, model, data)
    elif isinstance(config.values.get("model"), Mapping):
        start, table = _mmseg(config, file, model, data, gpus)
    else:
        raise SegmillError(
            f"{file} is neither a config of MMSegmentation (which sets `model = dict(...)`) nor of "
            f"DFormer (`C = edict()`, `C.backbone = ...`). It sets: {_listed(config.values)}."
        )
    name = name or file.stem
    target = Path("configs/experiment") / f"{name}.yaml" if out is None else out
    _check_out(target, name, overwrite=overwrite)
    rows = table.rows()
    text = experiment_text(
        title="\n".join(
            [
                f"Converted from {file.name} by segmill convert config.",
                *_open(rows),
                *(f"check: {each}" for each in table.remarks),
            ]
        ),
        options=start.options,
        keys=table.keys,
        name=name,
    )
    write_whole(target, text.encode())
    _print(rows, config, table.remarks, target, name)


def _mmseg(
    config: Config, file: Path, model: str | None, data: str | None, gpus: int | None
) -> tuple[Start, Table]:
    values = config.values
    known = options("model")
    names = mmseg.variant_names(file, config.files[1:]) if model is None else [model]
    chosen = next((each for each in names if each in known), None)
    if chosen is None:
        hint = suggestion(names[-1] if model else names[1], known) or "."
        raise SegmillError(
            f"{'model=' + model if model else file.name} names no model of ours{hint} Say which "
            "one it is with model=NAME; segmill models lists them."
        )
    data = data or mmseg_data.data_name(values)
    recipe = _recipe(chosen, file.stem, data)
    plain = PLAIN_OPTIM.get(optimizer_and_schedule(values))
    if plain is None:
        raise SegmillError("SGD with MultiStepLR has no counterpart: write the recipe by hand.")
    for optim in filter(None, (recipe.get("optim"), plain)):
        start = _start(chosen, data, optim, mmseg.protocol_name(values))
        if _kinds(start.ours) != optimizer_and_schedule(values):
            continue
        table = Table(values, start.ours)
        mmseg.convert(table, path=file, data=data, gpus=gpus)
        rules = table.keys.get("optimizer.rules")
        if rules is None or _can_be_merged(start.ours["optimizer"]["rules"], rules):
            break
    return start, table  # pyright: ignore[reportPossiblyUnboundVariable]  # `plain` always fits


def _can_be_merged(rules: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether `wanted` over `rules` is `wanted`: what Hydra merges, it never takes away."""
    return all(part in wanted and set(rule) <= set(wanted[part]) for part, rule in rules.items())


def _dformer(fields: Mapping[str, Any], model: str | None, data: str | None) -> tuple[Start, Table]:
    known = options("model")
    chosen, set_name, short = dformer.names(fields, known, model=model, data=data)
    if chosen not in known:
        hint = suggestion(chosen, known) or "."
        raise SegmillError(f"model={chosen}: no such model{hint} segmill models lists them.")
    recipe = _recipe(chosen, f"{chosen.partition('_')[0]}_{short}", set_name)
    if not recipe:
        raise SegmillError(
            f"There is no experiment of ours for model={chosen} to compare with. Choose a DFormer "
            "with model=NAME; segmill models dformer lists them."
        )
    start = _start(chosen, set_name, recipe["optim"], recipe.get("protocol", "whole"))
    table = Table(fields, start.ours)
    dformer.convert(table)
    return start, table


def _recipe(model: str, stem: str, data: str) -> dict[str, str]:
    """The options of the experiment of ours that is nearest.

    The same file of the original before the same model and data, and this before the same model.
    """
    best: tuple[int, dict[str, str]] = (0, {})
    for name, option in options("experiment").items():
        paths = (folder / "experiment" / f"{option}.yaml" for folder in config_folders())
        text = next(path.read_text(encoding="utf-8") for path in paths if path.is_file())
        if model not in text:  # parsing all of them takes seconds
            continue
        content: Any = OmegaConf.create(text)
        chosen = _chosen(content)
        if chosen.get("model", "").rpartition("/")[2] == model:
            source = OmegaConf.select(content, "experiment.published.source") or ""
            same_file = stem in (name, Path(str(source)).stem)
            points = 1 + 2 * (chosen.get("data") == data) + 4 * same_file
            best = max(best, (points, chosen), key=lambda each: each[0])
    return best[1]


def _chosen(content: Any) -> dict[str, str]:
    found = {}
    for each in content.get("defaults", []):
        if isinstance(each, Mapping):
            for key, option in each.items():
                found[str(key).removeprefix("override ").lstrip("/")] = str(option)
    return found


def _start(model: str, data: str, optim: str, protocol: str) -> Start:
    fits = fitting("train", "data")
    if data not in fits:
        hint = suggestion(data, fits) or f". There are {', '.join(sorted(fits))}."
        raise SegmillError(f"data={data}: there is no such data set{hint}")
    chosen = {"model": model, "data": data, "optim": optim, "protocol": protocol}
    config = compose("train", [f"{group}={option}" for group, option in chosen.items()])
    ours: Any = OmegaConf.to_container(config, resolve=True)
    return Start({**chosen, "model": options("model")[model]}, ours)


def _kinds(ours: Mapping[str, Any]) -> tuple[str, str]:
    optimizer, schedule = (
        ours[key]["_target_"].rpartition(".")[2] for key in ("optimizer", "schedule")
    )
    return optimizer, schedule


def _check_out(out: Path, name: str, *, overwrite: bool) -> None:
    if out.is_dir():
        raise SegmillError(f"out={out} is a folder. Name a file: out={out}/{name}.yaml")
    if out.exists() and not overwrite:
        raise SegmillError(
            f"{out} exists already. Give another name by name=NAME or out=FILE, or replace it with "
            "overwrite=true."
        )
    if out.stem in options("experiment") and not out.exists() and _is_found(out):
        raise SegmillError(f"There is an experiment {out.stem} already. Say name=NAME.")


def _is_found(out: Path) -> bool:
    """Whether `segmill train experiment=` finds the file from here."""
    return Path("configs/experiment").resolve() == out.parent.resolve()


def _open(rows: Sequence[Row]) -> list[str]:
    """What a reader of the file should know: fields that are to be checked or not read."""
    kept = [row for row in rows if row.what.startswith(("check", "not read"))]
    return [f"{row.field}: {row.what}" for row in kept]


def _print(
    rows: Sequence[Row], config: Config, remarks: Sequence[str], out: Path, name: str
) -> None:
    cells = [(row.field, shown(row.value), row.ours, row.what) for row in rows]
    heads = ("field", "value", "ours", "what")
    widths = [max(len(row[place]) for row in (heads, *cells)) for place in range(3)]
    for row in (heads, *cells):
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        log.info("%s", "  ".join([*padded, row[3]]).rstrip())
    log.info("")
    log.info("Read %s; nothing was run.", ", ".join(str(each) for each in config.files))
    for note in [*config.notes, *remarks]:
        log.info("Note: %s", note)
    counts = {kind: sum(row.what.startswith(kind) for row in rows) for kind in KINDS}
    log.info("%s", ", ".join(f"{count} {kind}" for kind, count in counts.items() if count))
    log.info("Wrote %s", out)
    inside = _is_found(out)
    where = "" if inside else "    # once it lies in configs/experiment of this folder"
    log.info("Next: segmill train experiment=%s --dry-run%s", out.stem if inside else name, where)


def _listed(values: Mapping[str, Any]) -> str:
    names = list(values)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
