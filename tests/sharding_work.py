"""What one of two processes does in test_sharding.py, and one process alone for comparison."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from segmill.tta.sharding import Snapshot, forget_gathered, local, shard, world_size

INPUT = torch.linspace(-1, 1, 24).view(4, 6)


class Stack(nn.Module):
    """Two equal blocks, weights outside of them, and a buffer in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.register_buffer("scale", torch.full((5,), 1 / 3))

    def forward(self, values: Tensor) -> Tensor:
        values = self.first(values)
        for block in self.blocks:
            values = torch.tanh(block(values))
        return values * self.scale


def stack(*, compute_dtype: torch.dtype | None, keep_gathered: bool) -> Stack:
    """The same weights every time, shared out where there are several processes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Stack()
    if world_size() > 1:
        mesh = init_device_mesh("cpu", (world_size(),))
        shard(
            network,
            network.blocks,
            mesh,
            compute_dtype=compute_dtype,
            keep_gathered=keep_gathered,
        )
    return network


def whole(tensor: Tensor) -> Tensor:
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found.clone()


def results() -> dict[str, Any]:
    """Outputs and gradients before and after a step, and after the snapshot was put back."""
    return {
        **{f"gathered {keep}": _steps(keep_gathered=keep) for keep in (False, True)},
        "bfloat16": _mixed(),
        "processes": world_size(),
    }


def _steps(*, keep_gathered: bool) -> dict[str, Any]:
    network = stack(compute_dtype=None, keep_gathered=keep_gathered)
    parameters = dict(network.named_parameters())
    snapshot = Snapshot({**parameters, **dict(network.named_buffers())})
    before = {name: local(each.detach()).clone() for name, each in parameters.items()}
    output = network(INPUT)
    output.square().sum().backward()
    gradients = {
        name: whole(each.grad) for name, each in parameters.items() if each.grad is not None
    }
    torch.optim.SGD(parameters.values(), lr=0.5).step()
    forget_gathered(network)
    with torch.no_grad():
        stepped = network(INPUT)
    snapshot.restore()
    forget_gathered(network)
    with torch.no_grad():
        restored = network(INPUT)
    return {
        "output": output.detach(),
        "gradients": gradients,
        "stepped": stepped,
        "restored": restored,
        "bits": all(
            torch.equal(local(each.detach()), before[name]) for name, each in parameters.items()
        ),
        "numbers": sum(local(each.detach()).numel() for each in parameters.values()),
    }


def _mixed() -> dict[str, Any]:
    network = stack(compute_dtype=torch.bfloat16, keep_gathered=True)
    seen: list[torch.dtype] = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda each, _: seen.append(each.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = network(INPUT)
    output.float().sum().backward()
    return {
        "gathered": seen,
        "gradients": [each.grad.dtype for each in network.parameters() if each.grad is not None],
        "buffer": network.scale.dtype,
        "weights": [each.dtype for each in network.parameters()],
    }
