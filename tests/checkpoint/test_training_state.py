"""A training state crosses from one runtime to the other with weights, moments and step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segmill.checkpoint.lightning_state import write_lightning_state
from segmill.checkpoint.read import CheckpointError, read_checkpoint
from segmill.checkpoint.training_state import (
    TrainingState,
    latest_state,
    read_training_state,
    require_training_state,
    steps_of,
    write_training_state,
)
from segmill.optim import SGD, AdamW

SETTINGS = {"weight_decay": 0.1, "rules": {"bias": {"decay_mult": 0.0}}, "norm_decay_mult": None}
ADAMW = AdamW(learning_rate=0.01, betas=(0.9, 0.999), frozen=["frozen"], **SETTINGS)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.frozen = nn.Parameter(torch.ones(2))


def jittor_state(step: int = 7) -> TrainingState:
    draw = np.random.default_rng(0)
    shapes = {name: value.shape for name, value in Small().state_dict().items()}
    weights = {name: draw.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    weights["norm.num_batches_tracked"] = np.array(step)
    updated = [name for name, _ in Small().named_parameters() if name != "frozen"]
    first, second = (
        {name: draw.random(weights[name].shape).astype("f4") for name in updated} for _ in "ab"
    )
    random = {"key": np.arange(624, dtype=np.uint32), "position": np.array(3)}
    return TrainingState(
        weights=weights, exp_avg=first, exp_avg_sq=second, step=step, random=random, best=0.5
    )


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def test_jittors_state_comes_back_as_it_was(tmp_path: Path):
    state = jittor_state()
    write_training_state(tmp_path / "last.pkl", state)
    again = read_training_state(tmp_path / "last.pkl")
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        assert same(getattr(again, kind), getattr(state, kind)), kind
    assert (again.step, again.best, int(again.random["position"])) == (7, 0.5, 3)
    # As weights, for `weights=`, it is its state_dict.
    assert same(read_checkpoint(tmp_path / "last.pkl"), state.weights)


def test_jittors_state_as_lightnings_holds_the_same(tmp_path: Path):
    state, network = jittor_state(), Small()
    path = tmp_path / "carried.ckpt"
    write_lightning_state(path, state, network=network, optimizer=ADAMW.build(network))
    again = read_training_state(path)
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        assert same(getattr(again, kind), getattr(state, kind)), kind
    assert again.step == 7


def test_lightnings_loops_go_on_at_the_step(tmp_path: Path):
    network = Small()
    path = tmp_path / "carried.ckpt"
    write_lightning_state(path, jittor_state(), network=network, optimizer=ADAMW.build(network))
    loop = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    assert loop["epoch_loop.batch_progress"]["current"]["completed"] == 7
    optimizer = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    assert optimizer["step"]["total"]["completed"] == 7


def test_a_state_of_another_optimizer_is_refused_by_name(tmp_path: Path):
    network = Small()
    optimizer = SGD(learning_rate=0.1, momentum=0.9, **SETTINGS).build(network)
    tree = {
        "global_step": 1,
        "state_dict": {f"model.network.{k}": v for k, v in network.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
    }
    torch.save(tree, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="its optimizer is not AdamW"):
        read_training_state(tmp_path / "last.ckpt")


def test_weights_alone_are_no_state(tmp_path: Path):
    torch.save(Small().state_dict(), tmp_path / "weights.pth")
    assert steps_of(tmp_path / "weights.pth") is None
    with pytest.raises(CheckpointError, match="holds weights only"):
        read_training_state(tmp_path / "weights.pth")


def test_of_two_states_in_a_folder_the_one_with_more_steps_goes_on(tmp_path: Path):
    assert latest_state(tmp_path) is None
    write_training_state(tmp_path / "last.pkl", jittor_state(step=9))
    torch.save({"global_step": 4, "state_dict": {}}, tmp_path / "last.ckpt")
    assert latest_state(tmp_path) == tmp_path / "last.pkl"
    torch.save({"global_step": 12, "state_dict": {}}, tmp_path / "last.ckpt")
    assert latest_state(tmp_path) == tmp_path / "last.ckpt"


LIGHTNINGS = {
    "pytorch-lightning_version": "2.5",
    "loops": {"fit_loop": {}},
    "state_dict": {"model.network.w": torch.ones(2)},
    "optimizer_states": [{"state": {}, "param_groups": []}],
    "global_step": 3,
}


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"state_dict": {"net.w": torch.ones(2)}}, "lacks weights called model.network"),
        ({"optimizer_states": []}, "lacks the state of an optimizer"),
        ({"optimizer_states": None}, "lacks optimizer_states"),
        ({"loops": None}, "lacks loops"),
        ({"pytorch-lightning_version": None}, "lacks pytorch-lightning_version"),
        ({"global_step": "three"}, "its global_step is 'three'"),
        ({"global_step": torch.zeros(2)}, "its global_step is"),
        ({"global_step": None}, "holds weights only"),
    ],
)
def test_no_run_goes_on_from_a_state_of_another_library(change: dict, answer: str, tmp_path: Path):
    path = tmp_path / "last.ckpt"
    torch.save(LIGHTNINGS, path)
    require_training_state(path)
    torch.save(LIGHTNINGS | change, path)
    with pytest.raises(CheckpointError, match=answer) as caught:
        require_training_state(path)
    assert f"Use weights={path}" in str(caught.value)


def test_a_mere_checkpoint_with_a_step_is_no_state(tmp_path: Path):
    torch.save({"global_step": 3, "state_dict": Small().state_dict()}, tmp_path / "epoch.pth")
    with pytest.raises(CheckpointError, match="lacks optimizer, random, best"):
        require_training_state(tmp_path / "epoch.pth")


@pytest.mark.parametrize(
    "states",
    [
        [],
        [{}, {}],
        ["adam"],
        [{"state": {}, "param_groups": [{"params": [0]}]}],  # without names
    ],
)
def test_an_optimizer_that_is_not_ours_is_refused(states: list, tmp_path: Path):
    torch.save(LIGHTNINGS | {"optimizer_states": states}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="is no training state of segmill"):
        read_training_state(tmp_path / "last.ckpt")


def test_jittors_state_of_another_optimizer_or_network_is_refused(tmp_path: Path):
    state, network, path = jittor_state(), Small(), tmp_path / "carried.ckpt"
    fewer = replace(state, exp_avg={"conv.bias": state.exp_avg["conv.bias"]})
    with pytest.raises(CheckpointError, match="is of other parameters: 3 names"):
        write_lightning_state(path, fewer, network=network, optimizer=ADAMW.build(network))
    other = replace(state, weights=state.weights | {"head.weight": np.ones(3, "f4")})
    with pytest.raises(CheckpointError, match="is of another network") as caught:
        write_lightning_state(path, other, network=network, optimizer=ADAMW.build(network))
    assert "leave out what changes the model" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_carried_state_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    def half(_tree: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    network = Small()
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        write_lightning_state(
            tmp_path / "carried.ckpt",
            jittor_state(),
            network=network,
            optimizer=ADAMW.build(network),
        )
    assert not list(tmp_path.iterdir())
