"""How long a network takes and how much memory: medians over calls in one process.

Nothing here judges: two numbers may be compared when they come from one process on one machine.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

WARM_UP = 3  # calls before the first timed one: compilation, cuDNN's choice, caches


@dataclass(frozen=True)
class Cost:
    """Seconds of one call, and the most memory that was taken on the GPU (None on the CPU)."""

    median: float
    quartiles_apart: float
    peak_bytes: int | None


def inference_cost(
    network: nn.Module, image: Float[Tensor, "B C H W"], *, bf16: bool, repeats: int
) -> Cost:
    """One forward pass to logits at the network's own stride."""
    network.eval()

    def call() -> None:
        with torch.inference_mode(), _autocast(image.device, bf16):
            network(image)

    return cost_of(call, image.device, repeats=repeats)


def training_cost(
    network: Any,
    image: Float[Tensor, "B C H W"],
    label: Int64[Tensor, "B H W"],
    *,
    bf16: bool,
    repeats: int,
) -> Cost:
    """One step: the network's losses, their gradients, AdamW with a rate that changes nothing."""
    network.train()
    # Rate 0 costs what any other rate does, and random weights do not drift into NaN.
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=0.0, weight_decay=0.0, fused=True)

    def call() -> None:
        with _autocast(image.device, bf16):
            terms = network.losses(image, label)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return cost_of(call, image.device, repeats=repeats)


def cost_of(call: Callable[[], None], device: torch.device, *, repeats: int) -> Cost:
    """Time `call`, which has to work on `device`; its queue is empty before and after each."""
    cuda = device.type == "cuda"
    for _ in range(WARM_UP):
        call()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    first, median, third = statistics.quantiles(seconds, n=4)
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    return Cost(median, third - first, peak)


def _autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
