"""Benchmark 11: a step of DUSA on a classifier, ConvNeXt-Large under SiT-XL/2 at their real sizes.

64 images of 224 x 224, 6 classes each, both models updated, bfloat16 autocast over float32 weights,
fused AdamW; weights and pixels are random, and are made on the GPU. TFLOP are counted by torch's
FlopCounterMode: 6 conditions of SiT and one pass of ConvNeXt forward and backward (three times the
forward pass), one pass of the codec forward. The limit is that number at 790 TFLOP/s of bfloat16
products, as measured on an H200 (304 TFLOP: 0.385 s); the line also says the share of the 989 of
its data sheet.

The first lines time the step itself, in several ways of going through the 64 images; all ways give
the same gradients. Then TTAModule under Lightning runs whole steps on 1..N GPUs, each with its own
images (trainer.share=images, trainer.strategy=ddp), and one step of two processes is compared with
one process that has all of its images, in float32.

    python -m benchmarks.classification_step [--devices 2] [--only step,lightning,equality]
    python -m benchmarks.classification_step --tiny      on any machine; its numbers mean nothing
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from benchmarks._classifier_setup import (
    CLASSES,
    SEED,
    Images,
    Way,
    Work,
    compile_both,
    device_of_process,
    full_float32,
    loader,
    models,
    set_way,
    work,
)
from lightning.pytorch.callbacks import Callback

from segmill.commands.adapt_trainer import AdaptTrainerSettings
from segmill.data.tasks import Task
from segmill.models.combined import CombinedModel
from segmill.tta.classification_record import ClassificationRecord
from segmill.tta.cuda_graphs import replay_passes
from segmill.tta.dusa import Dusa
from segmill.tta.method import Views
from segmill.tta.module import TTAModule
from segmill.tta.updaters import DirectUpdater

MEASURED, DATA_SHEET = 790.0, 989.0  # TFLOP/s of an H200 in bfloat16
GIB = 2**30
PUBLISHED = Way(batch=8, accumulate=8, windows_at_once=None, compiled=False)
COMPILED = Way(batch=8, accumulate=8, windows_at_once=None, compiled=True)
GRAPHS = Way(batch=8, accumulate=8, windows_at_once=None, compiled=True, graphs=True)
LARGE = Way(batch=64, accumulate=1, windows_at_once=16, compiled=True, graphs=True)
WARM_UPS = 4  # steps; a shape is recorded at its fourth pass
PARTS = ("step", "lightning", "equality")
EQUAL = 4  # images of the step that is compared
SAMPLE = 4096  # numbers of each gradient that are compared
PATIENCE = 240  # seconds for a run of its own


class Gathered:
    """The updater of several batches without Lightning."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        """Wait for the last batch."""

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def forget(self) -> None:
        self.optimizer.state.clear()


def say(text: str) -> None:
    """At once: whatever ends the run early leaves what was known."""
    print(text, flush=True)


def wait(device: torch.device) -> None:
    """For the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def line(name: str, seconds: float, images: int, counted: Work, peak: int) -> str:
    """Seconds per 64 images, shares of the limits, memory."""
    speed = counted.of_step(images) / seconds
    memory = f", {peak / GIB:5.1f} GiB" if peak else ""
    return (
        f"{name:44}{seconds * 64 / images:7.3f} s / 64 images, {speed:4.0f} TFLOP/s: "
        f"{speed / MEASURED:.0%} of the limit, {speed / DATA_SHEET:.0%} of the data sheet{memory}"
    )


def step_times(ways: list[Way], *, repeats: int, tiny: bool) -> None:
    """Each way in turn on the same models; the compiled ways last, as nothing is compiled back."""
    device = device_of_process(cpu=False)
    started = time.perf_counter()
    model, settings = models(device, tiny=tiny)
    optimizer = settings.build(model)
    method = Dusa(model=model, step="image")
    counted = work(tiny=tiny)
    wait(device)
    say(
        f"{counted.of_step(64):.1f} TFLOP for 64 images: SiT {counted.guide:.3f} a condition, "
        f"classifier {counted.classifier:.3f}, codec {counted.codec:.3f}, forward; limit "
        f"{counted.of_step(64) / MEASURED:.3f} s; built in {time.perf_counter() - started:.0f} s"
    )
    compiled = graphs = False
    for way in sorted(ways, key=lambda each: (each.compiled, each.graphs)):
        if way.compiled and not compiled:
            compile_both(model)
            compiled = True
        if way.graphs and not graphs:
            replay_passes(model)
            graphs = True
        set_way(model, way)
        images = Images(way.images).pixels.to(device)
        updater = Gathered(optimizer)
        seconds: list[float] = []
        try:
            for repeat in range(-WARM_UPS, repeats):
                if repeat == 0 and device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                wait(device)
                began = time.perf_counter()
                one_step(method, updater, images, way, device)
                wait(device)
                seconds += [time.perf_counter() - began] if repeat >= 0 else []
        except torch.OutOfMemoryError as error:
            say(f"{way.text():44}{error!s:.120}")
            optimizer.zero_grad()
            continue
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        say(line(way.text(), statistics.median(seconds), way.images, counted, peak))


