"""Backbones, necks and heads of MMSegmentation: which class of ours, and which key for each field.

A part of another class than the chosen variant's is refused. Where a class has its fields listed
here, each is compared with ours, those that the config leaves to MMSegmentation's default too.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from segmill.convert.expressions import Unread
from segmill.convert.table import SAME, Table, known_part, part_of, same, shown
from segmill.errors import SegmillError

Values = Mapping[str, Any]
RESNETS = ("TimmBackbone", "DilatedResNet")


@dataclass(frozen=True)
class To:
    """The field is our key; `value` works it out from all fields of the part."""

    key: str
    value: Callable[[Values], Any] | None = None
    default: Any = None  # MMSegmentation's, where the config says nothing


@dataclass(frozen=True)
class Always:
    """Ours is always one of these."""

    allowed: tuple[Any, ...]


@dataclass(frozen=True)
class Follows:
    """Decided by something else, so it needs no key."""

    why: str


Field = To | Always | Follows


@dataclass(frozen=True)
class Kind:
    """A class of theirs: ours, and its fields. Without fields nothing of it is compared."""

    ours: tuple[str, ...]
    fields: Mapping[str, Field] = field(default_factory=dict)


def always(*allowed: Any) -> Always:
    """Short for the tables."""
    return Always(allowed)


BACKBONE: dict[str, Field] = {
    "in_channels": always(3),
    "with_cp": Follows("recomputes activations to save memory; same results"),
    "num_stages": always(4),
    "norm_cfg.type": always("LN"),
    "norm_cfg.eps": always(1e-6),
    "norm_cfg.requires_grad": always(True),
    "act_cfg": always({"type": "GELU"}),
    "style": always("pytorch"),
    "drop_rate": always(0.0),
    "attn_drop_rate": always(0.0),
    "qkv_bias": always(True),
    "qk_scale": always(None),
    "frozen_stages": always(-1),
}
BATCH_NORM = {"norm_cfg.type": always("SyncBN", "BN"), "norm_cfg.eps": always(1e-5)}
RESNET: dict[str, Field] = {
    **{name: rule for name, rule in BACKBONE.items() if name != "norm_cfg.requires_grad"},
    **BATCH_NORM,
    "act_cfg": always({"type": "ReLU"}),
    "strides": To("output_stride", lambda each: 4 * prod(each["strides"][1:])),
    "contract_dilation": Follows("the first block of a dilated stage has half of it, as in timm"),
    "deep_stem": Follows("compared as the name of timm's model"),
    "norm_eval": To("norm_eval", default=False),
    "out_indices": Follows("heads choose their levels"),
    "multi_grid": always(None),
    "avg_down": always(False),
    "stem_channels": Follows("compared as the name of timm's model"),
}
HEAD: dict[str, Field] = {
    "in_channels": Follows("the backbone's"),
    "channels": To("channels"),
    "dropout_ratio": To("dropout", default=0.1),
    "norm_cfg.type": always("SyncBN", "BN"),  # trainer.sync_batchnorm shares it over processes
    "norm_cfg.requires_grad": always(True),
    "act_cfg": always({"type": "ReLU"}),
    "align_corners": always(False),
    "input_transform": Follows("part of the head"),
    "feature_strides": Follows("the backbone's"),
    "ignore_index": always(255),
}
FCN: dict[str, Field] = HEAD | {
    "in_index": To("in_index", default=-1),
    "num_convs": To("num_convs", default=2),
    "kernel_size": To("kernel", default=3),
    "concat_input": To("concat_input", default=True),
}
ONE_LEVEL: dict[str, Field] = HEAD | {"in_index": To("in_index", default=-1)}
ALL_LEVELS: dict[str, Field] = HEAD | {"in_index": always([0, 1, 2, 3])}


def straight(*names: str) -> dict[str, Field]:
    """Fields whose names are ours too."""
    return {name: To(name) for name in names}


def _widths(each: Values) -> Any:
    """`embed_dims` of a MiT is for one head; Swin's doubles at each stage on our side as well."""
    return [each["embed_dims"] * heads for heads in each["num_heads"]]


