"""Benchmarks 2 to 4: what happens between low-resolution logits and a loss, labels, or counts.

2  upsample + cross-entropy, forward and backward, 150 x 128 x 128 -> 512 x 512
3  upsample + argmax, 150 x 128 x 171 -> 512 x 683
4  confusion counts of 512 x 683 pixels, 150 classes, some ignored
Ours against torch's own chain, eager and compiled, and for 4 against torchmetrics and
MMSegmentation's histograms. All run in turn in one process on the same random data, results
compared first. On a CPU, processor time is counted, so that other programs matter less.

    python benchmarks/upsample_ops.py [--device cuda] [--batches 1 4 16] [--no-compile]
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from segmill.ops.confusion import update_confusion
from segmill.ops.upsample_argmax import upsample_argmax
from segmill.ops.upsample_cross_entropy import upsample_cross_entropy

K = 150
Contestants = dict[str, Callable[[], Tensor]]


def upsampled(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """What nobody should write to memory."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def eager_loss(logits: Tensor, label: Tensor) -> Tensor:
    """MMSegmentation's default: the mean over all pixels."""
    wide = upsampled(logits, (label.shape[1], label.shape[2])).float()
    return F.cross_entropy(wide, label, ignore_index=255, reduction="sum") / label.numel()


def eager_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The post-processing of MMSegmentation and transformers."""
    return upsampled(logits, size).argmax(1)


def random_label(batch: int, height: int, width: int, device: str) -> Tensor:
    """Blocks of classes with a tenth ignored."""
    blocks = torch.randint(0, K, (batch, -(-height // 16), -(-width // 16)), device=device)
    label = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width].clone()
    label[torch.rand(label.shape, device=device) < 0.1] = 255
    return label


def losses(batch: int, device: str, compiled: bool) -> Contestants:
    """Benchmark 2."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    logits = torch.randn(batch, K, 128, 128, device=device, dtype=dtype).requires_grad_()
    label = random_label(batch, 512, 512, device)

    def gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(loss(logits, label), logits)[0]

    contestants = {"ours": gradient(upsample_cross_entropy), "eager": gradient(eager_loss)}
    if compiled:
        contestants["compiled"] = gradient(torch.compile(eager_loss))
    exact = torch.autograd.grad(eager_loss(logits.float(), label), logits)[0].float()
    error = (contestants["ours"]().float() - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == torch.float32 else 4e-3), error
    return contestants


def argmaxes(device: str, compiled: bool) -> Contestants:
    """Benchmark 3."""
    logits, size = torch.randn(1, K, 128, 171, device=device), (512, 683)
    contestants: Contestants = {
        "ours": lambda: upsample_argmax(logits, size),
        "eager": lambda: eager_argmax(logits, size),
    }
    if compiled:
        fast = torch.compile(eager_argmax)
        contestants["compiled"] = lambda: fast(logits, size)
    differing = (contestants["ours"]() != contestants["eager"]()).double().mean()
    assert differing < 1e-4, differing  # near ties
    return contestants


def counts(device: str) -> Contestants:
    """Benchmark 4. Labels and predictions agree on most pixels, as those of a trained model."""
    label = random_label(1, 512, 683, device)
    noise = torch.rand(label.shape, device=device) < 0.2
    pred = torch.where(noise | (label == 255), torch.randint_like(label, K), label)
    narrow, narrow_pred = label.to(torch.uint8), pred.to(torch.uint8)
    confusion = torch.zeros(K, K, dtype=torch.int64, device=device)
    metric = MulticlassConfusionMatrix(K, ignore_index=255, validate_args=False).to(device)

    def ours() -> Tensor:
        confusion.zero_()
        update_confusion(confusion, narrow, narrow_pred)
        return confusion

    def torchmetrics() -> Tensor:
        metric.reset()
        metric.update(pred, label)
        return metric.confmat

    def histograms() -> Tensor:
        valid = label != 255
        chosen, truth = pred[valid].float(), label[valid].float()
        hit = chosen[chosen == truth]
        return torch.stack([torch.histc(x, K, 0, K - 1) for x in (hit, chosen, truth)])

    assert torch.equal(ours(), torchmetrics())
    assert torch.equal(ours().diagonal(), histograms()[0].long())
    return {"ours": ours, "torchmetrics": torchmetrics, "MMSegmentation": histograms}


def interleaved(contestants: Contestants, device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition; taken in turn, so that other load hits all of them."""
    timings: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(repeats):
        for name, call in contestants.items():
            timings[name].append(_seconds(call, device))
    return timings


def _seconds(call: Callable[[], Tensor], device: str) -> float:
    if device == "cpu":
        started = time.process_time()
        call()
        return time.process_time() - started
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended) / 1e3


def peak_mebibytes(call: Callable[[], Tensor], device: str) -> float:
    """Memory that the call needs at most beyond what exists before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # A forked process: its high-water mark starts at what it shares with us.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report_growth, args=(call, sender))
    child.start()
    growth = receiver.recv()
    child.join()
    return growth


def _report_growth(call: Callable[[], Tensor], sender: Connection) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)


def add_rows(table: Table, what: str, contestants: Contestants, device: str, repeats: int) -> None:
    """One row for each contestant; ratios are to ours."""
    peaks = {name: peak_mebibytes(call, device) for name, call in contestants.items()}
    timings = interleaved(contestants, device, repeats)
    ours = statistics.median(timings["ours"])
    for name, seconds in timings.items():
        low, median, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
        table.add_row(
            what,
            name,
            f"{median:.3f} ms",
            f"{low:.3f} .. {high:.3f}",
            f"{median / 1e3 / ours:.1f}x",
            f"{peaks[name]:.0f} MiB",
            f"{peaks[name] / max(peaks['ours'], 1):.1f}x",
        )
    table.add_section()


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    device = options.device
    torch.manual_seed(0)
    table = Table(title=f"Between logits and labels, {device}, {torch.get_num_threads()} threads")
    for heading in ("workload", "who", "median", "quartiles", "time", "peak memory", "memory"):
        table.add_column(heading)
    for batch in options.batches or ([1, 4, 16] if device == "cuda" else [1]):
        what = f"2 cross-entropy, batch {batch}"
        add_rows(table, what, losses(batch, device, options.compile), device, options.repeats)
    add_rows(table, "3 argmax", argmaxes(device, options.compile), device, options.repeats)
    add_rows(table, "4 confusion", counts(device), device, options.repeats)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
