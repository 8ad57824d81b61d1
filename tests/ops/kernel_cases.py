"""What the kernels must agree with, in float64. On a GPU, or interpreted on the CPU.

The weights of the interpolation are torch's float32 ones, as everywhere here (far from the origin
float32 positions are off by 1e-5, which is torch's doing and no matter of the kernels).
"""

import itertools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from segmill.ops.bilinear import interpolation_matrix
from segmill.ops.deformable_attention import deformable_attention
from segmill.ops.depthwise_conv import depthwise_conv
from segmill.ops.geometry_attention import attention_along_lines
from segmill.ops.triton_argmax import upsample_argmax_cuda
from segmill.ops.triton_confusion import update_confusion_cuda
from segmill.ops.triton_cross_entropy import UpsampleCrossEntropyCuda
from segmill.ops.triton_deformable_attention import DeformableAttentionCuda
from segmill.ops.triton_depthwise_conv import DepthwiseConvCuda
from segmill.ops.triton_geometry_attention import GeometryAttentionCuda

Size = tuple[int, int]


def inputs(
    small: Size, large: Size, *, num_classes: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which a fifth is ignored, class weights."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, num_classes, *small, generator=draw)
    label = torch.randint(0, num_classes, (2, *large), generator=draw)
    label[torch.rand(label.shape, generator=draw) < 0.2] = 255
    weight = torch.rand(num_classes, generator=draw) + 0.5
    return logits.to(device, dtype).requires_grad_(), label.to(device), weight.to(device)


def upsampled(logits: Tensor, size: Size, *, align_corners: bool) -> Tensor:
    """The reference: two small matrix products."""
    rows, columns = (
        interpolation_matrix(source, target, align_corners=align_corners, dtype=torch.float32)
        for source, target in zip(logits.shape[2:], size, strict=True)
    )
    return rows.to(logits) @ logits @ columns.to(logits).T


def check_cross_entropy(
    small: Size,
    large: Size,
    *,
    num_classes: int,
    dtype: torch.dtype,
    align_corners: bool,
    smoothing: float,
    weighted: bool,
    device: str,
) -> None:
    """Sum of losses, sum of weights and gradient against torch in float64."""
    logits, label, weight = inputs(
        small, large, num_classes=num_classes, dtype=dtype, device=device
    )
    weight = weight if weighted else torch.ones_like(weight)
    exact = logits.detach().double().requires_grad_()
    wide = upsampled(exact, large, align_corners=align_corners)
    options = {"ignore_index": 255, "label_smoothing": smoothing}
    expected = F.cross_entropy(wide, label, weight.double(), reduction="sum", **options)
    expected.backward()
    # Half of the cases with the labels of a data set, half with torch's own.
    kind = torch.uint8 if weighted else torch.int64
    loss, total = UpsampleCrossEntropyCuda.apply(
        logits, label.to(kind), weight, align_corners, 255, smoothing
    )
    loss.backward()
    # float32 sums over the classes, the fast exponential; one rounding to the logits' type last.
    torch.testing.assert_close(loss, expected, rtol=5e-6, atol=0)
    counted = weight.double()[label[label != 255]].sum()
    torch.testing.assert_close(total, counted, rtol=1e-6, atol=0)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=2e-5)


def check_argmax(
    small: Size,
    large: Size,
    *,
    num_classes: int,
    dtype: torch.dtype,
    align_corners: bool,
    device: str,
) -> None:
    """Equal to the argmax of float64 but where two classes are equal to float32 rounding."""
    logits, _, _ = inputs(small, large, num_classes=num_classes, dtype=dtype, device=device)
    kind = torch.uint8 if num_classes <= 256 else torch.int64
    pred = upsample_argmax_cuda(logits.detach(), large, align_corners=align_corners, dtype=kind)
    wide = upsampled(logits.detach().double(), large, align_corners=align_corners)
    chosen = wide.gather(1, pred.long().unsqueeze(1))[:, 0]
    assert pred.dtype == kind
    assert (wide.amax(1) - chosen).max() < 1e-5
    assert (pred != wide.argmax(1)).double().mean() < 1e-4


def check_tie(device: str) -> None:
    """The lowest of the classes that share the maximum."""
    logits = torch.zeros(1, 5, 3, 3, device=device)
    logits[:, [2, 4]] = 1.0
    pred = upsample_argmax_cuda(logits, (7, 7), align_corners=False, dtype=torch.uint8)
    assert (pred == 2).all()


def check_confusion(num_classes: int, pixels: int, *, device: str) -> None:
    """Added to what is there; ignored pixels and labels outside the classes do not count.

    With more than 255 classes, 255 is ignored all the same, and uint8 cannot hold the labels.
    """
    draw = torch.Generator().manual_seed(0)
    label = torch.randint(0, num_classes, (2, pixels), generator=draw)
    pred = torch.randint(0, num_classes, (2, pixels), generator=draw)
    label[:, ::7] = 255
    label[0, 1] = num_classes + 3
    known = (label < num_classes) & (label != 255)
    expected = torch.ones(num_classes, num_classes, dtype=torch.int64)
    entries = label[known] * num_classes + pred[known]
    expected += entries.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)
    for kind in (torch.int64, torch.uint8) if num_classes < 250 else (torch.int64,):
        confusion = torch.ones(num_classes, num_classes, dtype=torch.int64, device=device)
        update_confusion_cuda(confusion, label.to(device, kind), pred.to(device), ignore_index=255)
        assert torch.equal(confusion.cpu(), expected)


