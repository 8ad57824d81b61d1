import json
import logging
import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import golden
from segmill.configuration import build
from segmill.errors import SegmillError
from segmill.optim import SGD, AdamW, StepSchedule, norm_parameters
from segmill.parameter_rules import ParameterRules
from segmill.paths import CONFIGS
from segmill.schedules import LaggedPoly, MultiStep, Poly

RECIPES = golden.component("optim_sched")
DFORMER_RATES = json.loads(
    (golden.FOLDER / "dformer" / "learning_rates.json").read_text(encoding="utf-8")
)
POLY = {"power": 0.9, "min_lr": 0.0001, "warmup_steps": 0, "warmup_factor": 1.0}
LINEAR = {"power": 1.0, "min_lr": 0.0, "warmup_steps": 1500, "warmup_factor": 1e-6}
# Schedules of specs/zoo.md, "Training recipes".
SCHEDULES = {
    **dict.fromkeys(RECIPES, Poly(**POLY)),
    **dict.fromkeys(("segformer", "segnext", "vit_deit", "swin"), Poly(**LINEAR)),
    **dict.fromkeys(("mask2former", "maskformer", "poolformer"), Poly(**{**POLY, "min_lr": 0.0})),
    "pointrend": Poly(**{**POLY, "warmup_steps": 200, "warmup_factor": 0.1}),
    "stdc": Poly(**{**POLY, "warmup_steps": 1000, "warmup_factor": 0.1}),
    "knet": MultiStep(
        warmup_steps=1000, warmup_factor=0.001, milestones=(60_000, 72_000), gamma=0.1
    ),
}
NORM = re.compile(r"\b(bn\d?|gn|norm\d?|norms\.\d+|post_norm)\.(weight|bias)$")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.decode_head = nn.Conv2d(4, 2, 1)

    def forward(self, image):
        return self.decode_head(self.backbone(image))


def adamw(**changes) -> AdamW:
    fields = {
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "betas": (0.9, 0.999),
        "rules": {},
        "norm_decay_mult": None,
    }
    return AdamW(**{**fields, **changes})


def sgd(**changes) -> SGD:
    fields = {"learning_rate": 0.1, "weight_decay": 0.0, "momentum": 0.9, "rules": {}}
    return SGD(**{**fields, "norm_decay_mult": None, **changes})


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_mmsegmentations_learning_rates(name):
    recipe, schedule = RECIPES[name], SCHEDULES[name]
    for text, rates in recipe["lr_at_iter_per_base_lr"].items():
        ours = [
            schedule.rate(base, int(text), recipe["max_iters"])
            for base in recipe["base_lrs_sorted"]
        ]
        # The original multiplies its way through up to 160000 steps, ours is the closed form.
        assert ours == pytest.approx(rates, rel=1e-8, abs=1e-18), text


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_mmsegmentations_groups(name):
    recipe = RECIPES[name]
    paramwise = recipe["paramwise_cfg"] or {}
    listed = {group: set(names) for group, (_, names) in recipe["groups"].items()}
    every = sorted(set().union(*listed.values()))
    rules = ParameterRules(
        learning_rate=recipe["optimizer"]["lr"],
        weight_decay=recipe["optimizer"]["weight_decay"],
        rules=paramwise.get("custom_keys", {}),
        norm_decay_mult=paramwise.get("norm_decay_mult"),
    )
    groups = rules.grouped(every, norm_names={each for each in every if NORM.search(each)})
    ours = {f"lr={lr:g} wd={decay:g}": set(names) for (lr, decay), names in groups.items()}
    assert ours == listed


def test_the_longest_rule_decides_alone():
    rules = ParameterRules(
        learning_rate=1.0,
        weight_decay=1.0,
        rules={"norm": {"decay_mult": 0.0}, "decode_head": {"lr_mult": 10.0}},
        norm_decay_mult=None,
    )
    assert rules.rates_of("decode_head.norm.weight", is_norm=True) == (10.0, 1.0)


def test_parameters_that_the_module_froze_are_in_no_group():
    model = Small()
    model.decode_head.bias.requires_grad_(False)
    names = {name for group in adamw().groups(model) for name, _ in group["params"]}
    assert names == {name for name, _ in model.named_parameters()} - {"decode_head.bias"}


def test_parameters_that_the_settings_freeze_are_in_no_group_and_need_no_gradient():
    model = Small()
    groups = adamw(frozen=[r"backbone\.1\."]).groups(model)
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    assert frozen == {"backbone.1.weight", "backbone.1.bias"}
    assert not frozen & {name for group in groups for name, _ in group["params"]}


def test_a_frozen_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(SegmillError, match=r"optimizer\.frozen has '\['"):
        adamw(frozen=["["])


@pytest.mark.parametrize("recipe", sorted(DFORMER_RATES))
def test_dformers_rates_are_the_officials_one_step_late(recipe):
    case = DFORMER_RATES[recipe]
    schedule = LaggedPoly(warmup_steps=case["warmup"], power=0.9)
    base = 8e-5 if "SUN" in recipe else 6e-5
    for step, rate in case["values"].items():
        ours = schedule.rate(base, int(step) + 1, case["total"])
        assert ours == pytest.approx(rate, rel=1e-12)
    # The loop sets the rate after the step: the first one has it whole, the second none.
    assert schedule.rate(base, 0, case["total"]) == base
    assert schedule.rate(base, 1, case["total"]) == 0.0


def test_norm_layers_are_found_by_type():
    assert norm_parameters(Small()) == {"backbone.1.weight", "backbone.1.bias"}
    assert norm_parameters(nn.LayerNorm(3)) == {"weight", "bias"}


