"""The table of docs/checkpoints.md, row by row: what loads strictly, what is no resume point."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segmill.checkpoint.keys import Prefix
from segmill.checkpoint.load import choose_rules, load_weights, save_safetensors
from segmill.checkpoint.origin import training_entries
from segmill.checkpoint.read import CheckpointError, read_any, read_checkpoint
from segmill.checkpoint.write_jittor import write_jittor

SOURCE = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
STATE = dict(SOURCE.state_dict())
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3, 2)}}, "param_groups": [{"lr": 0.1}]}


def torch_weights(path: Path) -> None:
    torch.save({"meta": {}, "state_dict": STATE}, path)


def torch_training(path: Path) -> None:
    torch.save({"state_dict": STATE, "optimizer": OPTIMIZER, "epoch": 3}, path)


def jittor_weights(path: Path) -> None:
    write_jittor(path, {name: value.numpy() for name, value in STATE.items()})


def lightning(path: Path) -> None:
    state = {f"model.network.{name}": value for name, value in STATE.items()}
    tree = {"pytorch-lightning_version": "2", "global_step": 9, "state_dict": state}
    torch.save({**tree, "optimizer_states": [OPTIMIZER], "lr_schedulers": [{}]}, path)


def safetensors(path: Path) -> None:
    save_safetensors(path, STATE, {})


ROWS = {
    torch_weights: False,
    torch_training: True,
    jittor_weights: False,
    lightning: True,
    safetensors: False,
}


@pytest.mark.parametrize("write", ROWS)
def test_the_weights_load_strictly(write, tmp_path: Path) -> None:
    write(tmp_path / "file")
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert load_weights(network, tmp_path / "file").problems == 0
    assert all(torch.equal(v, STATE[name]) for name, v in network.state_dict().items())


@pytest.mark.parametrize("write", ROWS)
def test_weights_are_told_from_training_states(write, tmp_path: Path) -> None:
    write(tmp_path / "file")
    assert bool(training_entries(read_any(tmp_path / "file"))) == ROWS[write]


@pytest.mark.parametrize("write", ROWS)
def test_a_failure_leaves_the_model_unchanged(write, tmp_path: Path) -> None:
    write(tmp_path / "file")
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match="2 missing"):
        load_weights(network, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:-40])
    with pytest.raises(CheckpointError):
        load_weights(network, tmp_path / "file")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_prefix_of_lightning_is_removed(tmp_path: Path) -> None:
    lightning(tmp_path / "last.ckpt")
    origin, rules = choose_rules(SOURCE, read_checkpoint(tmp_path / "last.ckpt"))
    assert (origin, rules) == ("segmill", (Prefix("model.network.", ""),))


def test_a_folder_of_shards_is_refused_before_anything(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(CheckpointError, match="dcp_to_torch"):
        load_weights(SOURCE, tmp_path)


def test_the_arrays_of_a_jittor_training_state_are_found(tmp_path: Path) -> None:
    # As jt.save of {"model": ..., "optimizer": ..., "step": ...} leaves it: plain nested arrays.
    tree = {"model": {"w": np.ones(2)}, "optimizer": {"m": [np.ones(2)]}, "step": 3}
    (tmp_path / "state.pkl").write_bytes(pickle.dumps(tree, 4))
    assert list(read_checkpoint(tmp_path / "state.pkl")) == ["w"]
    assert read_any(tmp_path / "state.pkl")["step"] == 3