def check_wrong_label_is_not_silent(device: str) -> None:
    """NaN, because raising would mean waiting for the device."""
    logits, label, weight = inputs(
        (3, 3), (5, 5), num_classes=4, dtype=torch.float32, device=device
    )
    label[0, 0, 0] = 9
    loss, _ = UpsampleCrossEntropyCuda.apply(logits, label, weight, False, 255, 0.0)
    assert loss.isnan()


def points_of_maps(
    shapes: tuple[Size, ...], *, queries: int, heads: int, width: int, points: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations and weights of two images; some points lie outside, one far outside.

    No point is closer to the border of two cells than float32 tells apart: the gradient jumps.
    """
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(2, sum(h * w for h, w in shapes), heads, width, generator=draw)
    size = (2, queries, heads, len(shapes), points)
    extent = torch.tensor(shapes).flip(1).reshape(len(shapes), 1, 2)
    cell = ((extent + 4) * torch.rand(*size, 2, generator=draw)).floor() - 2.5
    locations = (cell + 0.05 + 0.9 * torch.rand(*size, 2, generator=draw)) / extent
    locations[0, 0, 0, 0, 0] = torch.tensor([6e4, -6e4])
    return value, locations, torch.rand(size, generator=draw)


def check_deformable_attention(
    shapes: tuple[Size, ...],
    *,
    queries: int,
    heads: int,
    width: int,
    points: int,
    kinds: tuple[torch.dtype, torch.dtype],
    device: str,
) -> None:
    """Sums and all three gradients against float64; `kinds`: of the values, of the rest."""
    inputs = points_of_maps(shapes, queries=queries, heads=heads, width=width, points=points)
    ours = [
        each.to(device, kind).requires_grad_()
        for each, kind in zip(inputs, (kinds[0], kinds[1], kinds[1]), strict=True)
    ]
    exact = [each.detach().double().requires_grad_() for each in ours]
    result = DeformableAttentionCuda.apply(ours[0], shapes, *ours[1:])
    expected = deformable_attention(exact[0], shapes, *exact[1:])
    # float32 positions in pixels; one rounding to the type of the result last.
    rounding = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    position = 1e-6 * max(max(shape) for shape in shapes)
    assert result.dtype == kinds[0]
    torch.testing.assert_close(
        result.double(), expected, rtol=rounding[kinds[0]], atol=4e-6 + position
    )
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    upstream = upstream.to(device, kinds[0])
    gradients = torch.autograd.grad(result, ours, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for gradient, mine, theirs in zip(gradients, ours, wanted, strict=True):
        assert gradient.dtype == mine.dtype
        atol = (2e-6 + position) * theirs.abs().max().item()
        torch.testing.assert_close(gradient.double(), theirs, rtol=rounding[mine.dtype], atol=atol)


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


def check_all_small() -> None:
    """Every branch at sizes that the interpreter manages."""
    small_cases = [
        ((3, 4), (9, 13), 5, torch.float32, False, 0.0, False),
        ((3, 4), (7, 9), 9, torch.bfloat16, True, 0.1, True),
        ((9, 35), (12, 38), 2, torch.float32, False, 0.1, True),
        ((3, 2), (3, 2), 3, torch.float32, True, 0.0, True),
        ((7, 5), (4, 3), 3, torch.float32, False, 0.0, False),
        ((1, 1), (4, 3), 2, torch.float32, False, 0.0, False),
    ]
    for small, large, num_classes, dtype, align_corners, smoothing, weighted in small_cases:
        check_cross_entropy(
            small,
            large,
            num_classes=num_classes,
            dtype=dtype,
            align_corners=align_corners,
            smoothing=smoothing,
            weighted=weighted,
            device="cpu",
        )
        check_argmax(
            small,
            large,
            num_classes=num_classes,
            dtype=dtype,
            align_corners=align_corners,
            device="cpu",
        )
    single, half, other = torch.float32, torch.float16, torch.bfloat16
    small_points: list[tuple[tuple[Size, ...], int, int, int, int, tuple]] = [
        (((5, 3), (2, 4), (1, 1)), 5, 2, 8, 2, (single, single)),
        (((4, 6),), 5, 3, 5, 3, (single, single)),  # sizes that are no powers of two
        (((3, 3), (2, 2)), 5, 2, 16, 1, (other, single)),
        (((3, 3), (2, 2)), 5, 2, 16, 1, (half, half)),
    ]
    for shapes, queries, heads, width, points, kinds in small_points:
        check_deformable_attention(
            shapes,
            queries=queries,
            heads=heads,
            width=width,
            points=points,
            kinds=kinds,
            device="cpu",
        )
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
    check_tie("cpu")
    check_confusion(5, 700, device="cpu")
    check_wrong_label_is_not_silent("cpu")


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
    calls = ((conv, [tokens, weight, bias]), (lambda: attention(case), learnt))
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
