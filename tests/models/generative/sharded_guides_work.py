"""What each process of test_sharded_guides.py does, and one process alone for comparison."""

from typing import Any

import torch
from tiny_pipelines import guide
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from segmill.tta.sharding import shard

GUIDES = ("sd3_tiny", "sd15_tiny")
CLASSES = torch.tensor([[0, 1, 8], [2, 3, 8]])


def predictions_and_gradients() -> dict[str, Any]:
    """In float32 and, sharded or not, in bfloat16, of each guide."""
    results: dict[str, Any] = {
        f"{name}, {dtype}": _predicted(name, mixed=dtype == "bfloat16")
        for name in GUIDES
        for dtype in ("float32", "bfloat16")
    }
    # Not in the tests' own process, where every call is looked at by the checks of shapes.
    if distributed.is_initialized():
        results["compiled"] = _compiled_without_breaks()
    return results


def _compiled_without_breaks() -> float:
    """Largest difference that compiling the blocks of SD3 makes."""
    model, compiled = (guide("sd3_tiny") for _ in range(2))
    for each in (model, compiled):
        each.fill(torch.device("cpu"))
    for block in compiled.blocks():
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    noisy_latent, t = _noisy(model)
    with torch.no_grad():
        predicted = [each.predict(noisy_latent, t, CLASSES) for each in (model, compiled)]
    return (predicted[0] - predicted[1]).abs().max().item()


def _predicted(name: str, *, mixed: bool) -> dict[str, Any]:
    model = guide(name)
    if distributed.is_initialized():
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        dtype = torch.bfloat16 if mixed else None
        shard(model.network, model.blocks(), mesh, compute_dtype=dtype, keep_gathered=True)
    model.fill(torch.device("cpu"))
    noisy_latent, t = _noisy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        prediction = model.predict(noisy_latent, t, CLASSES)
    (prediction * torch.linspace(-1, 1, prediction.numel()).view_as(prediction)).sum().backward()
    return {
        "prediction": prediction.detach(),
        "gradients": {key: _whole(each) for key, each in model.network.named_parameters()},
        "numbers": sum(_local(each).numel() for each in model.network.parameters()),
    }


def _noisy(model: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    latent = model.encode(pixels)
    t = torch.tensor([0.25, 0.331])
    return model.noisy(latent, torch.randn(latent.shape, generator=generator), t)[0], t


def _whole(parameter: nn.Parameter) -> Tensor | None:
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _local(parameter: nn.Parameter) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
