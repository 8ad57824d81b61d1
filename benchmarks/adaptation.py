"""Benchmark 10: a step of DUSA, SegFormer-B5 under Stable Diffusion 3 medium at their real sizes.

One image of 683 x 512, two windows, 20 classes each, both models updated, bfloat16 autocast over
float32 weights, AdamW; weights and pixels are random. Ours is what `segmill adapt tta=dusa` does
on one GPU with trainer.compile=true; the peer is the published loop, see _dusa_steps.py.

Both run in turn in one process on the same weights of SD3 and the same moments of Adam, so that
each has the memory for itself (but for the other's SegFormer, 1 GiB). Losses and gradients are
compared first, in float32 with 4 classes, then the losses as timed. Lines appear as they are known.

Limits are those of arithmetic at the measured 790 TFLOP/s of an H200: the way's own, and the one
of the plain computation with all text tokens.

    python -m benchmarks.adaptation [--budget 900] [--only headline,breakdown] [--repeats 12]
    python -m benchmarks.adaptation --tiny [--compile]     on any machine; its numbers mean nothing
    python -m benchmarks.adaptation --only profile         where a step of ours spends its time
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from benchmarks._dusa_steps import (
    CLASSES,
    EAGER,
    OURS,
    PLAIN,
    Contestant,
    KeepGradients,
    Ours,
    Plain,
    PublishedLoop,
    Setup,
    Way,
)
from jaxtyping import Float
from torch import Tensor

FEW = 4  # classes of the comparison in float32
SPEED = 790.0  # TFLOP/s of bfloat16 products, measured on an H200
ENCODING, SEGFORMER = 1.12, 0.9  # TFLOP: a window through the VAE; B5 forward and backward
GIB = 2**30
WARM_UPS = 2
VARIANTS = {
    "eager": ("not compiled", EAGER),
    "eager_segformer": ("SegFormer not compiled", replace(OURS, segformer_compiled=False)),
    "eager_all_tokens": ("not compiled, all text tokens", PLAIN),
    "frozen": ("guide frozen", replace(OURS, frozen=True)),
    "windows_together": ("both windows at once", replace(OURS, windows_at_once=None)),
    "all_tokens": ("all text tokens", replace(OURS, collapsed=False)),
    "chunked": ("8 classes at a time, two passes", replace(OURS, class_chunk=8)),
}
NAMES = ("headline", "breakdown", *VARIANTS)
PROFILE = "profile"


@dataclass
class Timing:
    """Seconds of each repetition, and bytes of device memory at the peak (CUDA only)."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def text(self, idle: int = 0) -> str:
        """Median and half the quartiles' distance; the memory without what lay there idle."""
        quarters = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else [0] * 3
        memory = f", {(self.peak - idle) / GIB:5.1f} GiB" if self.peak else ""
        return f"{1e3 * self.median:7.1f} ms ± {5e2 * (quarters[2] - quarters[0]):4.1f}{memory}"


@dataclass(frozen=True)
class Part:
    """A part of a step, timed alone."""

    run: Callable[[], object]
    before: Callable[[], object]

    def prepare(self) -> None:
        """What the part needs; not timed."""
        self.before()

    def __call__(self) -> object:
        """The part."""
        return self.run()


@dataclass(frozen=True)
class Gradients:
    """What a step would have learned from."""

    loss: float
    guide: list[Tensor]
    segformer: float  # norm: the two networks name and shape their weights differently


