"""Part of benchmark 13: DFormer's depthwise convolutions, channels last, with what follows them.

Ours in one pass against torch's convolution (cuDNN), addition and GELU, eager and compiled, forward
and a step with all gradients, on random tokens of a batch of 8 images of 480 x 640. Results are
compared first; all run in turn in one process, timed by CUDA events. `--sweep`: other tiles.

    python -m benchmarks.depthwise_conv [--batch 8] [--sweep] [--tiny]
"""

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmarks.dformer import milliseconds
from torch import Tensor

from segmill.ops.depthwise_conv import depthwise_conv

# (name, h, w, channels, kernel, ends with GELU, adds the tokens)
SHAPES = [
    ("v1-L perceptron, stage 1", 120, 160, 768, 3, True, True),
    ("v1-L perceptron, stage 3", 30, 40, 1152, 3, True, True),
    ("v1-L attention, stage 1", 120, 160, 96, 7, False, False),
    ("v1-L attention, stage 3", 30, 40, 288, 7, False, False),
    ("v2-S perceptron, stage 1", 120, 160, 256, 3, False, True),
    ("v2-S perceptron, stage 3", 30, 40, 768, 3, False, True),
    ("v2-L values, stage 1", 120, 160, 112, 5, False, False),
    ("v2-S values, stage 3", 30, 40, 256, 5, False, False),
]


def plain(tokens: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool, residual: bool) -> Tensor:
    """One operation after the other."""
    feature = tokens.permute(0, 3, 1, 2)
    weight, bias = weight.to(tokens.dtype), bias.to(tokens.dtype)
    found = F.conv2d(feature, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    found = found.permute(0, 2, 3, 1)
    found = found + tokens if residual else found
    return F.gelu(found) if gelu else found


def ours(tokens: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool, residual: bool) -> Tensor:
    """One pass."""
    return depthwise_conv(tokens, weight, bias, added=tokens if residual else None, gelu=gelu)


def timed(forms: dict[str, Callable], leaves: list[Tensor], device: str, repeats: int) -> dict:
    """{(form, pass): milliseconds}."""
    upstream = torch.randn_like(forms["ours"](*leaves))

    def forward(form: Callable) -> None:
        with torch.no_grad():
            form(*leaves)

    def step(form: Callable) -> None:
        torch.autograd.grad(form(*leaves), leaves, upstream)

    taken: dict = {pair: [] for pair in itertools.product(forms, (forward, step))}
    for repeat in range(repeats + 3):
        for (name, call), values in taken.items():
            spent = milliseconds(lambda call=call, name=name: call(forms[name]), device)
            if repeat >= 3:
                values.append(spent)
    return {(name, call.__name__): statistics.median(v) for (name, call), v in taken.items()}


def sweep(form: Callable, leaves: list[Tensor], repeats: int) -> None:
    """Ours with other tiles."""
    from segmill.ops import triton_depthwise_conv as kernels

    chosen = kernels.TILE, kernels.SMALL_TILE, kernels.PROGRAMS, kernels.WARPS
    for tile, small, programs, warps in (
        (1024, 1024, 1056, 4), (2048, 512, 1056, 4), (4096, 2048, 1056, 4), (2048, 1024, 528, 4),
        (2048, 1024, 2112, 4), (2048, 1024, 4224, 4), (4096, 2048, 1056, 8), (1024, 512, 2112, 2),
    ):  # fmt: skip
        kernels.TILE, kernels.SMALL_TILE, kernels.PROGRAMS = tile, small, programs
        kernels.WARPS = {"num_warps": warps}
        found = timed({"ours": form}, leaves, "cuda", repeats)
        said = f"{found['ours', 'forward']:.3f} forward, {found['ours', 'step']:.3f} step"
        print(f"    tiles {tile} {small}, programs {programs}, warps {warps}: {said}", flush=True)
    kernels.TILE, kernels.SMALL_TILE, kernels.PROGRAMS, kernels.WARPS = chosen


def main() -> None:
    """A table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    print("| case | type | ours forward | step | cuDNN forward | step | compiled forward | step |")
    print("|---|---|" + "---|" * 6, flush=True)
    for (name, h, w, channels, size, gelu, residual), kind in itertools.product(
        SHAPES, (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    ):
        if options.tiny:
            h, w, options.batch, options.repeats = h // 10, w // 10, 1, 2
        tokens = torch.randn(options.batch, h, w, channels, device=device, dtype=kind)
        weight = torch.randn(channels, 1, size, size, device=device) / size
        leaves = [tokens, weight, torch.randn(channels, device=device)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        keywords = {"gelu": gelu, "residual": residual}
        forms: dict[str, Callable] = {
            "ours": lambda *leaves, keywords=keywords: ours(*leaves, **keywords),
            "cuDNN": lambda *leaves, keywords=keywords: plain(*leaves, **keywords),
        }
        if device == "cuda":
            fast = torch.compile(plain, dynamic=False)
            forms["compiled"] = lambda *leaves, k=keywords, fast=fast: fast(*leaves, **k)
        try:
            exact = plain(*(leaf.detach().double() for leaf in leaves), **keywords)
            error = (forms["ours"](*leaves).double() - exact).norm() / exact.norm()
            del exact
            found = timed(forms, leaves, device, options.repeats)
        except Exception as error:  # the others shall still be measured
            text = f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
            print(f"| {name} | {kind} | {text} |", flush=True)
            continue
        times = [f"{found[form, what]:.3f}" for form in forms for what in ("forward", "step")]
        print(
            f"| {name}, {channels} of {size} x {size} |", " | ".join([str(kind)[6:], *times]), "|"
        )
        print(f"    error of ours against float64: {error:.1e}", flush=True)
        if options.sweep and device == "cuda":
            sweep(forms["ours"], leaves, options.repeats)


if __name__ == "__main__":
    main()
