"""Both models over several processes: Lightning's device mesh, torch's `fully_shard` (FSDP2).

Every process sees the same image, and each takes a part of the classes (models/class_split.py);
sharding only decides where the weights lie. The weights of every block are gathered for as long
as the block runs. Nothing here depends on the number of processes: with one, nothing is sharded.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

# Class counts (five buckets), two kinds of blocks, portrait and landscape, with and without grad.
RECOMPILES = 64


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile the forward of each block; equal blocks share the code, so it is compiled once.

    Only `forward`, not the module: the hooks that gather a block's weights stay outside.
    """
    torch._dynamo.config.recompile_limit = RECOMPILES
    for block in blocks:
        compiled: Callable[..., object] = torch.compile(block.forward, dynamic=False)
        block.forward = compiled


def shard(
    network: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype | None,
) -> None:
    """Shard each block, then what is left of the network, in place.

    `compute_dtype` is the type in which weights are gathered and used; gradients are always summed
    in float32. Buffers keep their type.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # Also the outermost weights are given back after every forward: weights that change between
    # two forwards without a backward (a reset, a teacher's) would otherwise not be seen.
    for each in (*blocks, network):
        fully_shard(each, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is. They share memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Snapshot:
    """Weights as they were, on the host: this process's shards only, and bit for bit.

    Pinned where there is a GPU, so that putting them back takes no longer than the bus.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._live = tensors
        self._saved = {name: self._copy(local(each.detach())) for name, each in tensors.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put every weight back, in place."""
        for name, tensor in self._live.items():
            local(tensor.detach()).copy_(self._saved[name], non_blocking=True)

    @staticmethod
    def _copy(tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return host.copy_(tensor)


def world_size() -> int:
    """Processes that work on the same image."""
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1
