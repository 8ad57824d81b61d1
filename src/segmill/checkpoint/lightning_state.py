"""A training state as Lightning's checkpoint, so that torch goes on where Jittor stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from jaxtyping import Shaped
from torch import nn

from segmill.checkpoint.load import load_arrays, shapes_of
from segmill.checkpoint.training_state import (
    NETWORK,
    TrainingState,
    require_same_network,
    require_same_parameters,
)
from segmill.files import whole_file

Array = Shaped[np.ndarray, "..."]


def write_lightning_state(
    path: Path,
    state: TrainingState,
    *,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write what Lightning restores: weights, AdamW's moments, the steps of its loops.

    `network` and `optimizer` are those that will go on; the weights are loaded into the network,
    which refuses a state of another one.
    """
    require_same_network(state.weights, shapes_of(network))
    load_arrays(network, state.weights)
    weights = {f"{NETWORK}{name}": value for name, value in network.state_dict().items()}
    tree = {
        "epoch": 0,
        "global_step": state.step,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": weights,
        "loops": {"fit_loop": _progress(state.step)},
        "callbacks": {},
        "optimizer_states": [_moments(optimizer, state)],
        "lr_schedulers": [{"step": state.step}],
    }
    # Every process of a run writes this same file.
    with whole_file(path) as scratch:
        torch.save(tree, scratch)


def _moments(optimizer: torch.optim.Optimizer, state: TrainingState) -> dict[str, Any]:
    tree = optimizer.state_dict()
    shapes = {
        name: tuple(parameter.shape)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    for moments in (state.exp_avg, state.exp_avg_sq):
        require_same_parameters(moments, shapes)
    for group in tree["param_groups"]:
        for name, index in zip(group["param_names"], group["params"], strict=True):
            tree["state"][index] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": _tensor(state.exp_avg, name),
                "exp_avg_sq": _tensor(state.exp_avg_sq, name),
            }
    return tree


def _tensor(moments: Mapping[str, Array], name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(moments[name]))


def _progress(step: int) -> dict[str, Any]:
    """The counters of a fit loop that has taken `step` steps of its one endless epoch."""
    loop = lightning.Trainer(logger=False, enable_checkpointing=False).fit_loop.state_dict()
    loop["epoch_loop.state_dict"] = {"_batches_that_stepped": step}
    optimizer = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for counters in (
        loop["epoch_loop.batch_progress"],
        loop["epoch_loop.scheduler_progress"],
        optimizer["step"],
        optimizer["zero_grad"],
    ):
        for part in ("total", "current"):
            counters[part] = dict.fromkeys(counters[part], step)
    for part in ("total", "current"):
        loop["epoch_progress"][part] |= {"ready": 1, "started": 1}
    return loop