class Benchmark:
    """Our step with its optimizer, and everything that is measured of it."""

    def __init__(self, setup: Setup, *, repeats: int, with_limits: bool) -> None:
        self.setup, self.repeats, self.with_limits = setup, repeats, with_limits
        setup.use(OURS, setup.loss)
        self.updater = Plain(setup.optimizer.build(setup.model))
        self.ours = Ours(setup, OURS, setup.loss, self.updater)

    def parity(self) -> None:
        """Refuse to go on unless the published loop learns the same, and the short text too."""
        setup = self.setup
        few = replace(setup.loss, classes_threshold=FEW, min_classes=FEW, buckets=(FEW,))
        keep = KeepGradients()
        # cuDNN rounds the factors of float32 convolutions to 10 bits unless told not to.
        torch.backends.cudnn.allow_tf32 = False
        loop = self._gradients(PublishedLoop(setup, few, keep, precise=True))
        for name, way in (("ours", PLAIN), ("ours, short text", replace(PLAIN, collapsed=True))):
            mine = self._gradients(Ours(setup, way, few, keep, precise=True))
            loss = abs(mine.loss / loop.loss - 1)
            guide = _difference(mine.guide, loop.guide)
            segformer = abs(mine.segformer / loop.segformer - 1)
            say(
                f"parity, float32, {FEW} classes, {name}: loss {mine.loss:.6f}, the loop's "
                f"{loop.loss:.6f} (relative {loss:.1e}); gradients of SD3 differ by {guide:.1e}, "
                f"the norm of the SegFormer's by {segformer:.1e}"
            )
            # Float32 through 24 and 52 blocks; sums in another order.
            assert max(loss, guide / 10, segformer / 10) < 1e-4, "not the same computation"
        torch.backends.cudnn.allow_tf32 = True

    def headline(self) -> None:
        """Ours against the published loop."""
        setup = self.setup
        parameters = [*setup.segformer.parameters(), *setup.guide.network.parameters()]
        theirs = torch.optim.AdamW(parameters, lr=setup.optimizer.learning_rate)
        loop = PublishedLoop(setup, setup.loss, Plain(theirs))
        self._same_losses(loop)
        self._warm_up()
        for parameter in setup.guide.network.parameters():
            state = self.updater.optimizer.state[parameter]
            shared = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
            theirs.state[parameter] = {"step": torch.tensor(0.0), **shared}
        timings = self._interleaved({"ours": self.ours, "loop": loop})
        mine, other = timings["ours"], timings["loop"]
        say(f"{'ours':36}{mine.text()}{self._share(OURS, mine)}")
        say(f"{'published loop':36}{other.text()}{self._share(PLAIN, other)}")
        say(f"{'ratio':36}{other.median / mine.median:7.2f}x")

    def breakdown(self) -> None:
        """Parts of our step, each alone and waited for."""
        timings = self._interleaved({"the whole step": self.ours, **self._parts()})
        whole = timings.pop("the whole step")
        say(f"{'the whole step':36}{whole.text()}")
        for name, timing in timings.items():
            speed = (
                f", {self._tflop(name) / timing.median:5.0f} TFLOP/s" if self._tflop(name) else ""
            )
            say(f"  {name:34}{timing.text()}{speed}")
        rest = whole.median - sum(timing.median for timing in timings.values())
        say(f"  {'windows, class sets and the rest':34}{1e3 * rest:7.1f} ms")

    def variant(self, name: str) -> None:
        """Our step in another way, in turn with the usual one."""
        title, way = VARIANTS[name]
        setup, updater, idle = self.setup, self.updater, 0
        if way.frozen:
            setup.use(way, setup.loss)
            updater = Plain(setup.optimizer.build(setup.model))
            idle = sum(8 * each.numel() for each in setup.guide.network.parameters())
        contestant = Ours(setup, way, setup.loss, updater)
        timings = self._interleaved({"usual": self.ours, name: contestant})
        usual, other = timings["usual"], timings[name]
        say(f"{title:36}{other.text(idle)}{self._share(way, other)}")
        say(f"  {'ours, in turn with it':34}{usual.text()}, {other.median / usual.median:.2f}x")

    def profile(self) -> None:
        """Kernels of one step, the longest first."""
        self._warm_up()
        self.ours.prepare()
        with torch.profiler.profile() as profile:
            self.ours()
            wait(self.setup.device)
        order = f"self_{self.setup.device.type}_time_total"
        say(profile.key_averages().table(order, row_limit=30, max_name_column_width=80))

    def _gradients(self, contestant: Contestant) -> Gradients:
        """Of a step that changes nothing."""
        setup = self.setup
        contestant.prepare()
        loss = float(contestant())
        groups = (
            setup.guide.network.parameters(),
            [*setup.model.discriminative.parameters(), *setup.segformer.parameters()],
        )
        guide, segformer = (_taken(group) for group in groups)
        return Gradients(loss, guide, float(torch.nn.utils.get_total_norm(segformer)))

    def _same_losses(self, loop: PublishedLoop) -> None:
        """In bfloat16, as they are timed; the first calls of ours compile."""
        keep, setup, started = KeepGradients(), self.setup, time.perf_counter()
        # Compiled, the SegFormer rounds otherwise, and near ties then choose other classes.
        guide_only = replace(OURS, segformer_compiled=False)
        mine = self._gradients(Ours(setup, guide_only, setup.loss, keep)).loss
        updater, loop.updater = loop.updater, keep
        other = self._gradients(loop).loss
        loop.updater = updater
        eager, compiled = (self._logits(way) for way in (guide_only, OURS))
        loss, logits = abs(mine / other - 1), _difference([compiled], [eager])
        say(
            f"parity, bfloat16, {CLASSES} classes: loss {mine:.5f}, the loop's {other:.5f} "
            f"(relative {loss:.1e}); compiled SegFormer's logits differ by {logits:.1e}; first "
            f"calls and compilation {time.perf_counter() - started:.0f} s"
        )
        # Numbers of 8 bits: single ones differ by some thousandths, means over the latent by less.
        assert loss < 5e-3, "not the same computation"
        assert logits < 5e-2, "not the same computation"

    def _logits(self, way: Way) -> Float[Tensor, "1 K h w"]:
        self.setup.use(way, self.setup.loss)
        with self.setup.autocast(precise=False):
            return self.setup.model(self.setup.views.image).detach().float()

    def _warm_up(self) -> None:
        self.ours.prepare()
        self.ours()

    def _interleaved(self, calls: dict[str, Contestant | Part]) -> dict[str, Timing]:
        """In turn, so that whatever else the machine does hits all of them."""
        timings = {name: Timing() for name in calls}
        for repeat in range(-WARM_UPS, self.repeats):
            for name, call in calls.items():
                call.prepare()
                timing = timings[name]
                seconds, peak = timed(call, self.setup.device)
                if repeat >= 0:
                    timing.seconds.append(seconds)
                    timing.peak = max(timing.peak, peak)
        self.ours.prepare()
        assert math.isfinite(self.ours()), "the weights are no numbers any more"
        return timings

    def _parts(self) -> dict[str, Part]:
        """After the guide's and the SegFormer's part the optimizer has gradients."""
        setup, model = self.setup, self.setup.model
        image, guide = setup.views.image, setup.guide
        setup.use(OURS, setup.loss)
        with torch.no_grad(), setup.autocast(precise=False):
            generator = setup.generator()
            noisy = model.noisy_windows(image, generator)
            logits = model(image)
            windows = model.weighted_windows(logits, noisy, generator)
        gradient = torch.randn_like(logits)

        def conditions() -> None:
            leaf = windows.weights.detach().requires_grad_()
            for part in replace(windows, weights=leaf).parts(OURS.windows_at_once):
                (classes,) = model.class_chunks(part)
                model.losses(part, model.predictions(part, classes)).sum().backward()

        def cast(run: Callable[[], object]) -> Callable[[], object]:
            def inside() -> None:
                with setup.autocast(precise=False):
                    run()

            return inside

        return {
            "guide, forward and backward": Part(cast(conditions), self.updater.zero_grad),
            "SegFormer, forward and backward": Part(
                cast(lambda: model(image).backward(gradient)), nothing
            ),
            "encoding": Part(cast(lambda: guide.encode(guide.view.windows(image))), nothing),
            "optimizer": Part(self.updater.optimizer.step, nothing),
        }

    def _share(self, way: Way, timing: Timing) -> str:
        """How near it comes to what arithmetic allows."""
        if not self.with_limits:
            return ""
        own, plain = (self._limit(each) for each in (way, PLAIN))
        text = f", limit {1e3 * own:.0f} ms: {own / timing.median:.0%}"
        if own == plain:
            return text
        return f"{text} (all tokens learning, {1e3 * plain:.0f} ms: {plain / timing.median:.0%})"

    def _limit(self, way: Way) -> float:
        """Seconds."""
        return (self.setup.conditions_tflop(way) + 2 * ENCODING + SEGFORMER) / SPEED

    def _tflop(self, part: str) -> float:
        if not self.with_limits:
            return 0.0
        guide = self.setup.conditions_tflop(OURS)
        known = {"guide": guide, "encoding": 2 * ENCODING, "SegFormer": SEGFORMER}
        return known.get(part.partition(",")[0], 0.0)


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds until the device has finished, and bytes of its memory at the peak."""
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    call()
    wait(device)
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def wait(device: torch.device) -> None:
    """For the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def nothing() -> None:
    """A part that needs no preparation."""


