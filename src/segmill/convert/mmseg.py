"""MMSegmentation's configs (1.x; of 0.x the names that changed) as keys of ours.

The network is compared part by part (parts.py), data, optimizer and schedule field by field.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segmill.convert.mmseg_data import convert_loader, convert_pipelines, pair
from segmill.convert.optimizer import convert_optimizer, convert_schedule
from segmill.convert.parts import convert_part
from segmill.convert.table import SAME, Table, known_part, part_of, same
from segmill.errors import SegmillError

# Where a file's name ends to be the variant's: `8xb2-160k`, `512x512`, `160k`, `4xb4`.
SCHEDULE = re.compile(r"\d+xb?\d+.*|\d+k")
# The fields that an MMEngine runner reads; any other name is there for them to use.
EFFECTIVE = frozenset(
    {
        *("model", "train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator"),
        *("test_evaluator", "optim_wrapper", "param_scheduler", "train_cfg", "val_cfg", "test_cfg"),
        *("default_hooks", "custom_hooks", "load_from", "resume", "resume_from", "randomness"),
        *("data", "optimizer", "optimizer_config", "lr_config", "runner", "evaluation"),
        *("custom_imports", "tta_pipeline", "tta_model", "model_wrapper_cfg", "strategy"),
        *("compile", "auto_scale_lr", "runner_type"),
    }
)
HOUSE_KEEPING = (
    *("default_scope", "env_cfg", "vis_backends", "visualizer", "log_processor", "log_level"),
    *("work_dir", "dist_params", "workflow", "cudnn_benchmark", "log_config", "checkpoint_config"),
    *("find_unused_parameters", "launcher"),
)
OWN_WAY = {
    "val_dataloader.batch_size": "images of their own size are scored one by one",
    "val_dataloader.num_workers": "data.workers serves validation too",
    "test_dataloader": "as validation; segmill eval split=test",
    "test_evaluator": "as validation",
    "val_evaluator": "mIoU, mAcc, aAcc and every class, as segmill eval prints them",
    "val_cfg": "validation every trainer.val_every steps",
    "test_cfg": "segmill eval",
    "custom_hooks": "no hooks here; see docs/add_a_model.md",
    "default_hooks": "logging, checkpoints and pictures have keys of their own",
    "tta_pipeline": "segmill eval protocol=ms_flip",
    "tta_model": "segmill eval protocol=ms_flip",
    "custom_imports": "nothing is imported",
    "resume": "segmill train resume=RUN",
    "resume_from": "segmill train resume=RUN",
}


def variant_names(path: Path, bases: Sequence[Path]) -> list[str]:
    """What our model may be called, likeliest first: from the file's name, then its bases'."""
    found = []
    for each in (path, *bases):
        words = each.stem.split("_")
        end = next((at for at, word in enumerate(words) if SCHEDULE.fullmatch(word)), len(words))
        name = "_".join(words[:end])
        found += [f"{name}_{words[-1].rpartition('-')[2]}", name]
    return list(dict.fromkeys(found))


def protocol_name(values: Mapping[str, Any]) -> str:
    """The protocol of validation."""
    return "slide" if part_of(values, "model.test_cfg.mode") == "slide" else "whole"


def convert(table: Table, *, path: Path, data: str, gpus: int | None) -> None:
    """Give every field its row and its keys."""
    _intermediate(table)
    _network(table)
    _preprocessor(table)
    _weights(table)
    convert_loader(table, path, gpus)
    convert_pipelines(table, data)
    convert_optimizer(table)
    convert_schedule(table)
    _testing(table)
    table.put("default_hooks.logger.interval", "trainer.log_every", _get(table, "logger"))
    table.put("randomness.seed", "seed", table.get("randomness.seed"))
    for field, why in OWN_WAY.items():
        table.note(field, f"dropped: {why}")


def _get(table: Table, name: str) -> Any:
    return table.get(f"default_hooks.{name}.interval")


def _intermediate(table: Table) -> None:
    """Names that only other fields use, and what is about logging and processes."""
    effective = EFFECTIVE - ({"optimizer"} if "optim_wrapper" in table.fields else set())
    for name in table.fields:
        if name in HOUSE_KEEPING:
            table.note(name, "dropped: house-keeping; see configs/trainer and configs/logging")
        elif name not in effective:
            table.note(name, "no setting of its own: a name that other fields use")
    table.always("auto_scale_lr.enable", False)
    table.note("auto_scale_lr", SAME)


def _network(table: Table) -> None:
    model = "model"
    kinds = ("EncoderDecoder", "CascadeEncoderDecoder")
    table.always("model.type", *kinds)
    convert_part(table, f"{model}.backbone", "model.network.backbone")
    convert_part(table, f"{model}.neck", "model.network.neck")
    heads = table.fields["model"].get("decode_head")
    if isinstance(heads, list | tuple):
        table.always("model.num_stages", len(heads))
        places = ["model.network.coarse_head", "model.network.decode_head"]
        for index, ours in enumerate(places[-len(heads) :]):
            _head(table, f"model.decode_head[{index}]", ours)
    else:
        _head(table, "model.decode_head", "model.network.decode_head")
    extra = table.fields["model"].get("auxiliary_head")
    ours = part_of(table.ours, "model.network.auxiliary_head")
    if _count(extra) != _count(ours):
        raise SegmillError(
            "The config and the chosen model differ in their auxiliary heads "
            f"({_count(extra)} and {_count(ours)}). Choose another one with model=NAME."
        )
    if isinstance(extra, list | tuple):
        for index in range(len(extra)):
            _head(table, f"model.auxiliary_head[{index}]", f"model.network.auxiliary_head[{index}]")
    elif extra is not None:
        _head(table, "model.auxiliary_head", "model.network.auxiliary_head")
    for field in ("model.train_cfg", "model.auxiliary_head"):
        table.note(field, SAME)


def _count(heads: Any) -> str:
    return (
        str(len(heads)) if isinstance(heads, list | tuple) else "none" if heads is None else "one"
    )


def _head(table: Table, theirs: str, ours: str) -> None:
    _loss(table, theirs, ours)
    classes, field = part_of(table.ours, "data.num_classes"), f"{theirs}.num_classes"
    if table.has(field) and table.readable(field):
        fits = same(table.get(field), classes)
        why = SAME if fits else f"check: the data set has {classes} classes, and ours follows it"
        table.note(field, why, "data.num_classes")
    convert_part(table, theirs, ours)


def _loss(table: Table, theirs: str, ours: str) -> None:
    """Cross-entropy with a weight for the head and perhaps one for each class."""
    loss = f"{theirs}.loss_decode"
    if isinstance(part_of(table.fields, loss), list | tuple):
        table.note(loss, "dropped: several losses; ours is the family's own")
        return
    table.always(f"{loss}.type", "CrossEntropyLoss")
    table.always(f"{loss}.use_sigmoid", False)
    table.always(f"{loss}.avg_non_ignore", False)
    weight = f"{loss}.loss_weight"
    coarse = f"{ours.rpartition('.')[0]}.coarse_weight"
    if ".auxiliary_head" in theirs:
        table.put(weight, "model.network.auxiliary_weight", table.get(weight))
    elif ours.endswith(".coarse_head") and known_part(table.ours, coarse):
        table.put(weight, coarse, table.get(weight))
    else:
        table.always(weight, 1.0)
    if ours == "model.network.decode_head":
        place = f"{loss}.class_weight"
        table.put(place, "model.network.class_weight", table.get(place))
    if table.has(f"{theirs}.sampler"):
        table.note(f"{theirs}.sampler", "dropped: all pixels count in the loss")


def _preprocessor(table: Table) -> None:
    """Mean and standard deviation of pixels in 0..1, in RGB."""
    for place in ("model.data_preprocessor", "data_preprocessor"):
        for name in ("mean", "std"):
            values = table.get(f"{place}.{name}")
            if place == "model.data_preprocessor" and values is not None:
                ours = [round(value / 255, 6) for value in values]
                table.put(f"{place}.{name}", f"model.{name}", ours)
    place = "model.data_preprocessor"
    table.always(f"{place}.type", "SegDataPreProcessor")
    if table.get(f"{place}.bgr_to_rgb") is False:
        table.put(f"{place}.bgr_to_rgb", "model.channel_order", "bgr")
    table.always(f"{place}.bgr_to_rgb", True)
    table.always(f"{place}.pad_val", 0)
    table.always(f"{place}.seg_pad_val", 255)
    table.note(f"{place}.size", f"{SAME}: the crop's")
    divisor = f"{place}.test_cfg.size_divisor"
    table.put(divisor, "protocol.pad_divisor", table.get(divisor))


def _weights(table: Table) -> None:
    """A file becomes `weights`; addresses are left to the user."""
    full = table.get("load_from")
    if full:
        _source(table, "load_from", full, backbone=False)
    for field in ("model.pretrained", "model.backbone.init_cfg.checkpoint"):
        source = table.get(field)
        if source and not full:
            _source(table, field, source, backbone=True)
        elif source is None and field in table.leaves:
            table.always(field, None)
    table.note("model.backbone.init_cfg", SAME)
    table.note("load_from", SAME)


def _source(table: Table, field: str, source: str, *, backbone: bool) -> None:
    if "://" in source:
        table.note(
            field,
            "check: not downloaded; say weights=FILE or weights=timm, else training starts from "
            "random weights",
            "weights",
        )
        return
    table.set("weights", source)
    if backbone:
        table.set("weights_may_miss", [r"(?!backbone\.).*"])
        table.set("weights_may_leave", [r"(?!backbone\.).*"])
    table.note(field, "check: the file must be there; its names are matched", f"weights={source}")


def _testing(table: Table) -> None:
    """The protocol of validation: whole images or windows."""
    place = "model.test_cfg"
    table.always(f"{place}.mode", "whole", "slide")
    table.put(f"{place}.crop_size", "protocol.window", pair(table.get(f"{place}.crop_size")))
    table.put(f"{place}.stride", "protocol.stride", pair(table.get(f"{place}.stride")))
    for theirs in ("train_cfg.val_interval", "evaluation.interval"):
        table.put(theirs, "trainer.val_every", table.get(theirs))
    table.note("evaluation", SAME)
    table.note("model.test_cfg", SAME)
