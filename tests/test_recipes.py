"""The published recipes, configs/experiment/{ade20k,cityscapes}, against MMSegmentation 1.2.2.

For 30 of them the original's optimizer was built and its schedule run (optim_sched.json): every
parameter's learning rate and weight decay, and the rates along the run.
"""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import golden
from segmill.checkpoint.choose import HasKeyRules
from segmill.checkpoint.keys import Rule, apply_rules
from segmill.configuration import build, compose
from segmill.optim import OptimizerSettings
from segmill.paths import CONFIGS
from segmill.schedules import Schedule

FILES = sorted(
    file
    for folder in ("ade20k", "cityscapes")
    for file in (CONFIGS / "experiment" / folder).glob("*.yaml")
)
CONTENT: dict[str, Any] = {file.stem: OmegaConf.load(file) for file in FILES}
BY_SOURCE = {each.experiment.published.source: name for name, each in CONTENT.items()}
SCHEDULES = golden.component("optim_sched")
Groups = dict[str, tuple[float, float]]  # a parameter's name -> learning rate, weight decay


@pytest.fixture(scope="module", params=sorted(SCHEDULES))
def recipe(request):
    """The golden recipe's name, our experiment composed, and its network without memory."""
    name = BY_SOURCE[golden.ModelGolden(request.param).meta["config"]]
    config = compose("train", [f"experiment={name}"])
    with torch.device("meta"):
        network = build(config.model).network
    return request.param, config, network


def test_groups_are_the_originals(recipe):
    name, config, network = recipe
    assert as_groups(build(config.optimizer), network) == renamed_groups(name, network)


def test_every_rule_names_a_parameter(recipe, caplog):
    _, config, network = recipe
    build(config.optimizer).groups(network)
    assert caplog.text == ""


def test_rates_are_the_originals(recipe):
    name, config, _ = recipe
    original = SCHEDULES[name]
    schedule: Schedule = build(config.schedule)
    steps = config.trainer.max_steps
    assert steps == original["max_iters"]
    for step, rates in original["lr_at_iter_per_base_lr"].items():
        ours = [schedule.rate(base, int(step), steps) for base in original["base_lrs_sorted"]]
        # The original multiplies its way through up to 160000 steps, ours is the closed form.
        assert ours == pytest.approx(rates, rel=1e-8, abs=1e-18), step


def test_gradients_are_clipped_where_the_original_clips(recipe):
    name, config, _ = recipe
    clip = SCHEDULES[name]["clip_grad"]
    assert config.trainer.clip == (clip and clip["max_norm"])


def test_the_optimizer_is_the_originals(recipe):
    name, config, _ = recipe
    original = SCHEDULES[name]["optimizer"]
    settings: Any = build(config.optimizer)
    assert type(settings).__name__ == original["type"]
    if original["type"] == "SGD":
        assert settings.momentum == original["momentum"]
    else:
        assert tuple(settings.betas) == tuple(original.get("betas", (0.9, 0.999)))


def as_groups(settings: OptimizerSettings, network: nn.Module) -> Groups:
    """In six digits, as the file has them."""
    return {
        parameter: (float(f"{group['lr']:g}"), float(f"{group['weight_decay']:g}"))
        for group in settings.groups(network)
        for parameter, _ in group["params"]
    }


def renamed_groups(name: str, network: nn.Module) -> Groups:
    """The original's groups under our names: each array's value is the index of its group."""
    listed = SCHEDULES[name]["groups"]
    rates = [tuple(float(each.partition("=")[2]) for each in text.split()) for text in listed]
    index = {key: place for place, (_, keys) in enumerate(listed.values()) for key in keys}
    # The file lists at most 400 names of a group; where it has more, it is the only group.
    cut = [count > len(keys) for count, keys in listed.values()]
    rest = 0 if cut == [True] else np.nan
    assert not any(cut) or cut == [True]
    arrays = {
        key: np.broadcast_to(np.float32(index.get(key, rest)), shape)
        for key, shape, *_ in golden.ModelGolden(name).meta["state_dict"]
    }
    rules: tuple[Rule, ...] = ()
    if isinstance(network, HasKeyRules):
        rules = network.key_rules().get("mmseg", ())
    trained = {key for key, each in network.named_parameters() if each.requires_grad}
    found = {}
    for key, array in apply_rules(arrays, rules).items():
        if key in trained:
            (place,) = np.unique(array)
            found[key] = rates[int(place)]
    return found


