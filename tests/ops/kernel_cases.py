"""What the kernels must agree with, in float64. On a GPU, or interpreted on the CPU.

The weights of the interpolation are torch's float32 ones, as everywhere here (far from the origin
float32 positions are off by 1e-5, which is torch's doing and no matter of the kernels).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from segmill.ops.bilinear import interpolation_matrix
from segmill.ops.deformable_attention import deformable_attention
from segmill.ops.triton_argmax import upsample_argmax_cuda
from segmill.ops.triton_confusion import update_confusion_cuda
from segmill.ops.triton_cross_entropy import UpsampleCrossEntropyCuda
from segmill.ops.triton_deformable_attention import DeformableAttentionCuda

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
    check_tie("cpu")
    check_confusion(5, 700, device="cpu")
    check_wrong_label_is_not_silent("cpu")


if __name__ == "__main__":
    check_all_small()
