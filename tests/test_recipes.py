"""The published recipes, configs/experiment/{ade20k,cityscapes}, against MMSegmentation 1.2.2.

For 30 of them the original's optimizer was built and its schedule run (optim_sched.json): every
parameter's learning rate and weight decay, and the rates along the run.
"""

import re
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import golden
from segmill.checkpoint.keys import Rule, apply_rules
from segmill.checkpoint.load import HasKeyRules
from segmill.configuration import build, compose
from segmill.optim import OptimizerSettings, ScheduleSettings
from segmill.paths import CONFIGS

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
    settings: OptimizerSettings = build(config.optimizer)
    ours = {
        parameter: (float(f"{group['lr']:g}"), float(f"{group['weight_decay']:g}"))
        for group in settings.groups(network)
        for parameter, _ in group["params"]
    }
    assert ours == renamed_groups(name, network)  # six digits: so the file says them


def test_every_rule_names_a_parameter(recipe, caplog):
    _, config, network = recipe
    build(config.optimizer).groups(network)
    assert caplog.text == ""


def test_rates_are_the_originals(recipe):
    name, config, _ = recipe
    original = SCHEDULES[name]
    schedule: ScheduleSettings = build(config.schedule)
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
