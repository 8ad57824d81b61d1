"""Both models over several processes: Lightning's device mesh, torch's `fully_shard` (FSDP2).

Processes share the classes of an image (models/class_split.py) or the images (step_plan.py);
sharding only decides where the weights lie. Weights that are not sharded have their gradients
averaged here. The weights of every block are gathered for as long
as the block runs. Nothing here depends on the number of processes: with one, nothing is sharded.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import (
    Tensor,
    _foreach_copy_,  # pyright: ignore[reportPrivateImportUsage]
    distributed,
    nn,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from segmill.models.combined import CombinedModel
from segmill.models.generative.codec import KLCodec
from segmill.tta.norm_layers import has_batchnorm

# Class counts (five buckets), two kinds of blocks, portrait and landscape, with and without grad.
RECOMPILES = 64
BUCKET = 2**26  # gradients that travel together: 256 MiB in float32


def compile_parts(model: CombinedModel) -> None:
    """The repeated blocks of both networks one by one, an autoencoder's encoder in one piece."""
    guide = model.generative
    encoders = [each.encoder for each in model.modules() if isinstance(each, KLCodec)]
    blocks = repeated_blocks(model.discriminative.network)
    compile_blocks(blocks + ([] if guide is None else guide.blocks()) + encoders)


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
    keep_gathered: bool,
) -> None:
    """Shard each block, then what is left of the network, in place.

    `compute_dtype` is the type in which weights are gathered and used; gradients are always summed
    in float32. Buffers keep their type. With `keep_gathered` weights stay gathered from a forward
    to its backward, which saves gathering them twice; after weights were changed in between,
    `forget_gathered` has to be called.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # Without `keep_gathered` also the outermost weights are given back after every forward: those
    # that change between two forwards without a backward (a teacher's) would not be seen.
    for each in (*blocks, network):
        fully_shard(each, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_gathered)


def forget_gathered(module: nn.Module) -> None:
    """Gather all weights of `module` anew at the next forward."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, all of which have the same ones."""
    for bucket in _buckets([each.grad for each in parameters if each.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(flat)
        flat /= world_size()
        parts = flat.split([gradient.numel() for gradient in bucket])
        _foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """In their order, of at least `BUCKET` numbers each but the last."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        bucket.append(gradient)
        if sum(each.numel() for each in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Blocks in rows of equal ones, as transformers have them; none with BatchNorm inside.

    Those are what is worth compiling: equal code once. BatchNorm's statistics may be exchanged
    while a method is at work (batch_statistics.py), which compiled code does not take well.
    """
    found: list[nn.Module] = []
    for child in network.children():
        is_list = isinstance(child, nn.ModuleList) and _are_equal(list(child))
        blocks = [] if is_list else repeated_blocks(child)
        if is_list or (not blocks and _is_stage(child)):
            blocks = [each for each in child.children() if not has_batchnorm(each)]
        found += blocks
    return found


def _is_stage(module: nn.Module) -> bool:
    """Whether it is a sequence of blocks, as timm's networks have them, not of single layers."""
    blocks = list(module.children()) if isinstance(module, nn.Sequential) else []
    return _are_equal(blocks) and all(list(each.children()) for each in blocks)


def _are_equal(modules: list[nn.Module]) -> bool:
    kinds = {type(each) for each in modules}
    return len(modules) > 1 and len(kinds) == 1 and nn.ModuleList not in kinds


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
    """Processes of the run."""
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1