def one_step(
    method: Dusa, updater: Gathered, images: torch.Tensor, way: Way, device: torch.device
) -> None:
    """All batches of a step, and the step."""
    for index in range(way.accumulate):
        batch = images[index * way.batch : (index + 1) * way.batch]
        seeds = tuple(range(index * way.batch, (index + 1) * way.batch))
        views = Views(image=batch, original=batch, seeds=seeds, weight=1 / way.accumulate)
        with torch.autocast(device.type, torch.bfloat16):
            method.adapt(views, updater, torch.Generator(device).manual_seed(SEED))
    updater.optimizer.step()
    updater.zero_grad()


class Clock(Callback):
    """When each step of the optimizer was through."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.times: list[float] = []

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """After every last batch of a step."""
        if (batch_idx + 1) % self.accumulate == 0:
            wait(pl_module.device)
            self.times.append(time.perf_counter())


def fit(model: CombinedModel, settings: Any, options: Any, way: Way, count: int) -> Clock:
    """A task of `count` images through TTAModule and Lightning."""
    share = options.share if options.devices > 1 else "classes"
    module = TTAModule(
        model=model,
        new_record=lambda device: ClassificationRecord(
            num_classes=CLASSES, ignore_index=-1, device=device
        ),
        seed=SEED,
        predict="before",
        compiled=way.compiled,
        cuda_graphs=way.graphs,
        evidence=None,
        accumulate=way.accumulate,
        share=share,
        strategy=options.strategy if options.devices > 1 else "fsdp",
    )
    module.task = Task(1, "fog", 5)
    module.begin(Dusa(model=model, step="image"), settings, batch_statistics=False)
    clock = Clock(way.accumulate)
    on_gpu = torch.cuda.is_available() and not options.cpu
    trainer = AdaptTrainerSettings(
        accelerator="gpu" if on_gpu else "cpu",
        devices=options.devices,
        nodes=1,
        precision=options.precision,
        strategy=module.strategy_name,
        share=module.share,
        accumulate=way.accumulate,
        compile=way.compiled,
        cuda_graphs=way.graphs,
        deterministic=False,
        log_every=1,
        timeout=120,
        fast_dev_run=False,
    ).trainer(Path(tempfile.gettempdir()), epochs=1, callbacks=[clock])
    trainer.fit(module, train_dataloaders=loader(count, way.batch))
    return clock


def worker(options: Any) -> None:
    """What a run of its own does; the first process leaves what it found."""
    model, settings = models(device_of_process(cpu=options.cpu), tiny=options.tiny)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if options.worker == "equality":
        # All images in one step: of one process, or of each of them a part.
        way = Way(
            batch=EQUAL // options.devices, accumulate=1, windows_at_once=None, compiled=False
        )
        taken: dict[str, torch.Tensor] = {}
        with full_float32():
            keep_gradients(model, taken)
            fit(model, settings, options, way, EQUAL)
        if first:
            torch.save(taken, options.out)
        return
    # Sharded weights are not recorded.
    graphs = options.graphs and (options.strategy == "ddp" or options.devices == 1)
    way = PUBLISHED if options.eager else GRAPHS if graphs else COMPILED
    if options.tiny:
        way = Way(batch=2, accumulate=2, windows_at_once=None, compiled=False)
    steps = 2 + options.repeats
    clock = fit(model, settings, options, way, steps * way.images * options.devices)
    if first:
        between = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
        on_gpu = next(model.parameters()).is_cuda
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        found = {"seconds": statistics.median(between), "images": way.images, "peak": peak}
        Path(options.out).write_text(json.dumps(found), encoding="utf-8")


def keep_gradients(model: CombinedModel, taken: dict[str, torch.Tensor]) -> None:
    """Note numbers of each gradient, and its norm, before the optimizer takes its step."""
    step = DirectUpdater.step

    def noting(self: DirectUpdater) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                numbers = parameter.grad.flatten()[:SAMPLE]
                norm = parameter.grad.norm()[None]
                taken[name] = torch.cat([norm, numbers]).cpu()
        step(self)

    DirectUpdater.step = noting


def run_alone(options: Any, what: str, *, devices: int, out: Path, precision: str) -> bool:
    """This file again, as processes of their own: a group of processes cannot be changed."""
    command = [sys.executable, "-m", "benchmarks.classification_step", "--worker", what]
    command += ["--devices", str(devices), "--out", str(out), "--precision", precision]
    command += ["--repeats", str(options.repeats), "--strategy", options.strategy]
    command += [f"--{name}" for name in ("tiny", "cpu", "eager") if getattr(options, name)]
    command += [] if options.graphs else ["--no-graphs"]
    try:
        done = subprocess.run(command, check=False, timeout=PATIENCE, cwd=Path(__file__).parents[1])
    except subprocess.TimeoutExpired:
        say(f"{what} on {devices} devices: not through after {PATIENCE} s")
        return False
    if done.returncode:
        say(f"{what} on {devices} devices: failed with status {done.returncode}")
    return done.returncode == 0 and out.is_file()


def lightning_times(options: Any, folder: Path) -> None:
    """Whole steps with all that the harness does, on 1 GPU and on more."""
    counted, single = work(tiny=options.tiny), 0.0
    for devices in sorted({1, options.devices}):
        out = folder / f"{devices}.json"
        if not run_alone(options, "lightning", devices=devices, out=out, precision="bf16-mixed"):
            continue
        found = json.loads(out.read_text(encoding="utf-8"))
        seconds, images = found["seconds"], found["images"]
        say(line(f"TTAModule, {devices} device(s), each", seconds, images, counted, found["peak"]))
        if devices == 1:
            single = seconds
        elif single:
            say(
                f"{'':44}{devices * images} images a step, {devices * single / seconds:.2f}x the "
                "images a second of one"
            )


def equality(options: Any, folder: Path) -> None:
    """Gradients of a step of two processes against those of one with all images."""
    found = []
    for devices in (1, 2):
        out = folder / f"gradients{devices}.pt"
        if not run_alone(options, "equality", devices=devices, out=out, precision="32-true"):
            return
        found.append(torch.load(out))
    one, two = found
    assert one.keys() == two.keys(), "the same weights learn"
    difference = torch.cat([two[name] - one[name] for name in one]).norm()
    relative = float(difference / torch.cat([*one.values()]).norm())
    say(
        f"gradients of a step of {EQUAL} images, two processes ({options.strategy}) against one, "
        f"float32: relative difference {relative:.1e} over {len(one)} weights"
    )
    # Sums in another order through 28 and 36 blocks.
    assert relative < 1e-3, "not the same computation"


def main() -> None:
    """Measure what is asked for, the most telling first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small models; without CUDA always")
    parser.add_argument("--only", default=",".join(PARTS), help="default %(default)s")
    parser.add_argument("--devices", type=int, default=None, help="default 2, or 1 if there is one")
    parser.add_argument("--repeats", type=int, default=None, help="default 5; tiny models 2")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--cpu", action="store_true", help="Lightning's runs on the CPU")
    parser.add_argument("--eager", action="store_true", help="Lightning's runs not compiled")
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Lightning's runs and the last ways of the step with CUDA graphs",
    )
    parser.add_argument("--worker", choices=("lightning", "equality"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="bf16-mixed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.share = "images"
    on_cuda = torch.cuda.is_available()
    options.tiny, options.cpu = options.tiny or not on_cuda, options.cpu or not on_cuda
    options.repeats = options.repeats or (2 if options.tiny else 5)
    there = torch.cuda.device_count() if on_cuda else 2
    options.devices = options.devices or min(2, there)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if options.worker:
        worker(options)
        return
    started = time.perf_counter()
    where = torch.cuda.get_device_name() if on_cuda else "CPU"
    what = "tiny models" if options.tiny else "ConvNeXt-L + SiT-XL/2"
    say(f"{what}, {where}, torch {torch.__version__}")
    ways = [PUBLISHED, COMPILED, *([GRAPHS, LARGE] if options.graphs else [])]
    if options.tiny:
        ways = [Way(batch=2, accumulate=2, windows_at_once=None, compiled=False)]
        ways += [Way(batch=4, accumulate=1, windows_at_once=2, compiled=False)]
    with tempfile.TemporaryDirectory() as scratch:
        parts: dict[str, Callable[[], None]] = {
            "step": lambda: step_times(ways, repeats=options.repeats, tiny=options.tiny),
            "lightning": lambda: lightning_times(options, Path(scratch)),
            "equality": lambda: equality(options, Path(scratch)),
        }
        for name in options.only.split(","):
            say(f"-- {name}, after {time.perf_counter() - started:.0f} s")
            if name == "equality" and options.devices < 2:
                say("equality: needs two devices")
                continue
            parts[name]()
            gc.collect()  # compiled blocks hold each other
            if on_cuda:
                torch.cuda.empty_cache()
    say(f"-- done after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
