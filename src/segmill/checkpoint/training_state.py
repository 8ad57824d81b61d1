"""Training states: what a run goes on from. Both runtimes read those of both.

torch's is Lightning's `last.ckpt`; Jittor's is `last.pkl`, in the format of `jt.save`. Only AdamW's
moments cross between the runtimes, and no random state does: their generators differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.read import CheckpointError, read_any
from segmill.checkpoint.write_jittor import write_jittor

Array = Shaped[np.ndarray, "..."]
Arrays = dict[str, Array]
STATES = ("last.ckpt", "last.pkl")
NETWORK = "model.network."


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Weights and moments by the network's names after `step` optimizer steps.

    `random`: where the Jittor runtime's stream stands; empty in a state of torch.
    `best`: the best validation score so far, and NaN where the state does not say.
    """

    weights: Arrays
    exp_avg: Arrays
    exp_avg_sq: Arrays
    step: int
    random: Arrays
    best: float


def latest_state(folder: Path) -> Path | None:
    """The training state of a run folder with the most steps; None without any."""
    found = [folder / name for name in STATES if (folder / name).is_file()]
    return max(found, key=lambda path: steps_of(path) or -1, default=None)


def steps_of(path: Path) -> int | None:
    """Steps done in a training state; None for a file of weights alone. Reads it whole first."""
    tree = read_any(path)
    if not isinstance(tree, Mapping):
        return None
    steps = tree.get("global_step")
    return None if steps is None else int(np.asarray(steps).reshape(()))


def write_training_state(path: Path, state: TrainingState) -> None:
    """Write Jittor's form, whole or not at all; `jt.load` opens it, as does `read_checkpoint`."""
    tree: dict[str, Any] = {
        "state_dict": state.weights,
        "optimizer": {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq},
        "random": state.random,
        "global_step": np.array([state.step]),
        "best": np.array([state.best]),
    }
    write_jittor(path, tree)


def read_training_state(path: Path) -> TrainingState:
    """Read either form; CheckpointError says what a file lacks."""
    tree = read_any(path)
    if not isinstance(tree, Mapping) or "global_step" not in tree:
        raise CheckpointError(
            f"{path} holds weights only, no optimizer and no step, so there is nothing to go on "
            f"from. Use weights={path} to start at step 0 from these weights."
        )
    return _of_torch(path, tree) if "optimizer_states" in tree else _of_jittor(path, tree)


def _of_jittor(path: Path, tree: Mapping[str, Any]) -> TrainingState:
    try:
        return TrainingState(
            weights=dict(tree["state_dict"]),
            exp_avg=dict(tree["optimizer"]["exp_avg"]),
            exp_avg_sq=dict(tree["optimizer"]["exp_avg_sq"]),
            step=int(tree["global_step"][0]),
            random=dict(tree["random"]),
            best=float(tree["best"][0]),
        )
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} is no training state of segmill: {error!r}.") from error


def _of_torch(path: Path, tree: Mapping[str, Any]) -> TrainingState:
    (optimizer,) = tree["optimizer_states"]
    weights = {
        name.removeprefix(NETWORK): value
        for name, value in tree["state_dict"].items()
        if name.startswith(NETWORK)
    }
    moments: dict[str, Arrays] = {"exp_avg": {}, "exp_avg_sq": {}}
    for group in optimizer["param_groups"]:
        for name, index in zip(group["param_names"], group["params"], strict=True):
            for kind, arrays in moments.items():
                if kind not in optimizer["state"].get(index, {}):
                    raise CheckpointError(
                        f"{path} holds no {kind} of {name}: its optimizer is not AdamW, and only "
                        "AdamW's state can be carried to another runtime."
                    )
                arrays[name] = optimizer["state"][index][kind]
    step = int(np.asarray(tree["global_step"]).reshape(()))
    return TrainingState(weights=weights, step=step, random={}, best=float("nan"), **moments)
