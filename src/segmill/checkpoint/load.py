"""Weights of any origin into a network, strictly; and the one way weights are written.

These are weights, never a resume point: training that starts from them starts at step 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from segmill.checkpoint.choose import HasKeyRules, choose, file_of_run
from segmill.checkpoint.keys import Rule, apply_rules
from segmill.checkpoint.read import read_checkpoint
from segmill.checkpoint.report import Report, compare
from segmill.files import write_whole

Array = Shaped[np.ndarray, "..."]
# Heads, and the norms that dense prediction puts on each output of a Swin Transformer or a Twins.
NOT_IN_TIMM = (r"(?!backbone\.).*", r"backbone\.norm(\d|_list\.\d)\..*")


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

    Tried are the module's own names and each entry of its `key_rules()`.
    """
    rules = module.key_rules() if isinstance(module, HasKeyRules) else {}
    return choose(arrays, shapes_of(module), rules)


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
        return file_of_run(path)
    if not path.exists() and looks_like_hub_id(str(source)):
        from segmill.checkpoint.pretrained import hub_file  # see load_weights

        return hub_file(str(source))
    return path


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of everything that a file of this module holds."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def save_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors, whole or not at all. Tensors that share memory are written each."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    write_whole(path, safetensors.torch.save(tensors, dict(metadata)))


def _as_tensor(array: Array) -> Tensor:
    # Rules may hand out read-only or flipped arrays, which torch does not take.
    return torch.from_numpy(np.require(array, requirements=["C", "A", "W"]))


def looks_like_hub_id(source: str) -> bool:
    """Whether the text has the form `owner/name`."""
    owner, slash, name = source.partition("/")
    plain = all(part.strip("._-") == part and part for part in (owner, name))
    is_file = Path(name).suffix in (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".tar", ".pkl")
    return bool(slash) and plain and "/" not in name and not is_file
