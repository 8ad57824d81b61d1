"""Every file under configs/ composes, and every model variant builds; found by listing."""

from typing import Any

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig

from segmill.commands.settings import BUILDS
from segmill.configuration import build, compose
from segmill.inspection import problems_in
from segmill.options import fitting, options, target_of
from segmill.paths import CONFIGS
from segmill.typecheck import located, parameters
from segmill.verbs import VERBS

DATA = "data=scenes"
TINY = "model=fcn_tiny_rgbd"
# Names a command line must give; a data set of the user's own has no folder of its own.
REQUIRED = {
    "predict": ["run=x", "path=y"],
    "data_check": [DATA],
    "corrupt": ["data=scenes_c", "out=x"],
    "export": ["run=x"],
}
OPTIONS = [
    (group, option)
    for group in ("data", "protocol", "optim", "trainer", "logging")
    for option in options(group)
]


def _slow_unless(default: bool, *values: str) -> Any:
    return pytest.param(*values, marks=() if default else pytest.mark.slow)


def _stands_alone(option: str) -> bool:
    """Whether the variant's file starts from no other variant's: about one a family."""
    text = (CONFIGS / "model" / f"{option}.yaml").read_text(encoding="utf-8")
    return "_target_: segmill.models.discriminative" in text


MODELS = [
    _slow_unless(_stands_alone(option), name)
    for name, option in sorted(fitting("train", "model").items())
]
# Published recipes are many and alike; test_recipes and test_rgbd_recipes compose some of them.
EXPERIMENTS = [
    _slow_unless(not name.startswith(("ade20k/", "cityscapes/", "rgbd/")), short)
    for short, name in sorted(options("experiment").items())
]
BACKBONES = sorted(options("model/backbone"))
ADAPTS = [
    _slow_unless(group != "model/discriminative" or option.startswith("segformer"), group, option)
    for group in ("tta", "model/discriminative", "model/generative")
    for option in options(group)
]


def composed(group: str, option: str) -> DictConfig:
    """With a command that takes the option; what adapts cannot train."""
    if option not in fitting("train", group):
        corruptible = group == "data" and option in fitting("corrupt", "data")
        command, required = ("corrupt", ["out=x"]) if corruptible else ("adapt", [])
        return compose(command, [f"{group}={option}", *required])
    return train_config(group, option)


def train_config(group: str, option: str) -> DictConfig:
    chosen = {"data": "scenes", "model": "fcn_tiny_rgbd", group: option}
    overrides = [f"{key}={value}" for key, value in chosen.items()]
    return compose("train", [*overrides, *must_be_given(option if group == "data" else "")])


def must_be_given(data: str) -> list[str]:
    """Values for the keys that a data set's file leaves to the user (`???`)."""
    if not data:
        return []
    text = (CONFIGS / "data" / f"{data}.yaml").read_text(encoding="utf-8")
    keys = [line.partition(":")[0] for line in text.splitlines() if "???" in line]
    values = {"num_classes": "2", "classes": "scenes", "splits": "{train: {}, val: {}, test: {}}"}
    return [f"data.{key}={values.get(key, 'somewhere')}" for key in keys]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_into_a_run(group, option):
    composed(group, option)


@pytest.mark.parametrize("command", sorted(BUILDS))
def test_every_option_of_a_command_builds_what_the_command_takes(command):
    for group, kinds in BUILDS[command].items():
        taken = fitting(command, group)
        assert {target_of(group, option) for option in taken.values()} == set(kinds)
        for kind in kinds:
            located(kind)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment):
    adapts = options("experiment")[experiment].startswith("adapt/")
    compose("adapt" if adapts else "train", [f"experiment={experiment}"])


@pytest.mark.parametrize(("group", "option"), ADAPTS)
def test_every_option_of_an_adaptation_composes(group, option):
    config = compose("adapt", ["data=scenes_c", f"{group}={option}"])
    assert "_target_" in config.tta.method
    if group == "tta":
        assert config.method_name == option
        assert config.optimizer is None or build(config.optimizer).learning_rate > 0


def test_an_adaptations_experiment_wins_over_every_group():
    """Files compose in order; only what is typed comes later."""
    config = compose("adapt", ["experiment=camvid-c"])
    assert config.data.name == "camvid_c"
    assert list(config.methods)[-1] == "dusa_bn"
    assert compose("adapt", ["experiment=camvid-c", "data=scenes_c"]).data.name == "scenes_c"


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.config])
def test_every_command_composes(verb):
    config = VERBS[verb].config
    assert config is not None
    compose(config, REQUIRED.get(config, []))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_fits_its_constructor(backbone):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        config = hydra_compose(f"model/backbone/{backbone}")
    node: Any = config.model.backbone
    dead = [each for each in problems_in(config, None) if "${data.channels}" not in each]
    assert dead == []
    assert "_target_" in node


@pytest.mark.parametrize("model", MODELS)
def test_every_variant_builds_and_gives_logits(model):
    config = compose("train", [DATA, f"model={model}", f"data.channels={channels_of(model)}"])
    with torch.device("meta"):
        network = build(config.model).network.eval()
        image = torch.zeros(1, config.data.channels, 64, 96)
    with torch.no_grad():
        logits = network(image)
    assert logits.shape[:2] == (1, config.data.num_classes)
    if logits.shape[2:] == (1, 1):  # one answer for the whole image
        return
    assert logits.shape[2] / logits.shape[3] == pytest.approx(64 / 96)
    assert 64 % logits.shape[2] == 0


def channels_of(model: str) -> int:
    return 4 if "rgbd" in model or model.startswith("dformer") else 3


def test_every_annotation_of_a_target_can_be_checked():
    """Names imported for type checkers only would switch the check off in silence."""
    for name in targets():
        expected, hints = parameters(located(name))
        assert set(expected) <= set(hints), name


def targets() -> set[str]:
    """Every `_target_` that the tree names."""
    return {
        line.partition("_target_:")[2].partition("#")[0].strip()
        for file in CONFIGS.rglob("*.yaml")
        for line in file.read_text(encoding="utf-8").splitlines()
        if "_target_:" in line
    }