ASPP = ONE_LEVEL | {"dilations": To("dilations")}
KINDS: dict[str, Kind] = {
    "ResNetV1c": Kind(RESNETS, RESNET),
    "ResNet": Kind(RESNETS, RESNET),
    "ResNeSt": Kind(RESNETS, RESNET | {"stem_channels": always(128), "radix": always(2)}),
    "MixVisionTransformer": Kind(
        ("MixVisionTransformer",),
        BACKBONE
        | {
            "embed_dims": To("channels", _widths),
            "num_layers": To("depths"),
            "num_heads": To("num_heads"),
            "sr_ratios": To("reductions"),
            "mlp_ratio": To("mlp_ratio", default=4),
            "drop_path_rate": To("drop_path_rate", default=0.0),
            "patch_sizes": always([7, 3, 3, 3]),
            "out_indices": always([0, 1, 2, 3]),
        },
    ),
    "SwinTransformer": Kind(
        ("SwinTransformer",),
        BACKBONE
        | {
            "embed_dims": To("embed_dim"),
            "depths": To("depths"),
            "num_heads": To("num_heads"),
            "window_size": To("window", default=7),
            "mlp_ratio": To("mlp_ratio", default=4),
            "drop_path_rate": To("drop_path_rate", default=0.1),
            "patch_size": always(4),
            "strides": always([4, 2, 2, 2]),
            "out_indices": always([0, 1, 2, 3]),
            "patch_norm": always(True),
            "use_abs_pos_embed": always(False),
            "pretrain_img_size": Follows("of the pretrained position embedding, which is absent"),
        },
    ),
    "MSCAN": Kind(
        ("MSCAN",),
        BACKBONE
        | {
            "embed_dims": To("channels"),
            **straight("mlp_ratios", "depths", "drop_path_rate"),
            **BATCH_NORM,
            "attention_kernel_sizes": always([5, [1, 7], [1, 11], [1, 21]]),
            "attention_kernel_paddings": always([2, [0, 3], [0, 5], [0, 10]]),
        },
    ),
    "VisionTransformer": Kind(
        ("VisionTransformer",),
        BACKBONE
        | {
            "img_size": To("image_size"),
            "embed_dims": To("channels"),
            "num_layers": To("depth"),
            **straight("patch_size", "num_heads", "mlp_ratio", "with_cls_token", "final_norm"),
            **straight("output_cls_token", "patch_norm", "interpolate_mode"),
            "drop_path_rate": To("drop_path_rate", default=0.0),
            "out_indices": To("out_indices"),
            "norm_eval": always(False),
        },
    ),
    "HRNet": Kind(("HRNet",)),
    "MobileNetV2": Kind(
        ("MobileNetV2",),
        BACKBONE
        | BATCH_NORM
        | {
            "act_cfg": always({"type": "ReLU6"}),
            "widen_factor": always(1.0),
            **straight("strides", "dilations", "out_indices"),
        },
    ),
    "PCPVT": Kind(("Twins",)),
    "SVT": Kind(("Twins",)),
    "mmpretrain.PoolFormer": Kind(("PoolFormer",)),
    "mmcls.PoolFormer": Kind(("PoolFormer",)),
    "STDCContextPathNet": Kind(("STDCContextPath",)),
    "FPN": Kind(("FPN",)),
    "JPU": Kind(("JPU",)),
    "MLANeck": Kind(("MLANeck",)),
    "MultiLevelNeck": Kind(("MultiLevelNeck",)),
    "FCNHead": Kind(("FCNHead",), FCN),
    "PSPHead": Kind(("PSPHead",), ONE_LEVEL | {"pool_scales": To("grids", default=(1, 2, 3, 6))}),
    "ASPPHead": Kind(("ASPPHead",), ASPP),
    "DepthwiseSeparableASPPHead": Kind(
        ("SeparableASPPHead",),
        ASPP
        | {"c1_in_channels": Follows("the backbone's"), "c1_channels": To("low_level_channels")},
    ),
    "UPerHead": Kind(
        ("UPerHead",), ALL_LEVELS | {"pool_scales": To("grids", default=(1, 2, 3, 6))}
    ),
    "SegformerHead": Kind(("ConvHead",), ALL_LEVELS | {"interpolate_mode": always("bilinear")}),
    "LightHamHead": Kind(
        ("LightHamHead",),
        HEAD
        | {
            **straight("in_index", "ham_channels"),
            "norm_cfg.type": always("GN"),
            "norm_cfg.num_groups": To("groups"),
            "ham_kwargs.MD_R": To("rank"),
            "ham_kwargs.train_steps": To("train_steps"),
            "ham_kwargs.eval_steps": To("eval_steps"),
            "ham_kwargs.MD_S": always(1),
            "ham_kwargs.inv_t": always(100),
            "ham_kwargs.rand_init": always(True),
        },
    ),
    "FPNHead": Kind(("FPNHead",), ALL_LEVELS),
    "NLHead": Kind(("NLHead",), ONE_LEVEL | straight("reduction", "use_scale", "mode")),
    "DNLHead": Kind(
        ("DNLHead",),
        ONE_LEVEL | {**straight("reduction", "use_scale", "temperature"), "mode": Follows("fixed")},
    ),
    "GCHead": Kind(("GCHead",), ONE_LEVEL | straight("ratio", "pooling_type", "fusion_types")),
    "ISAHead": Kind(("ISAHead",), ONE_LEVEL | straight("isa_channels", "down_factor")),
    "PSAHead": Kind(
        ("PSAHead",),
        ONE_LEVEL
        | straight("mask_size", "psa_type", "compact", "shrink_factor", "psa_softmax")
        | {"normalization_factor": To("normalization_factor")},
    ),
    "EncHead": Kind(
        ("EncHead",),
        HEAD
        | {
            "in_index": Follows("part of the head"),
            "num_codes": To("num_codes"),
            "use_se_loss": always(True),
            "add_lateral": always(False),
            "loss_se_decode.type": always("CrossEntropyLoss"),
            "loss_se_decode.use_sigmoid": always(True),
            "loss_se_decode.loss_weight": To("se_weight"),
        },
    ),
    "OCRHead": Kind(("OCRHead",), HEAD | straight("in_index", "ocr_channels")),
    "SETRUPHead": Kind(
        ("SETRUPHead",),
        HEAD
        | {
            **straight("in_index", "num_convs", "up_scale"),
            "kernel_size": To("kernel", default=3),
            "norm_layer": To("norm_eps", lambda each: each["norm_layer"].get("eps")),
        },
    ),
    "SegmenterMaskTransformerHead": Kind(
        ("SegmenterMaskTransformerHead",),
        HEAD
        | {
            "in_index": To("in_index"),
            "num_layers": To("depth"),
            "num_heads": To("num_heads"),
            "embed_dims": To("channels"),
            "drop_path_rate": To("drop_path_rate"),
            "dropout_ratio": always(0.0),
        },
    ),
    **{
        name: Kind((name,))
        for name in ("PointHead", "SETRMLAHead", "Mask2FormerHead", "MaskFormerHead")
    },
    **{name: Kind((name,)) for name in ("IterativeDecodeHead", "STDCHead")},
}
TIMM_KINDS = ("ResNetV1c", "ResNet", "ResNeSt")


