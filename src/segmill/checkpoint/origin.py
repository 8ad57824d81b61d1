"""Which library wrote a checkpoint, guessed from its names; for people, nothing depends on it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# The first row all of whose patterns match some key. Wrapping prefixes are already removed.
SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("official DFormer", (r"backbone\.downsample_layers_e\..*",)),
    ("official DFormer v2", (r"backbone\.layers\.\d\.blocks\.\d+\.Attention\..*",)),
    ("official DFormer (pretraining)", (r"downsample_layers_e\..*",)),
    ("segmill", (r"backbone\.trunk\..*",)),
    ("official Swin in an MMSegmentation head", (r"decode_head\..*", r"backbone\.layers\..*qkv.*")),
    ("Hugging Face SegFormer", (r"segformer\.encoder\..*",)),
    ("Hugging Face Mask2Former", (r"model\.pixel_level_module\..*",)),
    ("Hugging Face UPerNet", (r"decode_head\.psp_modules\..*", r"backbone\..*\.layernorm.*")),
    ("Hugging Face", (r"(.*\.)?encoder\.layer\.\d+\.attention\..*",)),
    ("MMSegmentation", (r"decode_head\..*", r"backbone\..*")),
    ("MMClassification", (r"backbone\..*", r"head\.(fc|layers)\..*")),
    ("torchvision segmentation", (r"backbone\.layer1\..*", r"classifier\..*")),
    ("Detectron2", (r"sem_seg_head\..*",)),
    ("backbone of MMSegmentation (ResNetV1c)", (r"stem\.0\.weight", r"layer1\..*")),
    ("torchvision or timm ResNet", (r"layer1\.0\.conv1\.weight", r"conv1\..*")),
    ("timm", (r"(patch_embed|stem|conv_stem|stem_0|stem_1)\..*", r"(blocks|stages|layers)\..*")),
)
TRAINING = re.compile(r"optimizers?|optimizer_states?|lr_schedulers?|param_schedulers?|scaler")


def guess_origin(names: Iterable[str], tree: Any, metadata: Mapping[str, str]) -> str:
    """The library, and around it what trained with it: `MMSegmentation, trained by mmengine`."""
    if "segmill" in metadata:
        return "segmill"
    names = _without_wrapping(list(names))
    origin = next((name for name, signs in SIGNS if _all_match(signs, names)), "plain names")
    around = _trainer(tree)
    return f"{origin}, saved by {around}" if around else origin


def training_entries(tree: Any) -> tuple[str, ...]:
    """The entries that make a file a training state: optimizer, schedules."""
    if not isinstance(tree, dict):
        return ()
    return tuple(name for name in tree if isinstance(name, str) and TRAINING.fullmatch(name))


def _trainer(tree: Any) -> str | None:
    entries = set(tree) if isinstance(tree, dict) else set()
    if "pytorch-lightning_version" in entries:
        return "Lightning"
    if "message_hub" in entries:
        return "mmengine"
    meta = tree["meta"] if "meta" in entries else None
    if isinstance(meta, dict) and any(str(key).startswith("mm") for key in meta):
        return "mmcv or mmengine"
    if {"arch", "state_dict"} <= entries:
        return "timm's or a similar training script"
    return None


def _without_wrapping(names: list[str]) -> list[str]:
    wrapping = re.compile(r"(module|model|network|_orig_mod)\.(?!pixel_level_module)")
    while names and all(wrapping.match(name) for name in names):
        names = [name.partition(".")[2] for name in names]
    return names


def _all_match(signs: tuple[str, ...], names: list[str]) -> bool:
    return all(any(re.fullmatch(sign, name) for name in names) for sign in signs)
