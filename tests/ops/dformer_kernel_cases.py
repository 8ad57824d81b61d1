"""What DFormer's kernels must agree with, in float64: the counterpart of `kernel_cases`.

    python tests/ops/dformer_kernel_cases.py [compiled]

Interpreted on the CPU with TRITON_INTERPRET=1; `compiled` needs a GPU.
"""

import itertools
import sys

import torch
from torch import Tensor

from segmill.ops.cell_means import cell_means
from segmill.ops.depthwise_conv import depthwise_conv
from segmill.ops.geometry_attention import attention_along_lines
from segmill.ops.triton_cell_means import CellMeansCuda
from segmill.ops.triton_depthwise_conv import DepthwiseConvCuda
from segmill.ops.triton_geometry_attention import GeometryAttentionCuda


def lines(
    *, images: int, lines: int, length: int, heads: int, width: int, values: int, whole: bool
) -> dict[str, Tensor]:
    """Tokens of a map, or of a line each where `whole`: then the positions lie in a plane."""
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    turn = 6.0 * torch.rand(lines, length, width // 2, generator=draw)
    positions = torch.arange(float(length))[:, None]
    return {
        "query": normal(images, lines, length, heads, width),
        "key": normal(images, lines, length, heads, width),
        "value": normal(images, lines, length, heads, values),
        "depth": normal(images, lines, length),
        "weight": torch.tensor([0.7, 1.3]),
        "decay": -0.2 * torch.rand(heads, generator=draw),
        "position": torch.cat([positions // 5, positions % 5], 1) if whole else positions,
        "across": torch.arange(float(lines))[:, None],
        "sine": turn.sin(),
        "cosine": turn.cos(),
    }


def check_geometry_attention(
    *,
    images: int,
    lines_of: int,
    length: int,
    heads: int,
    width: int,
    values: int,
    kind: torch.dtype,
    form: str,
    device: str,
    tf32: bool = False,
) -> None:
    """What is found and all gradients against float64; `form` is along, both, whole or merged.

    Merged: queries, keys and values are parts of one tensor, as after one projection.
    """
    case = lines(
        images=images, lines=lines_of, length=length, heads=heads, width=width, values=values,
        whole=form == "whole",
    )  # fmt: skip
    names = ("query", "key", "value")
    case |= {name: case[name].to(kind) for name in names}
    exact = {name: tensor.to(device).double() for name, tensor in case.items()}
    case = {name: tensor.to(device) for name, tensor in case.items()}
    if form == "merged":
        parts = torch.cat([case[name] for name in names], dim=-1)
        split = parts.split([width, width, values], dim=-1)
        case |= dict(zip(names, split, strict=True))
    learnt = (*names, "weight")
    for tensors in (case, exact):
        tensors |= {name: tensors[name].detach().requires_grad_() for name in learnt}
        if form in ("along", "whole"):
            tensors["across"] = None  # type: ignore[assignment]
    expected = attention(exact)
    result = GeometryAttentionCuda.apply(*case.values())
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    upstream = upstream.to(device, kind)
    gradients = torch.autograd.grad(result, [case[name] for name in learnt], upstream)
    wanted = torch.autograd.grad(expected, [exact[name] for name in learnt], upstream.double())
    assert result.dtype == kind
    # The types' rounding (of TF32: 10 bits) of tokens, shares and results, in all four products.
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[kind]
    rounding = 3e-3 if tf32 else rounding
    for name, ours, theirs in zip(
        ("result", *learnt), (result, *gradients), (expected, *wanted), strict=True
    ):
        # The weights' two numbers are sums of terms of both signs, most of which cancel.
        bound = 10 * rounding if name == "weight" else rounding
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < bound, f"{name}: {error}"
        largest = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert largest < 2 * bound, f"{name}: {largest}"


def attention(case: dict[str, Tensor]) -> Tensor:
    """The public function's result."""
    names = ("position", "across", "sine", "cosine")
    return attention_along_lines(*list(case.values())[:6], **{name: case[name] for name in names})


def check_depthwise_conv(
    *,
    size: tuple[int, int, int, int],
    kernel: int,
    kinds: tuple[torch.dtype, torch.dtype],
    added: str,
    gelu: bool,
    device: str,
) -> None:
    """Result and all gradients against float64; `added` is none, itself or other.

    `kinds`: of the tokens, of the result. Tokens are a part of wider ones, as after a projection.
    """
    draw = torch.Generator().manual_seed(0)
    B, h, w, D = size
    wide = torch.randn(B, h, w, D + 16, generator=draw).to(device, kinds[0])
    learnt = [
        wide[..., 8 : 8 + D].requires_grad_(),
        torch.randn(D, 1, kernel, kernel, generator=draw).to(device).requires_grad_(),
        torch.randn(D, generator=draw).to(device).requires_grad_(),
    ]
    if added == "other":
        learnt += [torch.randn(size, generator=draw).to(device, kinds[1]).requires_grad_()]
    exact = [each.detach().double().requires_grad_() for each in learnt]
    other = learnt[3] if added == "other" else None
    result = DepthwiseConvCuda.apply(*learnt[:3], other, added == "itself", gelu, kinds[1])
    tokens, weight, bias = exact[:3]
    reference = {"none": None, "itself": tokens, "other": exact[-1]}[added]
    expected = depthwise_conv(tokens, weight, bias, added=reference, gelu=gelu)
    upstream = torch.randn(size, generator=draw).to(device, kinds[1])
    gradients = torch.autograd.grad(result, learnt, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    assert result.dtype == kinds[1]
    # One rounding of weights and result to the narrow type; sums are float32.
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[kinds[0]]
    pairs = zip((result, *gradients), (expected, *wanted), strict=True)
    for index, (ours, theirs) in enumerate(pairs):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < rounding, f"{index}: {error}"
        largest = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert largest < 2 * rounding, f"{index}: {largest}"


def check_cell_means(
    *, size: tuple[int, int, int, int], grid: int, kind: torch.dtype, device: str
) -> None:
    """Means and their gradient against float64; tokens are a part of wider ones."""
    draw = torch.Generator().manual_seed(0)
    B, h, w, D = size
    wide = torch.randn(B, h, w, D + 16, generator=draw).to(device, kind)
    tokens = wide[..., 8 : 8 + D].requires_grad_()
    exact = tokens.detach().double().requires_grad_()
    found, expected = CellMeansCuda.apply(tokens, grid), cell_means(exact, grid)
    upstream = torch.randn(B, grid * grid, D, generator=draw).to(device, kind)
    (gradient,) = torch.autograd.grad(found, tokens, upstream)
    (wanted,) = torch.autograd.grad(expected, exact, upstream.double())
    assert found.dtype == kind
    # Sums are float32; one rounding of the result, which the interpreter cuts off.
    rounding = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[kind]
    for ours, theirs in ((found, expected), (gradient, wanted)):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < rounding, error


def check_all_small() -> None:
    """Every branch at sizes that the interpreter manages."""
    single, half, other = torch.float32, torch.float16, torch.bfloat16
    small_lines: list[tuple[int, int, int, int, torch.dtype, str]] = [
        (2, 3, 16, 16, single, "both"),  # lines, tokens, channels of keys and of values
        (1, 40, 16, 24, single, "whole"),
        (1, 33, 8, 5, single, "along"),  # sizes that are no powers of two
        (1, 5, 16, 16, half, "merged"),  # the interpreter multiplies no bfloat16
    ]
    for number, length, width, values, kind, form in small_lines:
        check_geometry_attention(
            images=1, lines_of=number, length=length, heads=2, width=width, values=values,
            kind=kind, form=form, device="cpu",
        )  # fmt: skip
    small_maps: list[tuple[tuple[int, int, int, int], int, torch.dtype, str, bool]] = [
        ((2, 5, 7, 16), 3, single, "itself", True),
        ((1, 9, 4, 8), 7, single, "none", False),
        ((1, 6, 5, 72), 5, single, "other", True),  # channels that no block divides
        ((1, 1, 2, 16), 3, half, "itself", False),
        ((1, 4, 5, 16), 5, other, "other", False),
    ]
    for size, kernel, kind, added, gelu in small_maps:
        check_depthwise_conv(
            size=size, kernel=kernel, kinds=(kind, kind), added=added, gelu=gelu, device="cpu"
        )

    for height, width, grid, kind in (
        (15, 20, 7, single),
        (7, 7, 7, single),
        (9, 4, 3, other),
        (8, 31, 2, half),
        (5, 5, 1, single),
    ):
        check_cell_means(size=(2, height, width, 72), grid=grid, kind=kind, device="cpu")


def check_compiled() -> None:
    """torch.compile takes DFormer's kernels into one graph; a GPU, for it compiles for that."""
    case = lines(images=2, lines=9, length=40, heads=2, width=16, values=16, whole=False)
    case = {name: tensor.cuda() for name, tensor in case.items()}
    case |= {name: case[name].requires_grad_() for name in ("query", "key", "value", "weight")}
    tokens = torch.randn(2, 9, 11, 64, device="cuda", requires_grad=True)
    weight = torch.randn(64, 1, 3, 3, device="cuda", requires_grad=True)
    bias = torch.randn(64, device="cuda", requires_grad=True)

    def conv() -> Tensor:
        return depthwise_conv(tokens, weight, bias, added=tokens, gelu=True)

    learnt = [case[name] for name in ("query", "key", "value", "weight")]
    calls = (
        (conv, [tokens, weight, bias]),
        (lambda: cell_means(tokens, 7), [tokens]),
        (lambda: attention(case), learnt),
    )
    for (call, leaves), backend in itertools.product(calls, ("aot_eager", "inductor")):
        eager, compiled = call(), torch.compile(call, backend=backend, fullgraph=True)()
        upstream = torch.randn_like(eager)
        # The same kernels on the same data; sums of their parts may be of another order.
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
        ours = torch.autograd.grad(compiled, leaves, upstream)
        theirs = torch.autograd.grad(eager, leaves, upstream)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    check_compiled() if sys.argv[1:] == ["compiled"] else check_all_small()
