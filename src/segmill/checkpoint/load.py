"""Weights of any origin into a network, strictly; and the one way weights are written.

These are weights, never a resume point: training that starts from them starts at step 0.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from segmill.checkpoint.keys import Prefix, Rule, apply_rules
from segmill.checkpoint.read import CheckpointError, read_checkpoint
from segmill.checkpoint.report import Report, compare
from segmill.files import write_whole

Array = Shaped[np.ndarray, "..."]
OWN = "segmill"
RUN_WEIGHTS = "model.safetensors"
PREFIX_DEPTH = 3
# Heads, and the norms that dense prediction puts on each output of a Swin Transformer or a Twins.
NOT_IN_TIMM = (r"(?!backbone\.).*", r"backbone\.norm(\d|_list\.\d)\..*")


@runtime_checkable
class HasKeyRules(Protocol):
    """A network that says how other libraries name its weights."""

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """{origin: rules from its file's keys to this network's}."""
        ...


def load_arrays(
    module: nn.Module,
    arrays: Mapping[str, Array],
    *,
    rules: Sequence[Rule] = (),
    may_miss: Iterable[str] = (),
    may_leave: Iterable[str] = (),
) -> Report:
    """Copy the arrays into the module; refuse, before anything is copied, unless all fits.

    Exceptions are named by whole-key patterns: `may_miss` for what the file lacks, `may_leave` for
    what the module has no place for.
    """
    may_miss, may_leave = tuple(may_miss), tuple(may_leave)
    renamed = apply_rules(arrays, rules)
    report = compare(renamed, shapes_of(module))
    report.raise_unless_allowed(may_miss, may_leave)
    state = module.state_dict()
    for name in report.loaded:
        state[name].copy_(_as_tensor(renamed[name]))
    return report.excuse(may_miss, may_leave)


def choose_rules(module: nn.Module, arrays: Mapping[str, Array]) -> tuple[str, tuple[Rule, ...]]:
    """Whose names the file uses, and the rules from them: what leaves the fewest problems.

    Tried are the module's own names and each entry of its `key_rules()`, in files as they are,
    without a prefix that most keys share (`module.`, `model.network.`), and for a backbone alone.
    """
    shapes = shapes_of(module)
    names_and_shapes = outline(arrays)
    origins = {OWN: (), **(module.key_rules() if isinstance(module, HasKeyRules) else {})}
    best: tuple[int, str, tuple[Rule, ...]] | None = None
    for prefix in _prefixes(arrays, shapes):
        for origin, own_rules in origins.items():
            rules = (*prefix, *own_rules)
            try:
                problems = compare(apply_rules(names_and_shapes, rules), shapes).problems
            except CheckpointError:
                continue  # a file of another origin may well lack a part of what is joined
            if best is None or problems < best[0]:
                best = problems, origin, rules
    assert best is not None  # the module's own names, unchanged, never fail
    return best[1:]


def load_weights(
    module: nn.Module,
    source: str | Path,
    *,
    may_miss: Iterable[str] = (),
    may_leave: Iterable[str] = (),
) -> Report:
    """Load a checkpoint file, a run folder, a hub id (`owner/name`), or `timm`.

    `timm` loads the pretrained weights of the network's timm backbone and nothing else.
    """
    if str(source) == "timm":
        # timm takes seconds to import and only this source needs it.
        from segmill.checkpoint.pretrained import timm_weights

        arrays = timm_weights(module)
        may_miss, may_leave = (*may_miss, *NOT_IN_TIMM), (*may_leave, r".*")
    else:
        arrays = read_checkpoint(find_file(source))
    _origin, rules = choose_rules(module, arrays)
    return load_arrays(module, arrays, rules=rules, may_miss=may_miss, may_leave=may_leave)


def find_file(source: str | Path) -> Path:
    """The file that `weights=SOURCE` means; a hub id is downloaded unless it is cached."""
    path = Path(source)
    if path.is_dir() and not (path / ".metadata").is_file():
        return _file_of_run(path)
    if not path.exists() and looks_like_hub_id(str(source)):
        from segmill.checkpoint.pretrained import hub_file  # see load_weights

        return hub_file(str(source))
    return path


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of everything that a file of this module holds."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def outline(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Zeros of the same names, types and shapes that take no memory."""
    return {n: np.broadcast_to(np.zeros((), a.dtype), a.shape) for n, a in arrays.items()}


def save_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors, whole or not at all. Tensors that share memory are written each."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    write_whole(path, safetensors.torch.save(tensors, dict(metadata)))


def _as_tensor(array: Array) -> Tensor:
    # Rules may hand out read-only or flipped arrays, which torch does not take.
    return torch.from_numpy(np.require(array, requirements=["C", "A", "W"]))


def _prefixes(
    arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[Prefix, ...]]:
    """No prefix; each dotted prefix that most keys share, removed; each with `backbone.` added."""
    counts = Counter(
        prefix
        for name in arrays
        for depth in range(1, PREFIX_DEPTH + 1)
        if (prefix := ".".join(name.split(".")[:depth])) != name
    )
    common = [prefix for prefix, count in counts.items() if 2 * count > len(arrays)]
    removed: list[tuple[Prefix, ...]] = [(), *((Prefix(f"{each}.", ""),) for each in common)]
    if not any(name.startswith("backbone.") for name in shapes):
        return removed
    return [*removed, *((*each, Prefix("", "backbone.")) for each in removed)]


def _file_of_run(folder: Path) -> Path:
    weights = folder / RUN_WEIGHTS
    if not weights.is_file():
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".ckpt", ".pth", ".pt"))
        raise CheckpointError(
            f"{folder} has no {RUN_WEIGHTS}, which a finished run leaves. "
            + (f"Name a file: weights={folder / others[0]}" if others else "Is it a run folder?")
        )
    return weights


def looks_like_hub_id(source: str) -> bool:
    """Whether the text has the form `owner/name`."""
    owner, slash, name = source.partition("/")
    plain = all(part.strip("._-") == part and part for part in (owner, name))
    is_file = Path(name).suffix in (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".tar", ".pkl")
    return bool(slash) and plain and "/" not in name and not is_file
