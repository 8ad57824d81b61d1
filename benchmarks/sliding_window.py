"""Benchmark 5: class map of a large image by sliding windows, SegFormer-B0, 512 / 341.

Ours against the two usual loops: MMSegmentation's (every window's logits padded to the whole
canvas and added) and the one that adds into a slice of the canvas. The limit is the network alone
on the same windows. All run in turn in one process on the same weights; labels are compared first.
On a CPU, processor time is counted, so that other programs matter less.

    python benchmarks/sliding_window.py [--device cuda] [--classes 150] [--repeats 20] [--tail]

With --tail the network is a lookup of ready logits: what is left is the work after it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import segmill
from segmill.inference import WINDOWS_PER_BATCH, Network, predict_label
from segmill.protocol import Protocol
from segmill.windows import window_starts

WINDOW, STRIDE = 512, 341
SIZES = ((512, 1194), (1024, 1024), (1024, 2048), (2048, 4096))
PROTOCOL = Protocol(
    name="slide",
    scale=None,
    multiple=None,
    mode="slide",
    window=(WINDOW, WINDOW),
    stride=(STRIDE, STRIDE),
    ratios=(1.0,),
    flip=False,
    pad_divisor=None,
    align_corners=False,
    ignore_index=255,
)


def corners(image: Float[Tensor, "1 C H W"]) -> list[tuple[int, int]]:
    """Top left corners of the windows."""
    height, width = image.shape[-2:]
    rows, columns = (window_starts(side, WINDOW, STRIDE).tolist() for side in (height, width))
    return [(y, x) for y in rows for x in columns]


def upsampled(network: Network, image: Tensor, y: int, x: int) -> Float[Tensor, "1 K h w"]:
    """Logits of one window at its own size, as both loops make them."""
    logits = network(image[..., y : y + WINDOW, x : x + WINDOW])
    return F.interpolate(logits, (WINDOW, WINDOW), mode="bilinear", align_corners=False)


def padded_loop(network: Network, image: Float[Tensor, "1 C H W"]) -> Integer[Tensor, "1 H W"]:
    """MMSegmentation 1.2.2's algorithm: work grows with windows times canvas."""
    height, width = image.shape[-2:]
    total, count = None, image.new_zeros((1, 1, height, width))
    for y, x in corners(image):
        logits = upsampled(network, image, y, x)
        padded = F.pad(logits, (x, width - x - WINDOW, y, height - y - WINDOW))
        total = padded if total is None else total + padded
        count[..., y : y + WINDOW, x : x + WINDOW] += 1
    assert total is not None
    return (total / count).argmax(dim=1)


def inplace_loop(network: Network, image: Float[Tensor, "1 C H W"]) -> Integer[Tensor, "1 H W"]:
    """The same numbers with a slice of the canvas added to in place."""
    height, width = image.shape[-2:]
    total, count = None, image.new_zeros((1, 1, height, width))
    for y, x in corners(image):
        logits = upsampled(network, image, y, x)
        if total is None:
            total = image.new_zeros((1, logits.shape[1], height, width))
        total[..., y : y + WINDOW, x : x + WINDOW] += logits
        count[..., y : y + WINDOW, x : x + WINDOW] += 1
    assert total is not None
    return (total / count).argmax(dim=1)


def ours(network: Network, image: Float[Tensor, "1 C H W"]) -> Integer[Tensor, "1 H W"]:
    """What `segmill eval protocol=slide` runs."""
    return predict_label(network, [image], (image.shape[2], image.shape[3]), PROTOCOL)


def network_alone(network: Network, image: Float[Tensor, "1 C H W"]) -> Float[Tensor, "B K h w"]:
    """The limit: the windows through the network in batches, nothing done with the logits."""
    windows = [image[..., y : y + WINDOW, x : x + WINDOW] for y, x in corners(image)]
    starts = range(0, len(windows), WINDOWS_PER_BATCH)
    return [network(torch.cat(windows[start : start + WINDOWS_PER_BATCH])) for start in starts][-1]


CONTESTANTS = (ours, padded_loop, inplace_loop, network_alone)


@dataclass
class Timing:
    """Seconds of each repetition, and MiB of device memory at the peak (CUDA only)."""

    seconds: list[float]
    peak: float = 0.0

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def text(self) -> str:
        """Median and spread in milliseconds, and the memory."""
        quarter = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else [0, 0, 0]
        memory = f", {self.peak:.0f} MiB" if self.peak else ""
        return f"{1e3 * self.median:.1f} ms ± {5e2 * (quarter[2] - quarter[0]):.1f}{memory}"


def interleaved(
    network: Network, image: Float[Tensor, "1 C H W"], repeats: int
) -> dict[Callable, Timing]:
    """Time the contestants in turn, so that whatever else the machine does hits all of them."""
    timings = {contestant: Timing([]) for contestant in CONTESTANTS}
    clock = time.perf_counter if image.is_cuda else time.process_time
    for _ in range(repeats):
        for contestant, timing in timings.items():
            if image.is_cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = clock()
            contestant(network, image)
            if image.is_cuda:
                torch.cuda.synchronize()
                timing.peak = torch.cuda.max_memory_allocated() / 2**20
            timing.seconds.append(clock() - started)
    return timings


def add_rows(
    table: Table, network: Network, size: tuple[int, int], options: argparse.Namespace
) -> None:
    """Compare on one image size, after the labels were found equal."""
    torch.manual_seed(0)
    image = torch.randn(1, 3, *size, device=options.device)
    reference = inplace_loop(network, image)
    differing = (ours(network, image) != reference).float().mean().item()
    # Batched and single windows differ in the last bits of the network, so near ties may flip.
    assert differing <= 1e-4, f"{differing:.2%} of the labels differ"
    del reference
    timings = interleaved(network, image, options.repeats)
    mine, limit = timings[ours], timings[network_alone]
    for peer in (padded_loop, inplace_loop):
        table.add_row(
            f"{size[0]} x {size[1]}, {len(corners(image))} windows",
            peer.__name__,
            mine.text(),
            timings[peer].text(),
            f"{timings[peer].median / mine.median:.2f}x",
            limit.text(),
            f"{limit.median / mine.median:.0%}",
        )


def ready_logits(classes: int, device: str) -> Network:
    """A network that has its answer already: random logits, different in every row of a batch."""
    torch.manual_seed(1)
    known = torch.randn(WINDOWS_PER_BATCH, classes, WINDOW // 4, WINDOW // 4, device=device)
    return lambda windows: known[windows[:, 0, 0, 0].abs().mul(97).long() % len(known)]


@torch.inference_mode()
def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--largest", type=int, default=2048 * 4096, help="pixels")
    parser.add_argument("--tail", action="store_true")
    options = parser.parse_args()
    if options.tail:
        network = ready_logits(options.classes, options.device)
    else:
        model = segmill.load("segformer_mit-b0", num_classes=options.classes)
        network = model.network.to(options.device)
    what = "everything after the network" if options.tail else "SegFormer-B0"
    table = Table(title=f"Sliding window, {what}, {options.classes} classes, {options.device}")
    for heading in ("image", "peer", "ours", "peer's", "ratio", "limit", "of limit"):
        table.add_column(heading)
    for size in SIZES:
        if size[0] * size[1] <= options.largest:
            add_rows(table, network, size, options)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
