"""What each process of test_sharded.py does: a sharded module, filled from files and by drawing."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from segmill.checkpoint.sharded import Draws, SafetensorsFiles, fill

CPU = torch.device("cpu")


class Net(nn.Module):
    """Sizes that two processes cannot halve, one of them a single row; and a buffer."""

    table: Tensor

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1))
        self.last = nn.Conv2d(2, 3, 2)
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, image):
        return self.last(image).mean() + self.block(image.flatten(2)[..., :3]).mean()


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def sharded_net() -> Net:
    net = on_meta()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for each in (net.block, net):
        fully_shard(each, mesh=mesh)
    return net


class Counted(SafetensorsFiles):
    """Counts the numbers that are read."""

    numbers = 0

    def read(self, name, shape, part, device):
        values = super().read(name, shape, part, device)
        self.numbers += values.numel()
        return values


def whole(net: nn.Module) -> dict[str, Tensor]:
    return {
        name: (each.full_tensor() if isinstance(each, DTensor) else each).clone()
        for name, each in net.state_dict().items()
    }


def filled_and_drawn(folder: Path) -> dict[str, Any]:
    """Values from one file, from several, and drawn; and how much of the files was read."""
    results: dict[str, Any] = {}
    for file in (folder / "one.safetensors", folder / "several.safetensors.index.json"):
        net = sharded_net()
        with Counted({"": file}) as files:
            fill(net, files, CPU)
        own = sum(
            (each.to_local() if isinstance(each, DTensor) else each).numel()
            for each in net.state_dict().values()
        )
        results[file.name] = whole(net), files.numbers, own
    net = sharded_net()
    fill(net, Draws(seed=3), CPU)
    results["drawn"] = whole(net), 0, 0
    # The module works, so that its own books agree with the new memory.
    loss = net(torch.ones(1, 2, 2, 2))
    loss.backward()
    results["loss"] = loss.detach()
    return results
