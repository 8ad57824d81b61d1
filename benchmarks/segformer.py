"""Part of benchmarks 7 and 8: SegFormer at 512 x 512 against transformers' class, same weights.

Inference to low-resolution logits, and a training step (cross-entropy at full resolution, backward;
no optimizer). Ours is the variant with the same head, and for comparison the one with
MMSegmentation's. Logits are compared first. All run in turn in one process; on a CPU, processor
time is counted, so that other programs matter less. bfloat16 on CUDA.

    python benchmarks/segformer.py [--device cuda] [--size b0] [--batch 1] [--repeats 20]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import segmill
from segmill.checkpoint.load import choose_rules, load_arrays
from segmill.models.families.segformer_hf import SegFormerHF

DEPTHS = {
    "b0": (2, 2, 2, 2),
    "b1": (2, 2, 2, 2),
    "b2": (3, 4, 6, 3),
    "b3": (3, 4, 18, 3),
    "b4": (3, 8, 27, 3),
    "b5": (3, 6, 40, 3),
}


def theirs(size: str, attention: str) -> SegFormerHF:
    """transformers' network with random weights, eager or scaled_dot_product attention."""
    network = SegFormerHF(
        in_channels=3,
        channels=(32, 64, 160, 256) if size == "b0" else (64, 128, 320, 512),
        depths=DEPTHS[size],
        num_heads=(1, 2, 5, 8),
        reductions=(8, 4, 2, 1),
        mlp_ratio=4,
        drop_path_rate=0.1,
        head_channels=256 if size in ("b0", "b1") else 768,
        dropout=0.1,
        num_classes=150,
    )
    network.model.set_attn_implementation(attention)
    return network


def their_loss(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """As in transformers: the upsampled logits in memory."""
    wide = F.interpolate(network(image), label.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(wide, label, ignore_index=255)


def our_loss(network: Any, image: Tensor, label: Tensor) -> Tensor:
    """The sum of the network's losses."""
    return torch.stack(list(network.losses(image, label).values())).sum()


def step(loss: Callable, network: nn.Module, image: Tensor, label: Tensor) -> None:
    """Forward and backward."""
    network.zero_grad()
    loss(network, image, label).backward()


def interleaved(calls: dict[str, Callable[[], object]], device: str, repeats: int) -> dict:
    """Median seconds and the quartiles' distance."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            started = clock()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                seconds[name].append(clock() - started)
    quarters = {name: statistics.quantiles(values, n=4) for name, values in seconds.items()}
    return {name: (values[1], values[2] - values[0]) for name, values in quarters.items()}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="b0", choices=DEPTHS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device, size = options.device, options.size
    torch.manual_seed(0)
    eager, sdpa = theirs(size, "eager"), theirs(size, "sdpa")
    sdpa.load_state_dict(eager.state_dict())
    linear = segmill.load(f"segformer_mit-{size}_linear", num_classes=150).network
    arrays = {name: value.numpy() for name, value in eager.model.state_dict().items()}
    rules = choose_rules(linear, arrays)[1]
    load_arrays(linear, arrays, rules=rules)
    conv = segmill.load(f"segformer_mit-{size}", num_classes=150).network
    image = torch.randn(options.batch, 3, 512, 512, device=device)
    label = torch.randint(0, 150, (options.batch, 512, 512), device=device)
    networks = {
        "ours": linear,
        "ours, MMSegmentation's head": conv,
        "transformers, eager": eager,
        "transformers, sdpa": sdpa,
    }
    for network in networks.values():
        network.to(device).eval().requires_grad_(True)
    with torch.no_grad():
        torch.testing.assert_close(linear(image), eager(image), rtol=0, atol=1e-4)
    table = Table(title=f"SegFormer {size.upper()}, 512 x 512, batch {options.batch}, {device}")
    for heading in ("what", "who", "median", "quartiles apart", "ratio"):
        table.add_column(heading)

    def infer(network: nn.Module) -> Callable[[], object]:
        return lambda: network(image)

    def train(network: nn.Module) -> Callable[[], object]:
        loss = their_loss if isinstance(network, SegFormerHF) else our_loss
        return lambda: step(loss, network, image, label)

    for what, make, gradient in (("inference", infer, False), ("training step", train, True)):
        for network in networks.values():
            network.train(gradient)
        calls = {name: make(network) for name, network in networks.items()}
        with (
            torch.set_grad_enabled(gradient),
            torch.autocast(device, torch.bfloat16, enabled=device == "cuda"),
        ):
            timings = interleaved(calls, device, options.repeats if not gradient else 5)
        for name, (median, apart) in timings.items():
            ratio = f"{median / timings['ours'][0]:.2f}x"
            table.add_row(what, name, f"{1e3 * median:.1f} ms", f"{1e3 * apart:.1f} ms", ratio)
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
