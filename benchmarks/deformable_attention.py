"""Benchmark 11: deformable attention in Mask2Former's pixel decoder, forward and backward.

Maps of strides 8, 16 and 32 of a 512 x 512 and of a 1024 x 1024 image; every cell is a query, 8
heads of 32 channels, 4 points a level, 2 images. Ours against the form that transformers and mmcv
have in plain torch: one grid_sample a level. mmcv's compiled operator is no part of this. All run
in turn in one process on the same random data, results compared first. On a CPU ours is that same
form, so that only layouts can differ.

On an H200 (torch 2.11): 512 x 512 in float32 0.60 against 2.63 ms and 33 against 426 MiB, 1024 x
1024 in float32 1.34 against 9.16 ms, in bfloat16 1.31 against 11.05 ms. At 512 the time is that of
starting the kernels.

    python -m benchmarks.deformable_attention [--device cuda] [--images 512 1024]
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmarks.upsample_ops import Contestants, add_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor

from segmill.ops.deformable_attention import deformable_attention

BATCH, HEADS, WIDTH, POINTS = 2, 8, 32, 4
Shapes = list[tuple[int, int]]
Attention = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]


def sampled_by_level(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The form without a compiled operator, all in the type of the values."""
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).to(value.dtype)
    read = []
    for index, level in enumerate(value.split([h * w for h, w in shapes], 1)):
        maps = level.flatten(2).transpose(1, 2).reshape(batch * heads, width, *shapes[index])
        grid = grids[:, :, :, index].transpose(1, 2).flatten(0, 1)
        read.append(F.grid_sample(maps, grid, align_corners=False))
    share = weights.to(value.dtype).transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    total = (torch.stack(read, -2).flatten(-2) * share).sum(-1)
    return total.reshape(batch, heads * width, queries).transpose(1, 2).contiguous()


def inputs(size: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Shapes, Tensor, Tensor]:
    """Points lie some cells around their query, as they do after training."""
    shapes = [(size // stride, size // stride) for stride in (8, 16, 32)]
    cells = sum(h * w for h, w in shapes)
    value = torch.randn(BATCH, cells, HEADS, WIDTH, device=device, dtype=dtype)
    centres = [torch.cartesian_prod(*[(torch.arange(h) + 0.5) / h] * 2).flip(1) for h, _ in shapes]
    around = 3 * torch.randn(BATCH, cells, HEADS, len(shapes), POINTS, 2, device=device)
    extent = torch.tensor(shapes, device=device).reshape(len(shapes), 1, 2)
    locations = torch.cat(centres).to(device).reshape(1, cells, 1, 1, 1, 2) + around / extent
    scores = torch.randn(BATCH, cells, HEADS, len(shapes) * POINTS, device=device)
    weights = scores.softmax(-1).reshape(around.shape[:-1])
    return value.requires_grad_(), shapes, locations.requires_grad_(), weights.requires_grad_()


def contestants(size: int, device: str, dtype: torch.dtype) -> Contestants:
    """Forward and backward of each; both must give float64's result."""
    value, shapes, locations, weights = inputs(size, device, dtype)
    upstream = torch.randn(BATCH, value.shape[1], HEADS * WIDTH, device=device, dtype=dtype)

    def step(attention: Attention) -> Callable[[], Tensor]:
        def call() -> Tensor:
            result = attention(value, shapes, locations, weights)
            torch.autograd.grad(result, (value, locations, weights), upstream)
            return result

        return call

    calls = {"ours": step(deformable_attention), "grid_sample": step(sampled_by_level)}
    exact = deformable_attention(
        value.detach().double(), shapes, locations.detach().double(), weights.detach().double()
    )
    error = (calls["ours"]().double() - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == torch.float32 else 4e-3), error
    return calls


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    device = options.device
    torch.manual_seed(0)
    table = Table(title=f"Deformable attention, {device}, {torch.get_num_threads()} threads")
    for heading in ("workload", "who", "median", "quartiles", "time", "peak memory", "memory"):
        table.add_column(heading)
    for size in options.images:
        for dtype in [torch.float32, torch.bfloat16] if device == "cuda" else [torch.float32]:
            what = f"11 {size} x {size}, {str(dtype).removeprefix('torch.')}"
            repeats = options.repeats or (20 if device == "cuda" else 3)
            add_rows(table, what, contestants(size, device, dtype), device, repeats)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
