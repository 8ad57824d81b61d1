"""Benchmark 13: DFormer and DFormerv2 at 480 x 640 against the published algorithm, same weights.

The peer is the algorithm as it was published, in plain torch (`_dformer_peers`). Inference goes
from the image to the class of every pixel: the peer upsamples its logits and takes the argmax, ours
does both at once. A training step is the loss, its gradients and a step of fused AdamW. In float32
with TF32 for both, and in bfloat16 autocast (there the peer's factorisation too is bfloat16, ours
float32). Compiled: every block and the head by torch.compile, of both; drop path has one rate for
all blocks, so that those of a stage share their code. Results are compared first, in float32
without TF32. Then all run in turn in one process on random data, timed by CUDA events.

    python -m benchmarks.dformer [--sizes dformer-s dformerv2-s] [--no-compile] [--kinds float32]
    python -m benchmarks.dformer --profile        the 25 most expensive kernels of our step
    python -m benchmarks.dformer --tiny           on any machine; its numbers mean nothing
"""

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks._dformer_pairs import SIZES, batch, compared, loss_of, pair, print_kernels
from torch import Tensor

from segmill.ops.upsample_argmax import upsample_argmax

WARM_UP = 4
KINDS = ("float32", "bfloat16")
Timings = dict[str, tuple[float, float, float]]  # quartiles, milliseconds


@dataclass(frozen=True)
class Row:
    """One workload of one network; milliseconds are medians, memory is beyond what was there."""

    network: str
    workload: str
    how: str
    ours: float
    ours_quartiles: tuple[float, float]
    peer: float
    peer_quartiles: tuple[float, float]
    ratio: float
    ours_mebibytes: float
    peer_mebibytes: float

    def text(self) -> str:
        """A row of the table."""
        low, high = self.ours_quartiles
        peer_low, peer_high = self.peer_quartiles
        return (
            f"| {self.network} | {self.workload} | {self.how} | {self.ours:.2f} | "
            f"{low:.2f} .. {high:.2f} | {self.peer:.2f} | {peer_low:.2f} .. {peer_high:.2f} | "
            f"**{self.ratio:.2f}x** | {self.ours_mebibytes:.0f} | {self.peer_mebibytes:.0f} |"
        )


def our_classes(network: Any, image: Tensor) -> Tensor:
    """The class of every pixel."""
    return upsample_argmax(network(image), (image.shape[-2], image.shape[-1]))


def peer_classes(network: Any, image: Tensor) -> Tensor:
    """The same, from logits at the size of the image."""
    return network(image).argmax(1)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Of matrix products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    yield
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def inference(classes: Callable, network: Any, image: Tensor, bf16: bool) -> Callable[[], object]:
    """One call."""

    def call() -> None:
        with (
            torch.inference_mode(),
            torch.autocast(image.device.type, torch.bfloat16, enabled=bf16),
        ):
            classes(network, image)

    return call


def training(network: Any, image: Tensor, label: Tensor, bf16: bool) -> Callable[[], object]:
    """One step; the rate 0 costs what any other does, and random weights do not drift."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def call() -> None:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(network, image, label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def milliseconds(call: Callable[[], object], device: str) -> float:
    """On an empty device, from the first launch to the last kernel's end."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    torch.cuda.synchronize()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended)


def interleaved(calls: dict[str, Callable], device: str, repeats: int) -> tuple[Timings, dict]:
    """Quartiles and the most memory of each."""
    peaks, timings = {}, {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    for _ in range(repeats):
        for name, call in calls.items():
            timings[name].append(milliseconds(call, device))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in timings.items()}
    return {name: (each[0], each[1], each[2]) for name, each in quartiles.items()}, peaks


