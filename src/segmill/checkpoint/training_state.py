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
from segmill.checkpoint.report import compare
from segmill.checkpoint.write_jittor import write_jittor

Array = Shaped[np.ndarray, "..."]
Arrays = dict[str, Array]
STATES = ("last.ckpt", "last.pkl")
NETWORK = "model.network."
OF_TORCH = ("state_dict", "optimizer_states", "loops", "pytorch-lightning_version")
KINDS = (Mapping, list, str, np.ndarray)  # what these entries may be
OF_JITTOR = ("state_dict", "optimizer", "random", "best")


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
    return None if steps is None else _number(path, steps)


def require_training_state(path: Path) -> None:
    """Refuse what no run of segmill wrote to go on from: weights, states of other libraries."""
    tree = _tree_of_state(path)
    entries = OF_TORCH if "optimizer_states" in tree else OF_JITTOR
    missing = [name for name in entries if not isinstance(tree.get(name), KINDS)]
    if entries is OF_TORCH and not (missing or network_weights(tree)):
        missing = [f"weights called {NETWORK}*"]
    if entries is OF_TORCH and not (missing or tree["optimizer_states"]):
        missing = ["the state of an optimizer"]
    if missing:
        raise _foreign(path, f"it lacks {', '.join(missing)}")
    _number(path, tree["global_step"])


def require_same_network(weights: Mapping[str, Array], shapes: Mapping[str, Any]) -> None:
    """Refuse to go on with the weights of another network than that of these `shapes`."""
    report = compare(weights, shapes)
    if report.problems:
        raise CheckpointError(
            f"The training state is of another network.\n{report.text()}\nTo go on, leave out "
            "what changes the model; or start at step 0 with weights=FILE, which says what may "
            "differ."
        )


def require_same_parameters(moments: Mapping[str, Array], shapes: Mapping[str, Any]) -> None:
    """Refuse AdamW's moments of other parameters than those of these `shapes`."""
    found = {name: tuple(array.shape) for name, array in moments.items()}
    if wrong := {name for name in {*found, *shapes} if found.get(name) != shapes.get(name)}:
        raise CheckpointError(
            f"The optimizer's state is of other parameters: {len(wrong)} names or shapes differ, "
            f"{min(wrong)!r} among them. Resume with the model and the optimizer of that run."
        )


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
    tree = _tree_of_state(path)
    try:
        return _of_torch(path, tree) if "optimizer_states" in tree else _of_jittor(path, tree)
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _foreign(path, f"{type(error).__name__}: {error!s:.80}") from error


def network_weights(tree: Mapping[str, Any]) -> Arrays:
    """The network's part of a state of torch, by the network's names."""
    return {
        name.removeprefix(NETWORK): value
        for name, value in tree["state_dict"].items()
        if str(name).startswith(NETWORK)
    }


def _tree_of_state(path: Path) -> Mapping[str, Any]:
    tree = read_any(path)
    if not isinstance(tree, Mapping) or tree.get("global_step") is None:
        raise CheckpointError(
            f"{path} holds weights only, no optimizer and no step, so there is nothing to go on "
            f"from. Use weights={path} to start at step 0 from these weights."
        )
    return tree


def _of_jittor(path: Path, tree: Mapping[str, Any]) -> TrainingState:
    return TrainingState(
        weights=dict(tree["state_dict"]),
        exp_avg=dict(tree["optimizer"]["exp_avg"]),
        exp_avg_sq=dict(tree["optimizer"]["exp_avg_sq"]),
        step=_number(path, tree["global_step"]),
        random=dict(tree["random"]),
        best=float(tree["best"][0]),
    )


def _of_torch(path: Path, tree: Mapping[str, Any]) -> TrainingState:
    (optimizer,) = tree["optimizer_states"]
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
    return TrainingState(
        weights=network_weights(tree),
        step=_number(path, tree["global_step"]),
        random={},
        best=float("nan"),
        **moments,
    )


def _number(path: Path, steps: Any) -> int:
    try:
        return int(np.asarray(steps).reshape(()))
    except (TypeError, ValueError) as error:
        raise _foreign(path, f"its global_step is {steps!r:.40}") from error


def _foreign(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no training state of segmill: {why}. Use weights={path} to start at step 0 "
        "from its weights."
    )
