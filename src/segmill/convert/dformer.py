"""The official DFormer configs (`C.lr = 6e-5` on an EasyDict) as keys of ours.

What the fields mean is the official code's, not their names': several are read by nobody.
"""

from collections.abc import Mapping
from typing import Any

from segmill.convert.expressions import Attributes, Unread
from segmill.convert.table import SAME, Table, known_part, part_of
from segmill.errors import SegmillError

BACKBONES = {
    **{f"DFormer-{size}": f"dformer-{size.lower()}" for size in ("Tiny", "Small", "Base", "Large")},
    **{f"DFormerv2_{size}": f"dformerv2-{size.lower()}" for size in ("S", "B", "L")},
}
DATA = {"NYUDepthv2": ("nyu_depth_v2", "nyu"), "SUNRGBD": ("sunrgbd", "sun")}
FILES = (
    *("rgb_root_folder", "rgb_format", "gt_root_folder", "gt_format", "x_root_folder", "x_format"),
    *("train_source", "eval_source", "is_test", "num_train_imgs", "num_eval_imgs", "class_names"),
)
UNUSED = {
    "momentum": "AdamW has none; betas are 0.9 and 0.999",
    "fix_bias": "read by nothing in the official code",
    "eval_iter": "read by nothing; validations are trainer.validation",
    "eval_scale_array": "read by nothing: the official scripts fix five scales; segmill eval "
    "protocol=...",
    "eval_flip": "the protocol says it: segmill eval protocol=...",
    "checkpoint_step": "read by nothing: the best and the last checkpoint are kept",
    "root_dir": "a part of data.data_root",
    "abs_dir": "paths are the command line's",
}
LATE = "trainer.validation.each_after"
STORE = ("log_dir", "tb_dir", "log_dir_link", "checkpoint_dir", "log_file", "link_log_file")
STORE = (*STORE, "val_log_file", "link_val_log_file")


def fields_of(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The EasyDict of a DFormer config, None for any other."""
    found = (each for each in values.values() if isinstance(each, Attributes))
    return next((each for each in found if "backbone" in each), None)


def names(
    fields: Mapping[str, Any],
    known: Mapping[str, Any],
    *,
    model: str | None,
    data: str | None,
) -> tuple[str, str, str]:
    """Our model, our data set and its short name ("" if it has none); `model` and `data` win.

    The model has a YAML of its own where SUN's sizes differ. `known`: the models that exist.
    """
    backbone, dataset = fields.get("backbone"), fields.get("dataset_name")
    if model is None and backbone not in BACKBONES:
        raise SegmillError(
            f"C.backbone is {_shown(backbone)}; known are {', '.join(BACKBONES)}. Say model=NAME."
        )
    if data is None and dataset not in DATA:
        raise SegmillError(
            f"C.dataset_name is {_shown(dataset)}; known are {', '.join(DATA)}. Say data=NAME."
        )
    own, short = DATA.get(str(dataset), (data or "", dict(DATA.values()).get(str(data), "")))
    if model is None:
        model = BACKBONES[str(backbone)]
        special = f"{model}_{short}"
        model = special if special in known else model
    return model, data or own, short


def _shown(value: Any) -> str:
    return f"not read ({value})" if isinstance(value, Unread) else repr(value)


def convert(table: Table) -> None:
    """Give every field its row and its keys."""
    backbone = str(table.get("backbone"))
    table.note("backbone", "mapped", f"model={BACKBONES.get(backbone, '?')}")
    table.note("dataset_name", "mapped", f"data={part_of(table.ours, 'data.name')}")
    _network(table)
    _data(table)
    _training(table)
    for name, why in UNUSED.items():
        table.note(name, f"dropped: {why}")
    for name in STORE:
        table.note(name, "dropped: a run has one folder, output_dir/experiment.name")


def _network(table: Table) -> None:
    head = "model.network.decode_head"
    table.always("decoder", "ham")
    table.put("decoder_embed_dim", f"{head}.channels", table.get("decoder_embed_dim"))
    rate = table.get("drop_path_rate")
    table.put("drop_path_rate", "model.network.backbone.drop_path_rate", rate)
    table.always("aux_rate", 0.0)
    table.always("bn_eps", 1e-3)
    table.always("bn_momentum", 0.1)
    weights = table.get("pretrained_model")
    if weights:
        table.set("weights", weights)
        table.set("weights_may_miss", [r"decode_head\..*"])  # a pretraining file has the trunk
        table.note("pretrained_model", "check: the file must be there", f"weights={weights}")


def _data(table: Table) -> None:
    data = part_of(table.ours, "data.name")
    table.put("dataset_path", "data.data_root", table.get("dataset_path"))
    table.always("num_classes", part_of(table.ours, "data.num_classes"))
    table.always("background", 255)
    table.always("gt_transform", True)
    table.always("x_is_single_channel", True)
    crop = [table.get("image_height"), table.get("image_width")]
    if None not in crop:
        table.set("data.crop", crop)
        for name in ("image_height", "image_width"):
            what = "mapped" if "data.crop" in table.keys else SAME
            table.note(name, what, f"data.crop={crop}")
    for name, ours in (("norm_mean", "mean"), ("norm_std", "std")):
        values = table.get(name)
        known = part_of(table.ours, f"model.{ours}")
        if values is not None and known is not None:
            table.put(name, f"model.{ours}", [*values, *known[len(values) :]])
    if part_of(table.ours, "data.transform"):
        factors = table.get("train_scale_array", [1.0])  # without, the official code does not scale
        table.put("train_scale_array", "data.transform.factors", factors)
    else:
        table.note("train_scale_array", f"dropped: data={data} has data.scale and data.ratio")
    if part_of(table.ours, "protocol.window"):
        table.always("eval_crop_size", part_of(table.ours, "protocol.window"))
    table.note("eval_crop_size", "dropped: the protocol has no windows")
    table.always("eval_stride_rate", 2 / 3)
    for name in FILES:
        table.note(name, f"{SAME}: data={data} says where files lie")


def _training(table: Table) -> None:
    kind = str(table.get("optimizer"))
    if kind != "AdamW":
        raise SegmillError(f"C.optimizer is {kind}; the recipe of DFormer here has AdamW only.")
    table.note("optimizer", SAME, str(part_of(table.ours, "optimizer._target_")))
    for theirs, ours in (
        ("lr", "optimizer.learning_rate"),
        ("weight_decay", "optimizer.weight_decay"),
        ("lr_power", "schedule.power"),
        ("batch_size", "data.batch_size"),
        ("num_workers", "data.workers"),
    ):
        table.put(theirs, ours, table.get(theirs))
    length, epochs = table.get("niters_per_epoch"), table.get("nepochs")
    if length and epochs:
        steps = length * epochs
        table.put("nepochs", "trainer.max_steps", steps)
        if known_part(table.ours, "trainer.validation.epoch_steps"):
            table.put("niters_per_epoch", "trainer.validation.epoch_steps", length)
            table.put("checkpoint_start_epoch", LATE, table.get("checkpoint_start_epoch"))
        if known_part(table.ours, "schedule.warmup_steps"):
            warmup = int(table.get("warm_up_epoch", 0) * length)
            table.put("warm_up_epoch", "schedule.warmup_steps", warmup)