def convert_part(table: Table, theirs: str, ours: str) -> None:
    """One part: `model.backbone` of theirs against `model.network.backbone` of ours."""
    if not table.has(theirs):
        return
    values = part_of(table.fields, theirs)
    kind = _kind_of(table, theirs, ours, values)
    for name, rule in kind.fields.items():
        place, key = f"{theirs}.{name}", f"{ours}.{getattr(rule, 'key', '')}"
        if isinstance(rule, Follows):
            table.note(place, f"{SAME}: {rule.why}")
        elif isinstance(rule, Always):
            table.always(place, *rule.allowed)
        elif not table.has(place):
            _left_to_default(table, rule, key, place)
        elif table.readable(place) and not known_part(table.ours, key):
            _without_key(table, rule, place, key)
        elif table.readable(place):
            table.put(place, key, rule.value(values) if rule.value else table.get(place))
    if values.get("type") in TIMM_KINDS:
        _timm_name(table, theirs, ours, values)
    if not kind.fields:
        table.note(theirs, "check: not compared; the chosen model has its own")


def _kind_of(table: Table, theirs: str, ours: str, values: Any) -> Kind:
    if isinstance(values, Unread):
        raise SegmillError(f"{theirs} is not read, so the network is unknown: {values}.")
    name = values.get("type") if isinstance(values, Mapping) else None
    target = part_of(table.ours, f"{ours}._target_", absent="nothing").rpartition(".")[2]
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None or target not in kind.ours:
        raise SegmillError(
            f"{theirs} is {name if isinstance(name, str) else 'not read'}, but the chosen model "
            f"has {target} there, so it is another network. Choose the one that fits with "
            "model=NAME (segmill models lists them); one that is not listed has to be written "
            "first (docs/add_a_model.md)."
        )
    table.note(f"{theirs}.type", SAME, f"{ours}: {target}")
    return kind