SWIN_KEYS = {
    "absolute_pos_embed": {"decay_mult": 0.0},
    "relative_position_bias_table": {"decay_mult": 0.0},
    "norm": {"decay_mult": 0.0},
}


def keys_of_mask2former(depths: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """As its Swin files make them: a key for each norm of the backbone."""
    slow, plain = {"lr_mult": 0.1, "decay_mult": 0.0}, {"decay_mult": 0.0}
    blocks = [f"{stage}.blocks.{n}" for stage, depth in enumerate(depths) for n in range(depth)]
    merges = [f"{stage}.downsample" for stage in range(len(depths) - 1)]
    return {
        "backbone": {"lr_mult": 0.1},
        "backbone.patch_embed.norm": slow,
        "backbone.norm": slow,
        "absolute_pos_embed": slow,
        "relative_position_bias_table": slow,
        **dict.fromkeys(("query_embed", "query_feat", "level_embed"), plain),
        **{f"backbone.stages.{each}.norm": slow for each in (*blocks, *merges)},
    }


# Recipes without golden values whose files have keys of their own: paramwise_cfg.
KEYS: dict[str, tuple[dict[str, dict[str, float]], float | None]] = {
    "mask2former_swin-t_ade20k_160k": (keys_of_mask2former((2, 2, 6, 2)), 0.0),
    "mask2former_swin-s_ade20k_160k": (keys_of_mask2former((2, 2, 18, 2)), 0.0),
    "maskformer_swin-t_upernet_ade20k_160k": (
        {
            "backbone": {"lr_mult": 1.0},
            "relative_position_bias_table": {"decay_mult": 0.0},
            "query_embed": {"decay_mult": 0.0},
            "norm": {"decay_mult": 0.0},
        },
        0.0,
    ),
    "knet-s3_swin-t_upernet_ade20k_80k": (SWIN_KEYS, None),
    "twins_svt-s_uperhead_ade20k_160k": (
        {"pos_block": {"decay_mult": 0.0}, "norm": {"decay_mult": 0.0}},
        None,
    ),
    "vit_vit-b16-ln_mln_upernet_ade20k_160k": (
        {key: {"decay_mult": 0.0} for key in ("pos_embed", "cls_token", "norm")},
        None,
    ),
}


@pytest.mark.parametrize("name", sorted(KEYS))
def test_fewer_rules_make_the_groups_of_the_originals_keys(name, caplog):
    """On networks whose parameters have the original's names."""
    config = compose("train", [f"experiment={name}"])
    with torch.device("meta"):
        network = build(config.model).network
    settings: OptimizerSettings = build(config.optimizer)
    rules, norm_decay_mult = KEYS[name]
    theirs = dataclasses.replace(settings, rules=rules, norm_decay_mult=norm_decay_mult)
    ours = as_groups(settings, network)
    assert caplog.text == ""
    assert ours == as_groups(theirs, network)
    assert len(set(ours.values())) > 1


@pytest.mark.parametrize("name", sorted(CONTENT))
def test_a_recipe_says_what_its_source_says(name):
    """Devices x images each, and thousands of steps, stand in the name of the original's file."""
    content = CONTENT[name]
    published = content.experiment.published
    found = re.search(r"_(\d+)xb(\d+)-(?:adamw-)?(\d+)k_", published.source)
    assert found is not None
    devices, images, thousands = map(int, found.groups())
    assert content.get("data", {}).get("batch_size", 16) == devices * images
    assert name.split("_")[-1] == f"{thousands}k"
    assert any(each.endswith(f"_{thousands}k") for each in chosen(content, "optim"))
    assert content.experiment.name == name
    assert (published.mIoU is None) == (published.checkpoint is None)
    assert published.mIoU_ms_flip is None or published.mIoU_ms_flip > published.mIoU
    (model,) = chosen(content, "model")
    assert published.source.split("/")[-1].startswith(model.split("/")[-1].split("_640x640")[0])


def test_every_published_checkpoint_is_named_once():
    names = [each.experiment.published.checkpoint for each in CONTENT.values()]
    published = [name for name in names if name is not None]
    assert len(published) == len(set(published)) == 150


def chosen(content: Any, group: str) -> list[str]:
    key = f"override /{group}"
    return [each[key] for each in content.defaults if not isinstance(each, str) and key in each]
