"""`segmill bench model=NAME`: what a model costs on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from segmill.configuration import Invocation, build
from segmill.cost import count_flops, count_parameters
from segmill.errors import SegmillError
from segmill.measure import Cost, inference_cost, training_cost

log = logging.getLogger(__name__)


def run(config: DictConfig, context: Invocation) -> None:  # noqa: ARG001
    """Build the model with random weights, time it, print one table."""
    if min(config.batch, *config.size) < 1 or config.repeats < 2:
        raise SegmillError(
            f"batch={config.batch}, size={list(config.size)} and repeats={config.repeats}: sizes "
            "start at 1, and a median needs 2 repeats."
        )
    device = chosen_device(config.accelerator)
    bf16 = config.precision == "bf16-mixed" or (
        config.precision == "auto" and device.type == "cuda"
    )
    torch.manual_seed(config.seed)
    network: nn.Module = build(config.model).network
    height, width = config.size
    flops = count_flops(network, channels=config.data.channels, height=height, width=width)
    log.info(
        "%s: %.2f M parameters, %.1f GFLOP an image of %d x %d (2 per multiply-add)",
        config.model_name,
        count_parameters(network) / 1e6,
        flops / 1e9,
        height,
        width,
    )
    table = Table(title=f"{_where(device)}, {'bf16' if bf16 else 'float32'}, batch {config.batch}")
    for heading in ("", "median", "spread", "images/s", "GFLOP/s", "memory"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, cost, work in _costs(network, config, device, bf16, flops):
        table.add_row(name, *_row(cost, batch=config.batch, work=work))
    Console().print(table)
    log.info("spread: distance of the quartiles; memory: the most that was taken on the GPU")


def _costs(
    network: nn.Module, config: DictConfig, device: torch.device, bf16: bool, flops: int
) -> Iterator[tuple[str, Cost, int]]:
    """Each measurement with the operations that it takes for an image."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    network.to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    if config.compile:
        network.forward = torch.compile(network.forward)
    shape = (config.batch, config.data.channels, *config.size)
    image = torch.randn(shape, device=device).to(memory_format=layout)
    label = torch.randint(0, config.data.num_classes, (config.batch, *config.size), device=device)
    settings: dict[str, Any] = {"bf16": bf16, "repeats": config.repeats}
    yield "inference", inference_cost(network, image, **settings), flops
    if config.train:
        # The gradient of a product is two products; the optimizer and the loss are not counted.
        yield "training", training_cost(network, image, label, **settings), 3 * flops


def _row(cost: Cost, *, batch: int, work: int) -> tuple[str, ...]:
    peak = "-" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**30:.2f} GiB"
    return (
        f"{1e3 * cost.median:.2f} ms",
        f"{1e3 * cost.quartiles_apart:.2f} ms",
        f"{batch / cost.median:.1f}",
        f"{work * batch / cost.median / 1e9:.0f}",
        peak,
    )


def chosen_device(accelerator: str) -> torch.device:
    """The device that `accelerator` (auto | cpu | gpu) means here."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise SegmillError(
            "accelerator=gpu, but no CUDA device is visible; segmill doctor says why."
        )
    cuda = accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
