"""The recipes of configs/experiment/rgbd against the official DFormer code.

`param_groups.npz` has the names in the official optimizer's groups, and those in none of them;
`learning_rates.json` the rates that its schedule gives.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import golden
from segmill.commands.trainer_settings import TrainerSettings
from segmill.configuration import build, compose
from segmill.optim import OptimizerSettings
from segmill.paths import CONFIGS
from segmill.schedules import LaggedPoly, Schedule

FILES = sorted((CONFIGS / "experiment" / "rgbd").glob("*.yaml"))
CONTENT: dict[str, Any] = {file.stem: OmegaConf.load(file) for file in FILES}
RECIPES = [name for name in CONTENT if not name.endswith("_fixed")]
GROUPS = np.load(golden.FOLDER / "dformer" / "param_groups.npz")
RATES = json.loads((golden.FOLDER / "dformer" / "learning_rates.json").read_text())
# Training images, epochs, the epoch after which each one is scored.
DATA = {"nyu_depth_v2": (795, 500, 250), "sunrgbd": (5285, 300, 200)}
# Keys in which a corrected recipe may differ from the official one.
CORRECTED = {
    "data.channel_order",
    "data.transform.overshoot",
    "experiment.name",
    "experiment.published",
    "model.channel_order",
    "optimizer.frozen",
    "schedule._target_",
    "schedule.min_lr",
    "schedule.warmup_factor",
}


def _slow_but(default: tuple[str, ...], names: list[str]) -> list[Any]:
    marked = (() if name in default else pytest.mark.slow for name in names)
    return [pytest.param(name, marks=mark) for name, mark in zip(names, marked, strict=True)]


def official_name(recipe: str) -> str:
    """`dformer-tiny_nyu` -> `DFormer-Tiny`."""
    family, _, size = recipe.partition("_")[0].partition("-")
    return f"{family.replace('dformer', 'DFormer')}-{size.capitalize()}"


def network_of(config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return build(config.model).network


def decays(config: Any, network: torch.nn.Module) -> dict[float, set[str]]:
    """Weight decay -> the parameters that are updated with it."""
    settings: OptimizerSettings = build(config.optimizer)
    found: dict[float, set[str]] = {}
    for group in settings.groups(network):
        assert group["lr"] == settings.learning_rate
        found.setdefault(group["weight_decay"], set()).update(name for name, _ in group["params"])
    return found


def official(model: str, group: str) -> set[str]:
    return {name.decode() for name in GROUPS[f"{model}/{group}"].tolist()}


ONE_OF_EACH = ("dformer-tiny_nyu", "dformer-large_sun", "dformerv2-s_sun", "dformerv2-l_nyu")


@pytest.mark.parametrize("name", _slow_but(ONE_OF_EACH, RECIPES))
def test_groups_are_the_official_ones_and_the_rest_is_never_updated(name, caplog):
    config = compose("train", [f"experiment={name}"])
    network, model = network_of(config), official_name(name)
    found = decays(config, network)
    assert found == {0.01: official(model, "decay"), 0.0: official(model, "no_decay")}
    never = {name for name, _ in network.named_parameters()} - set().union(*found.values())
    assert never == official(model, "not_optimised")
    assert caplog.text == ""


@pytest.mark.parametrize("name", _slow_but(ONE_OF_EACH, RECIPES))
def test_epochs_rates_and_validations_are_the_official_ones(name):
    config = compose("train", [f"experiment={name}"])
    images, epochs, each_after = DATA[config.data.name]
    batch = config.data.batch_size
    settings: TrainerSettings = build(config.trainer)
    assert settings.validation is not None
    epoch = settings.validation.epoch_steps
    assert (epoch, settings.max_steps) == (images // batch + 1, epochs * epoch)
    due = [each for each in range(epochs + 1) if settings.validation.due(each * epoch)]
    assert due == [1, *range(10, each_after + 1, 10), *range(each_after + 1, epochs + 1)]
    schedule: LaggedPoly = build(config.schedule)
    assert schedule.warmup_steps == 10 * epoch
    table = RATES[f"{'NYU' if epochs == 500 else 'SUN'}_b{batch}"]
    assert table["total"] == settings.max_steps
    base = config.optimizer.learning_rate
    for step, rate in table["values"].items():
        # The official loop reads the table one step late.
        assert schedule.rate(base, int(step) + 1, settings.max_steps) == pytest.approx(rate)
    assert schedule.rate(base, 0, settings.max_steps) == base


CORRECTIONS = [name for name in CONTENT if name.endswith("_fixed")]


@pytest.mark.parametrize(
    "name", _slow_but(("dformer-tiny_nyu_fixed", "dformerv2-s_sun_fixed"), CORRECTIONS)
)
def test_a_corrected_recipe_differs_in_what_its_files_name(name, caplog):
    config, parent = (
        compose("train", [f"experiment={each}"]) for each in (name, name.removesuffix("_fixed"))
    )
    assert config.data.channel_order == config.model.channel_order or "v2" in name
    assert config.model.channel_order == "rgb"
    ours, theirs = flat(config), flat(parent)
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} <= CORRECTED
    network = network_of(config)
    updated = set().union(*decays(config, network).values())
    assert updated == {each for each, _ in network.named_parameters()}
    schedule: Schedule = build(config.schedule)
    steps, base = config.trainer.max_steps, config.optimizer.learning_rate
    warm = config.schedule.warmup_steps
    around = [schedule.rate(base, step, steps) for step in (0, 1, warm - 1, warm, warm + 1)]
    assert around[0] < around[1] < base
    assert around[2] == around[3] == base > around[4]
    assert caplog.text == ""


@pytest.mark.parametrize("data", ["nyu", "sun"])
def test_every_model_has_both_recipes_and_a_corrected_one_of_each(data):
    models = {f"dformer-{size}" for size in ("tiny", "small", "base", "large")}
    models |= {f"dformerv2-{size}" for size in "sbl"}
    wanted = {f"{model}_{data}{end}" for model in models for end in ("", "_fixed")}
    assert wanted == {name for name in CONTENT if name.removesuffix("_fixed").endswith(data)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_was_published(name):
    experiment = CONTENT[name].experiment
    assert experiment.name == name
    assert experiment.published.source.startswith("VCIP-RGBD/DFormer")
    assert 48 < experiment.published.mIoU_ms_flip < 59
    assert experiment.published.mIoU is None  # no single-scale number is printed


def test_every_published_checkpoint_is_named_once():
    names = {CONTENT[name].experiment.published.checkpoint for name in RECIPES}
    assert len(names) == len(RECIPES) == 14


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a whole configuration."""
    if prefix == "":
        node = OmegaConf.to_container(node, resolve=True)
    found: dict[str, Any] = {}
    for key, value in node.items():
        where = f"{prefix}{key}"
        inner = isinstance(value, dict) and where != "experiment.published"
        found |= flat(value, f"{where}.") if inner else {where: value}
    return found
