"""Values for a module on the meta device: every process reads its own shards and nothing else.

The module is built and sharded without memory; `fill` then gives it memory on the device and
values, from safetensors files or drawn by name. The whole model is never in host memory: of a
sharded parameter the file is read slice by slice.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from segmill.checkpoint.report import compare
from segmill.checkpoint.storage import CheckpointError

Slices = tuple[slice, ...]
SPREAD = 0.02  # of biases and of the weights of norms around 1


@runtime_checkable
class Source(Protocol):
    """Where values come from."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless there is a value for every name, of its shape."""
        ...

    def read(
        self, name: str, shape: tuple[int, ...], part: Slices, device: torch.device
    ) -> Shaped[Tensor, "..."]:
        """A part of a value; the whole has `shape`."""
        ...


def fill(module: nn.Module, source: Source, device: torch.device) -> None:
    """Allocate all of `module`, which is on the meta device, and copy in what `source` has."""
    state = module.state_dict()
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    assert all(each.is_meta for each in tensors.values()), "filled once, all of it at once"
    assert tensors.keys() == state.keys(), "a buffer that no file holds would stay without values"
    source.check({name: tuple(value.shape) for name, value in state.items()})
    module.to_empty(device=device)
    with torch.no_grad():
        for name, target in module.state_dict().items():
            local = target.to_local() if isinstance(target, DTensor) else target
            if local.numel():
                shape = tuple(target.shape)
                local.copy_(source.read(name, shape, _own_part(target), local.device))


class SafetensorsFiles:
    """Values in .safetensors files: one, or several that an index.json beside them lists.

    `files` are read as one; a name in the module is PREFIX + the name in the file. The files stay
    open until `close`, mapped into memory, not read.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._open = ExitStack()
        self._where: dict[str, tuple[Any, str]] = {}
        for prefix, file in files.items():
            for shard in shards_of(file):
                opened = self._open.enter_context(_opened(shard))
                self._where |= {f"{prefix}{name}": (opened, name) for name in opened.keys()}  # noqa: SIM118  (no dictionary)
        self._files = ", ".join(str(file) for file in files.values())

    def __enter__(self) -> "SafetensorsFiles":
        return self

    def __exit__(self, *_raised: object) -> None:
        self._open.close()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless the files hold these names and shapes and no others."""
        zero = np.zeros((), np.float32)
        found = {name: np.broadcast_to(zero, self._slice(name).get_shape()) for name in self._where}
        try:
            compare(found, shapes).raise_unless_allowed((), ())
        except CheckpointError as error:
            raise CheckpointError(f"{self._files}: {error}") from error

    def read(
        self,
        name: str,
        shape: tuple[int, ...],  # noqa: ARG002
        part: Slices,
        device: torch.device,
    ) -> Shaped[Tensor, "..."]:
        """The part alone is read from the disk, in the file's own dtype."""
        return self._slice(name)[part].to(device)

    def _slice(self, name: str) -> Any:
        opened, own_name = self._where[name]
        return opened.get_slice(own_name)


@dataclass(frozen=True)
class Arrays:
    """Values under the module's own names, as `apply_rules` leaves them; files stay mapped."""

    values: Mapping[str, Shaped[np.ndarray, "..."]]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless the names and shapes are these and no others."""
        compare(self.values, shapes).raise_unless_allowed((), ())

    def read(
        self,
        name: str,
        shape: tuple[int, ...],  # noqa: ARG002
        part: Slices,
        device: torch.device,
    ) -> Shaped[Tensor, "..."]:
        """The part alone is copied."""
        own = np.require(self.values[name][part], requirements=["C", "A", "W"])
        return torch.from_numpy(own).to(device)


@dataclass(frozen=True)
class Draws:
    """Random values that depend on the name and the seed only, so that processes agree.

    Matrices keep the size of what passes through them. `given` are values that are not random.
    Another kind of device draws other numbers.
    """

    seed: int = 0
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """There is a value for any name."""
        assert all(shapes[name] == tuple(value.shape) for name, value in self.given.items())

    def read(
        self, name: str, shape: tuple[int, ...], part: Slices, device: torch.device
    ) -> Float[Tensor, "..."]:
        """The part of the whole, which is drawn each time."""
        if name in self.given:
            return self.given[name][part].to(device)
        values = draw(f"{self.seed}.{name}", shape, device)
        if len(shape) > 1:
            return values[part] * prod(shape[1:]) ** -0.5
        return values[part] * SPREAD + (1.0 if name.endswith(".weight") else 0.0)


def draw(name: str, shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "..."]:
    """Standard normal numbers of this name; the same on every device of a kind."""
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator, device=device)


def shards_of(file: Path) -> list[Path]:
    """The files that hold the values: itself, or those that it lists if it is an index."""
    if file.suffix != ".json":
        return [file]
    try:
        names = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} lists no files of weights. Download it again.") from error
    return [file.with_name(name) for name in sorted(names)]


def _opened(file: Path) -> Any:
    try:
        return safetensors.safe_open(str(file), "pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error!s:.160}). Download or copy it again."
        ) from error


def _own_part(target: Tensor) -> Slices:
    """Where this process's part of a tensor lies in the whole."""
    if not isinstance(target, DTensor):
        return tuple(slice(0, size) for size in target.shape)
    sizes, starts = compute_local_shape_and_global_offset(
        target.shape, target.device_mesh, target.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