def compile_parts(network: Any) -> None:
    """The blocks one by one, and the head."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    for module in network.modules():
        if type(module).__name__ in ("Block", "GeoBlock"):
            module.compile(dynamic=False)
    network.decode_head.compile(dynamic=False)


class Session:
    """What the workloads share: options, the time, the rows so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
        self.started = time.monotonic()
        self.rows: list[Row] = []

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def run(self, name: str, *, compiled: bool) -> None:
        """All workloads of a network; one that fails says why."""
        options, device = self.options, self.device
        how = "compiled" if compiled else "eager"
        if self.seconds() > options.budget:
            print(f"| {name} | - | {how} | not run: {options.budget:.0f} s were over |", flush=True)
            return
        pairs: Any = None
        try:
            pairs = pair(name, device, tiny=options.tiny)
            if compiled:
                for network in pairs:
                    compile_parts(network)
            else:
                with tf32(False):
                    image, label = batch(1, device, tiny=options.tiny)
                    said = compared(pairs[0], pairs[1], image, label)
                print(f"\n{name}: {said} [{self.seconds():.0f} s]\n", flush=True)
            for bf16 in [kind == "bfloat16" for kind in options.kinds]:
                for size in (options.batch,) if compiled else (options.batch, 1):
                    self.workload(name, how, "inference", pairs, size, bf16)
                self.workload(name, how, "training step", pairs, options.batch, bf16)
        except Exception as error:  # the others shall still be measured
            text = f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:600]
            print(f"| {name} | - | {how} | {text} |", flush=True)
        finally:
            del pairs
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()

    def workload(self, name: str, how: str, what: str, pairs: Any, size: int, bf16: bool) -> None:
        """Measure one and print its row."""
        options, device = self.options, self.device
        title = f"{what}, batch {size}, {'bfloat16' if bf16 else 'float32 (TF32)'}"
        try:
            image, label = batch(size, device, tiny=options.tiny)
            ours, peer = pairs
            for network in pairs:
                network.train(what != "inference")
            if what == "inference":
                calls = {
                    "ours": inference(our_classes, ours, image, bf16),
                    "peer": inference(peer_classes, peer, image, bf16),
                }
            else:
                calls = {
                    "ours": training(ours, image, label, bf16),
                    "peer": training(peer, image, label, bf16),
                }
            timings, peaks = interleaved(calls, device, options.repeats)
        except Exception as error:  # the others shall still be measured
            text = f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:600]
            print(f"| {name} | {title} | {how} | {text} |", flush=True)
            return
        (low, ours_ms, high), (peer_low, peer_ms, peer_high) = timings["ours"], timings["peer"]
        row = Row(
            name, title, how, ours_ms, (low, high), peer_ms, (peer_low, peer_high),
            peer_ms / ours_ms, peaks.get("ours", 0.0), peaks.get("peer", 0.0),
        )  # fmt: skip
        self.rows.append(row)
        print(row.text(), flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(each) for each in self.rows], indent=1))

    def profile(self, name: str) -> None:
        """The kernels of a training step, and of a pass in eval, of ours and of the peer."""
        from torch.profiler import ProfilerActivity, profile

        options, device = self.options, self.device
        pairs = pair(name, device, tiny=options.tiny)
        image, label = batch(options.batch, device, tiny=options.tiny)
        for who, network in zip(("ours", "peer"), pairs, strict=True):
            for what in ("training step", "inference"):
                network.train(what != "inference")
                classes = our_classes if who == "ours" else peer_classes
                call = training(network, image, label, not options.fp32)
                if what == "inference":
                    call = inference(classes, network, image, not options.fp32)
                for _ in range(WARM_UP):
                    call()
                wall = statistics.median(milliseconds(call, device) for _ in range(5))
                activities = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
                with profile(activities=activities) as recorded:
                    for _ in range(3):
                        call()
                    if device == "cuda":
                        torch.cuda.synchronize()
                many = 25 if who == "ours" and what == "training step" else 12
                print_kernels(f"{name}, {who}, {what}", recorded, wall, many)


def main() -> None:
    """A table, row by row; failures at their place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--budget", type=float, default=400, help="no new network after, seconds")
    parser.add_argument("--json", type=Path, help="rows, written anew after each")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--fp32", action="store_true", help="of --profile: no autocast")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.batch, options.repeats = 2, 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    session = Session(options)
    where = torch.cuda.get_device_name() if session.device == "cuda" else "CPU"
    print(
        f"DFormer, 480 x 640, {where}, torch {torch.__version__}; TF32 allowed, cudnn.benchmark on"
    )
    if options.profile:
        for name in options.sizes:
            session.profile(name)
        return
    print(
        "\n| network | workload | how | ours ms | quartiles | peer ms | quartiles | ratio | ",
        end="",
    )
    print("ours MiB | peer MiB |\n|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for compiled in [False] * options.eager + [True] * options.compile:
        for name in options.sizes:
            session.run(name, compiled=compiled)
    print(f"\n{session.seconds():.0f} s")


if __name__ == "__main__":
    main()
