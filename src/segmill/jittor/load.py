"""Weights into a network of the Jittor runtime, strictly, and out of it, under torch's names.

These are weights, never a resume point: training that starts from them starts at step 0.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jittor as jt
import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.keys import Rule, apply_rules
from segmill.checkpoint.report import Report, compare

Array = Shaped[np.ndarray, "..."]


@runtime_checkable
class HasBuffers(Protocol):
    """A module of which some attributes are saved but never updated by an optimizer.

    A buffer is a `jt.Var`, or a numpy array where Jittor has no such type.
    """

    buffers: tuple[str, ...]


def load_arrays(
    network: jt.Module,
    arrays: Mapping[str, Array],
    *,
    rules: Sequence[Rule],
    may_miss: Iterable[str] = (),
    may_leave: Iterable[str] = (),
) -> Report:
    """Copy the arrays into the network; refuse, before anything is copied, unless all fits.

    Exceptions are named by whole-key patterns: `may_miss` for what the file lacks, `may_leave` for
    what the network has no place for.
    """
    may_miss, may_leave = tuple(may_miss), tuple(may_leave)
    renamed = apply_rules(arrays, rules)
    report = compare(renamed, shapes_of(network))
    report.raise_unless_allowed(may_miss, may_leave)
    loaded = set(report.loaded)
    for name, module, key in _entries(network):
        if name in loaded:
            _set(module, key, renamed[name])
    return report.excuse(may_miss, may_leave)


def named_arrays(network: jt.Module) -> dict[str, Array]:
    """{name: array} of everything that a file of this network holds, copied."""
    entries = ((name, getattr(module, key)) for name, module, key in _entries(network))
    return {
        name: np.array(value.numpy() if isinstance(value, jt.Var) else value)
        for name, value in entries
    }


def trainable(network: jt.Module) -> dict[str, jt.Var]:
    """{name: variable} of what an optimizer may update: no statistics, no constants."""
    return {
        name: getattr(module, key)
        for name, module, key in _entries(network)
        if key not in _buffers(module)
    }


def shapes_of(network: jt.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of everything that a file of this network holds."""
    return {name: tuple(getattr(module, key).shape) for name, module, key in _entries(network)}


def _entries(network: jt.Module) -> Iterator[tuple[str, jt.Module, str]]:
    """Name, module and attribute of each variable and buffer."""
    for path, module in network.named_modules():
        buffers = _buffers(module)
        for key, value in vars(module).items():
            if isinstance(value, jt.Var) or key in buffers:
                yield (f"{path}.{key}" if path else key), module, key


def _buffers(module: jt.Module) -> tuple[str, ...]:
    return module.buffers if isinstance(module, HasBuffers) else ()


def _set(module: jt.Module, key: str, array: Array) -> None:
    value = getattr(module, key)
    if isinstance(value, jt.Var):
        # Rules may hand out read-only or flipped arrays, which Jittor does not take.
        value.update(jt.array(np.array(array, np.float32, order="C")))
    else:
        setattr(module, key, np.array(array, value.dtype))
