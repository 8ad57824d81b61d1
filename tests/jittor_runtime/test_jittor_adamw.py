"""AdamW against its formula, and its state."""

import numpy as np
import pytest

jt = pytest.importorskip("jittor")

from segmill.errors import SegmillError
from segmill.jittor.adamw import AdamW

pytestmark = pytest.mark.jittor
BETAS = (0.9, 0.999)
RATES = (0.1, 0.0, 0.05)


def start():
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(4).astype(np.float32) for name in ("weight", "bias")}


def gradients(step):
    draw = np.random.default_rng(step + 1)
    return {name: draw.standard_normal(4).astype(np.float32) for name in ("weight", "bias")}


def optimizer():
    values = {name: jt.array(value) for name, value in start().items()}
    decaying = {"params": {"weight": values["weight"]}, "lr": 0.1, "weight_decay": 0.1}
    other = {"params": {"bias": values["bias"]}, "lr": 0.1, "weight_decay": 0.0}
    return AdamW([decaying, other], betas=BETAS), values


def advance(adamw, steps):
    for step in steps:
        for group in adamw.groups:
            group["lr"] = RATES[step]
        adamw.step({name: jt.array(value) for name, value in gradients(step).items()})


def by_formula(decays):
    """Loshchilov and Hutter 2019, algorithm 2, in float64, as torch orders it."""
    (slow, fast), values = BETAS, {name: v.astype(np.float64) for name, v in start().items()}
    for name, value in values.items():
        mean, square = np.zeros(4), np.zeros(4)
        for step, rate in enumerate(RATES):
            gradient = gradients(step)[name]
            value *= 1 - rate * decays[name]
            mean = slow * mean + (1 - slow) * gradient
            square = fast * square + (1 - fast) * gradient**2
            unbiased = mean / (1 - slow ** (step + 1)), square / (1 - fast ** (step + 1))
            value -= rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return values


def test_steps_follow_the_formula():
    adamw, values = optimizer()
    advance(adamw, range(3))
    for name, expected in by_formula({"weight": 0.1, "bias": 0.0}).items():
        np.testing.assert_allclose(values[name].numpy(), expected, rtol=1e-5)  # float32


def test_a_resumed_optimizer_takes_the_same_steps():
    whole, expected = optimizer()
    advance(whole, range(3))
    first, values = optimizer()
    advance(first, range(1))
    second, resumed = optimizer()
    for name, value in values.items():
        resumed[name].update(value)
    second.load_state(first.state())
    advance(second, range(1, 3))
    for name, value in expected.items():
        assert np.array_equal(resumed[name].numpy(), value.numpy())
    assert second.state()["step"] == 3


def test_the_state_of_other_parameters_is_refused():
    adamw, _ = optimizer()
    state = adamw.state()
    state["exp_avg"]["other"] = state["exp_avg"].pop("bias")
    with pytest.raises(SegmillError, match="2 names or shapes differ, 'bias'"):
        adamw.load_state(state)


def test_a_parameter_in_two_groups_is_refused():
    group = {"params": {"weight": jt.ones(3)}, "lr": 0.1, "weight_decay": 0.1}
    with pytest.raises(SegmillError, match="two groups"):
        AdamW([group, dict(group)], betas=BETAS)
