"""Part of benchmark 13: DFormerv2's geometry attention alone, rows, columns and whole maps.

Queries and keys are turned, then attend under the bias of positions and depth; the tensors are
parts of one projection, as in the network. Ours against torch's SDPA with the bias in memory and
against the explicit softmax, both eager. In the columns the peers' tensors are permuted views, as
in the published code. Results and gradients are compared with float64 first, then all run in turn
in one process on the same random data, timed by CUDA events. Batch 8, an image of 480 x 640.

    python -m benchmarks.geometry_attention [--batch 8] [--sweep] [--tiny]

`--sweep` also times other blocks of the kernels. `--tiny` runs anywhere and measures nothing.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.dformer import milliseconds
from torch import Tensor

from segmill.ops import geometry_attention
from segmill.ops.geometry_attention import attention_along_lines, geometry_bias

# (name, h, w, heads, channels of a head)
SHAPES = [
    ("v2-S stage 1", 120, 160, 4, 16),
    ("v2-S stage 2", 60, 80, 4, 32),
    ("v2-S stage 3", 30, 40, 8, 32),
    ("v2-L stage 1", 120, 160, 7, 16),
    ("v2-L stage 3", 30, 40, 14, 32),
    ("v2-S stage 4", 15, 20, 16, 32),
    ("v2-L stage 4", 15, 20, 20, 32),
]
Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Leaves, and how they are laid out for one call."""

    merged: Tensor  # (B, M, L, 3, n, c)
    weight: Tensor
    depth: Tensor
    decay: Tensor
    position: Tensor
    across: Tensor | None
    sine: Tensor
    cosine: Tensor

    def call(self, attention: Attention) -> Tensor:
        """What is found."""
        query, key, value = self.merged.unbind(3)
        return attention(
            query, key, value, self.depth, self.weight, self.decay,
            position=self.position, across=self.across, sine=self.sine, cosine=self.cosine,
        )  # fmt: skip

    def converted(self, kind: torch.dtype, rest: torch.dtype) -> "Case":
        """Tokens of one type, all else of another."""

        def turned(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(rest)

        return Case(
            self.merged.detach().to(kind).requires_grad_(),
            self.weight.detach().to(rest).requires_grad_(),
            turned(self.depth), turned(self.decay), turned(self.position), turned(self.across),
            turned(self.sine), turned(self.cosine),
        )  # fmt: skip


def case(h: int, w: int, heads: int, width: int, batch: int, device: str, *, whole: bool) -> Case:
    """Rows and then columns of a map, or the map as one line."""
    rows, columns = torch.arange(float(h)), torch.arange(float(w))
    M, L = (1, h * w) if whole else (h, w)
    turn = torch.arange(float(M * L)).view(M, L, 1) / 1e4 ** torch.linspace(0, 1, width // 2)
    tensors = {
        "merged": torch.randn(batch, M, L, 3, heads, width),
        "weight": torch.tensor([0.8, 1.2]),
        "depth": torch.randn(batch, M, L),
        "decay": torch.log(1 - 2.0 ** (-2 - 4 * torch.arange(heads) / heads)),
        "position": torch.cartesian_prod(rows, columns) if whole else columns[:, None],
        "sine": turn.sin(),
        "cosine": turn.cos(),
    }
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return Case(**moved, across=None if whole else rows[:, None].to(device))


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, depth: Tensor, weight: Tensor, decay: Tensor,
    *, position: Tensor, across: Tensor | None, sine: Tensor, cosine: Tensor,
) -> Tensor:  # fmt: skip
    """torch's attention, the bias in memory: what ours is where there is no CUDA."""
    return _in_passes(geometry_attention._plain, query, key, value, depth, weight, decay,
                      position=position, across=across, sine=sine, cosine=cosine)  # fmt: skip


def explicit(
    query: Tensor, key: Tensor, value: Tensor, depth: Tensor, weight: Tensor, decay: Tensor,
    *, position: Tensor, across: Tensor | None, sine: Tensor, cosine: Tensor,
) -> Tensor:  # fmt: skip
    """Matrices of scores and probabilities."""
    return _in_passes(_softmax, query, key, value, depth, weight, decay,
                      position=position, across=across, sine=sine, cosine=cosine)  # fmt: skip


def _in_passes(
    attend: Attention, query: Tensor, key: Tensor, value: Tensor, depth: Tensor, weight: Tensor,
    decay: Tensor, *, position: Tensor, across: Tensor | None, sine: Tensor, cosine: Tensor,
) -> Tensor:  # fmt: skip
    query = geometry_attention._turned(query, sine, cosine)
    key = geometry_attention._turned(key, sine, cosine)
    found = attend(query, key, value, depth, weight, decay, position)
    if across is None:
        return found
    query, key, found = (each.transpose(1, 2) for each in (query, key, found))
    return attend(query, key, found, depth.mT, weight, decay, across).transpose(1, 2)


def _softmax(
    query: Tensor, key: Tensor, value: Tensor, depth: Tensor, weight: Tensor, decay: Tensor,
    position: Tensor,
) -> Tensor:  # fmt: skip
    query, key, value = (each.transpose(2, 3) for each in (query, key, value))
    places = position if position.shape[1] == 2 else position[:, 0]
    bias = geometry_bias(places, depth.flatten(0, 1), weight, decay)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    shares = (scores + bias.unflatten(0, depth.shape[:2])).softmax(-1)
    return (shares.to(value.dtype) @ value).transpose(2, 3)


FORMS: dict[str, Attention] = {
    "ours": attention_along_lines,
    "SDPA": sdpa,
    "explicit": explicit,
}


def errors(inputs: Case, kind: torch.dtype) -> str:
    """Of ours, relative to the norms in float64: result, tokens' and weights' gradients."""
    exact, ours = (
        inputs.converted(torch.float64, torch.float64),
        inputs.converted(kind, torch.float32),
    )
    results = []
    for each, form in ((exact, sdpa), (ours, attention_along_lines)):
        found = each.call(form)
        upstream = torch.ones_like(found) + torch.arange(found.shape[-1], device=found.device) % 3
        gradients = torch.autograd.grad(found, (each.merged, each.weight), upstream.to(found.dtype))
        results.append((found, *gradients))
    apart = [
        ((mine.double() - theirs).norm() / theirs.norm()).item()
        for theirs, mine in zip(*results, strict=True)
    ]
    return "found {:.1e}, tokens' gradient {:.1e}, weights' gradient {:.1e}".format(*apart)


def timed(inputs: Case, forms: dict[str, Attention], device: str, repeats: int) -> dict:
    """{(form, pass): milliseconds}, taken in turn; and the most memory of a step in MiB."""
    upstream = torch.randn_like(inputs.call(attention_along_lines))

    def forward(form: Attention) -> None:
        with torch.no_grad():
            inputs.call(form)

    def step(form: Attention) -> None:
        torch.autograd.grad(inputs.call(form), (inputs.merged, inputs.weight), upstream)

    found: dict = {}
    for name, form in forms.items():
        for _ in range(3):
            forward(form)
            step(form)
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(form)
            found[name, "MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    taken: dict = {pair: [] for pair in itertools.product(forms, ("forward", "step"))}
    for _ in range(repeats):
        for (name, what), values in taken.items():
            call = forward if what == "forward" else step
            values.append(milliseconds(lambda call=call, name=name: call(forms[name]), device))
    return found | {pair: statistics.median(values) for pair, values in taken.items()}


def sweep(inputs: Case, device: str, repeats: int) -> None:
    """Ours with other blocks, warps and stages."""
    from segmill.ops import triton_geometry_attention as kernels

    chosen = kernels._block
    for block, warps, stages in itertools.product((32, 64, 128), (1, 2, 4, 8), (1, 2, 3)):
        if not 8 <= block // warps <= 64:
            continue
        shape = {"BLOCK": block, "num_warps": warps, "num_stages": stages}
        kernels._block = lambda *_, shape=shape: shape
        try:
            found = timed(inputs, {"ours": attention_along_lines}, device, repeats)
        except Exception as error:  # too much shared memory, or a compiler's limit
            print(f"    {shape}: {type(error).__name__}", flush=True)
            continue
        finally:
            kernels._block = chosen
        times = f"{found['ours', 'forward']:.3f} forward, {found['ours', 'step']:.3f} step"
        print(f"    {shape}: {times}", flush=True)


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
    torch.backends.cuda.matmul.allow_tf32 = True
    print(f"Geometry attention, batch {options.batch}, {device}; TF32 for float32. ms: median")
    heads = [f"{form} {what}" for form in FORMS for what in ("forward", "step")]
    print("| case | type |", " | ".join([*heads, "MiB of a step: ours", "SDPA", "explicit"]), "|")
    print("|---|---|" + "---|" * 9, flush=True)
    for name, h, w, n, c in SHAPES:
        if options.tiny:
            h, w, options.batch, options.repeats = h // 10, w // 10, 1, 2
        whole = name.endswith("4")
        for kind in (torch.bfloat16, torch.float32):
            try:
                inputs = case(h, w, n, c, options.batch, device, whole=whole)
                small = case(min(h, 45), min(w, 33), n, c, 1, device, whole=whole)
                said = errors(small, kind)
                inputs = inputs.converted(kind, torch.float32)
                found = timed(inputs, FORMS, device, options.repeats)
            except Exception as error:  # the others shall still be measured
                text = f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
                print(f"| {name} | {kind} | {text} |", flush=True)
                continue
            times = [f"{found[form, what]:.3f}" for form in FORMS for what in ("forward", "step")]
            memory = [f"{found.get((form, 'MiB'), 0):.0f}" for form in FORMS]
            print(f"| {name}, {h} x {w} |", " | ".join([str(kind)[6:], *times, *memory]), "|")
            print(f"    errors against float64: {said}", flush=True)
            if options.sweep and device == "cuda":
                sweep(inputs, device, options.repeats)


if __name__ == "__main__":
    main()