def test_norm_layers_without_decay_form_a_second_group():
    groups = adamw(norm_decay_mult=0.0).groups(Small())
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(4, 0.1), (2, 0.0)]


def test_a_rule_without_effect_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        adamw(rules={"heed": {"lr_mult": 10.0}}).build(Small())
    assert "optimizer.rules.heed has no effect" in caplog.text


def test_a_rule_with_an_unknown_multiplier_is_refused():
    with pytest.raises(SegmillError, match=r"optimizer\.rules\.head has \['lr'\]"):
        adamw(rules={"head": {"lr": 10.0}})


def test_poly_counts_the_lowest_rate_the_same_for_every_group():
    schedule = Poly(**POLY)
    assert [schedule.rate(base, 99, 100) for base in (0.1, 0.01)] == [0.0001, 0.0001]


def test_the_schedule_moves_every_group_and_ends_at_the_lowest_rate():
    model = Small()
    optimizer = sgd(rules={"head": {"lr_mult": 10.0}}).build(model)
    schedule = Poly(power=1.0, min_lr=0.0, warmup_steps=0, warmup_factor=1.0)
    stepper = StepSchedule(optimizer, schedule, max_steps=5)
    seen = []
    for _ in range(5):
        seen.append([group["lr"] for group in optimizer.param_groups])
        step(model, optimizer)
        stepper.step()
    backbone, head = zip(*seen, strict=True)
    assert backbone == pytest.approx((0.1, 0.075, 0.05, 0.025, 0.0))
    assert head == pytest.approx([10 * rate for rate in backbone])


def test_a_schedule_goes_on_where_its_state_was_saved():
    schedule = Poly(**{**LINEAR, "warmup_steps": 3})
    model = Small()
    optimizer = sgd().build(model)
    stepper = StepSchedule(optimizer, schedule, max_steps=20)
    for _ in range(7):
        step(model, optimizer)
        stepper.step()
    fresh = sgd().build(Small())
    resumed = StepSchedule(fresh, schedule, max_steps=20)
    resumed.load_state_dict(stepper.state_dict())
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert resumed.get_last_lr() == stepper.get_last_lr()
    assert fresh.param_groups[0]["initial_lr"] == 0.1


@pytest.mark.parametrize("settings", [adamw(), sgd(weight_decay=0.1)])
def test_the_fused_step_equals_torchs_plain_one(settings):
    torch.manual_seed(0)
    ours, plain = Small(), Small()
    plain.load_state_dict(ours.state_dict())
    reference = (
        torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
        if isinstance(settings, AdamW)
        else torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    )
    optimizer = settings.build(ours)
    for _ in range(3):
        step(ours, optimizer)
        step(plain, reference)
    for (name, value), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        # float32, same operations in another order; three steps.
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("settings", [adamw(), sgd()])
def test_a_step_is_seen_in_the_versions_of_the_weights_it_changes(settings):
    model = Small()
    optimizer = settings.build(model)
    model(torch.ones(2, 3, 4, 4)).square().sum().backward()
    first, *others = model.parameters()
    first.grad = None
    before = [each._version for each in model.parameters()]
    optimizer.step()
    assert first._version == before[0]
    assert all(each._version > old for each, old in zip(others, before[1:], strict=True))


@pytest.fixture
def mesh(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("settings", [adamw(), sgd()])
def test_sharded_parameters_step_like_whole_ones(settings, mesh):
    torch.manual_seed(0)
    whole, sharded = Small(), Small()
    sharded.load_state_dict(whole.state_dict())
    fully_shard(sharded, mesh=mesh)
    for model in (whole, sharded):
        optimizer = settings.build(model)
        for _ in range(3):
            step(model, optimizer)
    for (name, value), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert isinstance(other, DTensor)
        # float32, same operations in another order; three steps.
        torch.testing.assert_close(other.full_tensor(), value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("settings", [adamw(), sgd()])
def test_gradients_can_be_clipped_under_mixed_precision(settings):
    model = Small()
    optimizer = settings.build(model)
    model(torch.ones(2, 3, 4, 4)).square().sum().backward()
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, 1e-3)
    norms = [parameter.grad.norm() for parameter in model.parameters()]
    assert torch.stack(norms).norm() <= 1.001e-3


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "optim").glob("*.yaml")))
def test_every_optim_file_builds(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(overrides=[f"+optim={name}"])
    model = Small()
    optimizer = build(config.optimizer)
    schedule = build(config.schedule)
    stepper = StepSchedule(optimizer.build(model), schedule, max_steps=config.trainer.max_steps)
    assert stepper.get_last_lr()[0] <= optimizer.learning_rate
    assert config.trainer.max_steps >= config.trainer.val_every


PUBLISHED = [("segformer_160k", "segformer"), ("swin_160k", "swin"), ("sgd_poly_80k", "fcn")]


@pytest.mark.parametrize(("name", "recipe"), PUBLISHED)
def test_the_published_recipes_give_the_original_groups_and_rates(name, recipe):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(overrides=[f"+optim={name}"])
    golden_recipe = RECIPES[recipe]
    assert config.optimizer.learning_rate == golden_recipe["optimizer"]["lr"]
    assert config.optimizer.weight_decay == golden_recipe["optimizer"]["weight_decay"]
    assert config.trainer.max_steps == golden_recipe["max_iters"]
    for part, rule in config.optimizer.rules.items():
        assert golden_recipe["paramwise_cfg"]["custom_keys"][part] == rule
    assert build(config.schedule) == SCHEDULES[recipe]