def say(text: str) -> None:
    """At once: whatever ends the run early leaves what was known."""
    print(text, flush=True)


def _taken(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients, which are then gone from the parameters."""
    taken = []
    for parameter in parameters:
        if parameter.grad is not None:
            taken.append(parameter.grad)
            parameter.grad = None
    return taken


def _difference(mine: list[Tensor], other: list[Tensor]) -> float:
    """Norm of the difference relative to the other's."""
    squares = [(a - b).square().sum() for a, b in zip(mine, other, strict=True)]
    norm = float(torch.nn.utils.get_total_norm(other))
    return math.sqrt(float(torch.stack(squares).sum())) / norm


def main() -> None:
    """Measure what fits into the budget, the most telling first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small models; without CUDA always")
    parser.add_argument("--compile", action="store_true", help="without CUDA too")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds")
    parser.add_argument("--only", default=",".join(NAMES), help=f"default %(default)s; {PROFILE}")
    parser.add_argument("--repeats", type=int, help="default 12; tiny models 2")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - {*NAMES, PROFILE}:
        parser.error(f"--only {','.join(sorted(unknown))}: choose from {', '.join(NAMES)}, profile")
    started = time.perf_counter()
    # Read at the first allocation. Contestants of different sizes take turns in the same memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    on_cuda = torch.cuda.is_available()
    device, tiny = torch.device("cuda" if on_cuda else "cpu"), options.tiny or not on_cuda
    setup = Setup(tiny=tiny, compiled=on_cuda or options.compile, device=device)
    wait(device)
    where = torch.cuda.get_device_name() if on_cuda else "CPU"
    what = "tiny models" if tiny else "SegFormer-B5 + SD3-medium"
    seconds = time.perf_counter() - started
    say(f"{what}, {where}, torch {torch.__version__}; built in {seconds:.0f} s")
    benchmark = Benchmark(
        setup, repeats=options.repeats or (2 if tiny else 12), with_limits=not tiny
    )
    steps: dict[str, Callable[[], None]] = {
        "headline": benchmark.headline,
        "breakdown": benchmark.breakdown,
        PROFILE: benchmark.profile,
        **{name: partial(benchmark.variant, name) for name in VARIANTS},
    }
    benchmark.parity()
    for name in names:
        spent = time.perf_counter() - started
        if spent > options.budget:
            say(f"{name}: not run, {spent:.0f} s of {options.budget:.0f} are spent")
            continue
        say(f"-- {name}, after {spent:.0f} s")
        try:
            steps[name]()
        except torch.OutOfMemoryError as error:
            say(f"{name}: {error!s:.200}")
        benchmark.updater.zero_grad()
    say(f"-- done after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