def _left_to_default(table: Table, rule: To, key: str, place: str) -> None:
    """A field that the config leaves to MMSegmentation: our value must be that one."""
    if rule.default is None or not known_part(table.ours, key):
        return
    default = _counted(rule.default, table, key)
    if not same(part_of(table.ours, key), default):
        table.set(key, default)
        table.leaves[place] = default
        table.note(place, "mapped: their default", f"{key}={shown(default)}")


def _counted(default: Any, table: Table, key: str) -> Any:
    """A level that is counted from the end."""
    last = key.endswith(".in_index") and default == -1
    return part_of(table.ours, key) if last else default


def _without_key(table: Table, rule: To, place: str, key: str) -> None:
    value = table.get(place)
    plain = (rule.default is not None and same(value, rule.default)) or value in (None, False)
    why = SAME if plain else f"dropped: {key} does not exist in the chosen model"
    table.note(place, why)


def _timm_name(table: Table, theirs: str, ours: str, values: Values) -> None:
    """A ResNet is a model of timm: depth and stem are its name, strides decide the dilations."""
    key = f"{ours}.name"
    known = str(part_of(table.ours, key))
    deep = known.endswith(("c", "s", "e")) or "stem_type" in part_of(table.ours, f"{ours}.options")
    if deep == (values["type"] == "ResNet"):
        raise SegmillError(
            f"{theirs} is {values['type']}, but the chosen model has {known}, whose stem is "
            "another one. Choose the model that fits with model=NAME (segmill models)."
        )
    frozen = bool(part_of(table.ours, f"{ours}.frozen"))
    table.always(f"{theirs}.norm_cfg.requires_grad", not frozen)
    depth = table.get(f"{theirs}.depth", 50)
    table.put(f"{theirs}.depth", key, re.sub(r"\d+", str(depth), known, count=1))
    stride = 4 * prod(table.get(f"{theirs}.strides", (1, 2, 2, 2))[1:])
    usual = {8: [1, 1, 2, 4], 16: [1, 1, 1, 2], 32: [1, 1, 1, 1]}.get(stride)
    if known_part(table.ours, f"{ours}.dilations"):
        table.put(f"{theirs}.dilations", f"{ours}.dilations", table.get(f"{theirs}.dilations"))
    else:
        table.always(f"{theirs}.dilations", usual)
