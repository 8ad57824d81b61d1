"""`segmill train --dry-run`: the resolved plan, and one real step that shows it holds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from segmill.commands.trainer import world_size
from segmill.cost import count_flops, count_parameters
from segmill.errors import SegmillError
from segmill.photometric import photometric_distortion

if TYPE_CHECKING:
    from segmill.commands.train import Parts


def dry_run(config: DictConfig, parts: Parts) -> None:
    """Print the configuration, the plan as a table, and the loss of one step on the CPU or GPU."""
    console = Console()
    console.print(OmegaConf.to_yaml(config, resolve=True), markup=False, highlight=False)
    table = Table(title="Plan", show_header=False)
    for name, value in plan(config, parts).items():
        table.add_row(name, value)
    console.print(table)
    console.print(_one_step(parts))
    console.print("Next: the same command without --dry-run")


def plan(config: DictConfig, parts: Parts) -> dict[str, str]:
    """What the run would do, as text."""
    settings, data = parts.settings, parts.data
    world = world_size(settings)
    share = data.batch_size // (world * settings.accumulate)
    height, width = data.crop
    network = parts.segmenter.network
    flops = count_flops(network, channels=data.channels, height=height, width=width)
    seen = settings.max_steps * data.batch_size
    images = len(data.dataset(data.train_split))
    rates = _rates(parts)
    return {
        "model": f"{config.model_name}: {count_parameters(network) / 1e6:.2f} M parameters, "
        f"{flops / 1e9:.3g} GFLOPs at {height} x {width}",
        "weights": parts.weights,
        "data": f"{data.name}: {images} training images, {len(data.classes)} classes",
        "global batch": f"{data.batch_size} = {world} device(s) x {share} image(s) x "
        f"{settings.accumulate} accumulated",
        "length": f"{settings.max_steps} steps = {seen} images = {seen / images:.1f} epochs, "
        f"validation {settings.validation or f'every {settings.val_every}'}",
        "learning rate": ", ".join(f"step {step}: {rate:.3g}" for step, rate in rates.items()),
        "precision": settings.precision,
        "protocol": ", ".join(f"{k} {v}" for k, v in data.protocol.stamp().items()),
    }


def _rates(parts: Parts) -> dict[int, float]:
    """Learning rate of the first parameter group at the start, through the run, and at its end."""
    last = parts.settings.max_steps
    module = parts.module
    optimizer = module.optimizer_settings.build(module.model.network)
    base = float(optimizer.param_groups[0]["lr"])
    steps = sorted({0, last // 4, last // 2, 3 * last // 4, max(last - 1, 0)})
    return {step: module.schedule_settings.rate(base, step, last) for step in steps}


def _one_step(parts: Parts) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if parts.settings.accelerator == "cpu":
        device = torch.device("cpu")
    model = parts.segmenter.model.to(device).train()
    batch = next(iter(parts.data.train_dataloader()))
    started = time.perf_counter()
    image = photometric_distortion(batch["image"].to(device), batch["jitter"].to(device))
    terms = model.losses(image, batch["label"].to(device), batch["valid"].to(device))
    loss = torch.stack(list(terms.values())).sum()
    optimizer = parts.module.optimizer_settings.build(model.network)
    loss.backward()
    optimizer.step()
    if not torch.isfinite(loss):
        raise SegmillError(
            f"One step on {device} gave the loss {float(loss)}: {terms}. Check the labels "
            f"(segmill data check) and the weights before training."
        )
    named = ", ".join(f"{name} {float(value.detach()):.4f}" for name, value in terms.items())
    seconds = time.perf_counter() - started
    return f"One step on {device} in {seconds:.1f} s: loss {float(loss.detach()):.4f} ({named})"
