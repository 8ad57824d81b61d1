"""The Triton kernels: interpreted on the CPU at small sizes, compiled on a GPU at real ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import kernel_cases  # noqa: E402 - imports triton

from segmill.ops.confusion import update_confusion  # noqa: E402
from segmill.ops.deformable_attention import deformable_attention  # noqa: E402
from segmill.ops.depthwise_conv import depthwise_conv  # noqa: E402
from segmill.ops.upsample_argmax import upsample_argmax  # noqa: E402
from segmill.ops.upsample_cross_entropy import upsample_cross_entropy  # noqa: E402

SIZES = [((32, 43), (128, 171)), ((65, 33), (257, 131)), ((24, 24), (24, 24)), ((40, 9), (17, 70))]
needs_gpu = pytest.mark.gpu


def test_kernels_agree_with_torch_when_interpreted():
    # A process of its own: the interpreter is chosen when triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(kernel_cases.__file__)
    done = subprocess.run(
        [sys.executable, "-W", "error", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [19, 150, 300])
def test_class_maps_on_cuda_are_torchs(sizes, align_corners, dtype, num_classes):
    kernel_cases.check_argmax(
        *sizes, num_classes=num_classes, dtype=dtype, align_corners=align_corners, device="cuda"
    )


@needs_gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_classes", [2, 150])
def test_loss_and_gradient_on_cuda_are_torchs(
    sizes, align_corners, dtype, smoothing, weighted, num_classes
):
    kernel_cases.check_cross_entropy(
        *sizes,
        num_classes=num_classes,
        dtype=dtype,
        align_corners=align_corners,
        smoothing=smoothing,
        weighted=weighted,
        device="cuda",
    )


@needs_gpu
@pytest.mark.parametrize("num_classes", [2, 19, 150, 1500])
def test_counts_on_cuda_are_exact(num_classes):
    kernel_cases.check_confusion(num_classes, 512 * 683, device="cuda")


@needs_gpu
def test_ties_and_wrong_labels_on_cuda():
    kernel_cases.check_tie("cuda")
    kernel_cases.check_wrong_label_is_not_silent("cuda")


@needs_gpu
def test_the_public_functions_agree_between_cpu_and_cuda():
    logits, label, weight = kernel_cases.inputs(
        (32, 32), (128, 128), num_classes=20, dtype=torch.float32, device="cpu"
    )
    for average in ("all", "valid"):
        cpu = upsample_cross_entropy(logits, label, class_weight=weight, average=average)
        cuda = upsample_cross_entropy(
            logits.cuda(), label.cuda(), class_weight=weight.cuda(), average=average
        )
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-6, atol=0)
    pred = upsample_argmax(logits, (128, 128))
    on_device = upsample_argmax(logits.cuda(), (128, 128))
    assert (on_device.cpu() != pred).double().mean() < 1e-4
    counts = torch.zeros(20, 20, dtype=torch.int64)
    update_confusion(counts, label, pred)
    counts_on_device = torch.zeros(20, 20, dtype=torch.int64, device="cuda")
    update_confusion(counts_on_device, label.cuda(), pred.cuda())
    assert torch.equal(counts_on_device.cpu(), counts)


@needs_gpu
def test_the_gradient_on_cuda_is_the_same_every_time():
    logits, label, _ = kernel_cases.inputs(
        (64, 64), (256, 256), num_classes=150, dtype=torch.bfloat16, device="cuda"
    )
    gradients = []
    for _ in range(3):
        (gradient,) = torch.autograd.grad(upsample_cross_entropy(logits, label), logits)
        gradients.append(gradient)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@needs_gpu
def test_the_loss_on_cuda_never_holds_the_upsampled_logits():
    logits, label, _ = kernel_cases.inputs(
        (128, 128), (512, 512), num_classes=150, dtype=torch.bfloat16, device="cuda"
    )
    upsample_cross_entropy(logits, label).backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    upsample_cross_entropy(logits, label).backward()
    upsampled = 2 * 150 * 512 * 512 * 4
    assert torch.cuda.max_memory_allocated() - before < upsampled / 5


@needs_gpu
@pytest.mark.parametrize("kinds", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("levels", [((64, 43), (32, 22), (16, 11)), ((40, 9),)])
@pytest.mark.parametrize(("heads", "width"), [(8, 32), (6, 64), (3, 20)])
def test_deformable_attention_on_cuda_is_torchs(levels, heads, width, kinds):
    kernel_cases.check_deformable_attention(
        levels, queries=500, heads=heads, width=width, points=4, kinds=kinds, device="cuda"
    )


@needs_gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_deformable_attention_of_one_type_on_cuda(kind):
    kernel_cases.check_deformable_attention(
        ((9, 7), (5, 4)), queries=33, heads=2, width=32, points=3, kinds=(kind, kind), device="cuda"
    )


@needs_gpu
def test_deformable_attention_agrees_between_cpu_and_cuda():
    shapes = ((32, 43), (16, 22))
    inputs = kernel_cases.points_of_maps(shapes, queries=99, heads=8, width=32, points=4)
    cpu = deformable_attention(inputs[0], shapes, *inputs[1:])
    value, *points = (each.cuda() for each in inputs)
    torch.testing.assert_close(
        deformable_attention(value, shapes, *points).cpu(), cpu, rtol=0, atol=1e-4
    )
    exact = deformable_attention(value.double(), shapes, *(each.double() for each in points))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float().cpu(), cpu, rtol=0, atol=1e-4)


@needs_gpu
def test_deformable_attention_on_cuda_never_holds_what_it_reads():
    shapes = ((64, 64), (32, 32), (16, 16))
    inputs = kernel_cases.points_of_maps(shapes, queries=5376, heads=8, width=32, points=4)
    value, *points = (each.cuda().requires_grad_() for each in inputs)
    deformable_attention(value, shapes, *points).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    deformable_attention(value, shapes, *points).sum().backward()
    everything_read = points[1].numel() * 32 * 4
    assert torch.cuda.max_memory_allocated() - before < everything_read / 2


@needs_gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("form", "lines", "length", "width", "values"),
    [
        ("both", 120, 160, 16, 16),
        ("both", 60, 80, 32, 32),
        ("merged", 30, 40, 32, 32),
        ("whole", 1, 300, 32, 32),
        ("whole", 1, 7, 32, 32),
        ("along", 3, 400, 16, 24),  # values of a size that is no power of two
        ("along", 5, 33, 8, 40),
        ("both", 23, 31, 32, 64),
        ("along", 2, 1, 16, 16),
    ],
)
def test_geometry_attention_on_cuda_is_torchs(form, lines, length, width, values, kind):
    kernel_cases.check_geometry_attention(
        images=2,
        lines_of=lines,
        length=length,
        heads=3,
        width=width,
        values=values,
        kind=kind,
        form=form,
        device="cuda",
    )


@needs_gpu
def test_geometry_attention_takes_tf32_where_torch_does(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    for form, lines, length in (("both", 30, 40), ("whole", 1, 300)):
        kernel_cases.check_geometry_attention(
            images=2, lines_of=lines, length=length, heads=4, width=32, values=32,
            kind=torch.float32, form=form, device="cuda", tf32=True,
        )  # fmt: skip


def _lines_on_cuda(kind, *, length):
    case = kernel_cases.lines(
        images=8, lines=120, length=length, heads=4, width=16, values=16, whole=False
    )
    return {
        name: tensor.to("cuda", kind if name in ("query", "key", "value") else torch.float32)
        for name, tensor in case.items()
    }


@needs_gpu
def test_geometry_attention_on_cuda_is_the_same_every_time():
    case = _lines_on_cuda(torch.bfloat16, length=160)
    learnt = [case[name].requires_grad_() for name in ("query", "key", "value", "weight")]
    runs = []
    for _ in range(3):
        found = kernel_cases.attention(case)
        runs.append((found, *torch.autograd.grad(found.square().sum(), learnt)))
    for run in runs[1:]:
        # Nothing is added atomically: equal to the last bit.
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@needs_gpu
def test_geometry_attention_on_cuda_holds_no_matrix_of_scores():
    case = _lines_on_cuda(torch.bfloat16, length=160)
    learnt = [case[name].requires_grad_() for name in ("query", "key", "value")]
    torch.autograd.grad(kernel_cases.attention(case).square().sum(), learnt)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(kernel_cases.attention(case).square().sum(), learnt)
    scores = 8 * 120 * 4 * 160 * 160 * 2
    # Results and gradients of the size of the values are less than scores in bfloat16.
    assert torch.cuda.max_memory_allocated() - before < scores


@needs_gpu
def test_frozen_weights_of_the_bias_get_no_gradient():
    case = _lines_on_cuda(torch.float32, length=40)
    kernel_cases.attention(case | {"query": case["query"].requires_grad_()}).sum().backward()
    assert case["weight"].grad is None


@needs_gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("added", ["none", "itself", "other"])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel"),
    [((2, 120, 160, 96), 3), ((2, 15, 20, 512), 7), ((3, 31, 17, 56), 5), ((1, 1, 3, 8), 7)],
)
def test_depthwise_convolution_on_cuda_is_torchs(size, kernel, kind, added, gelu):
    kernel_cases.check_depthwise_conv(
        size=size, kernel=kernel, kinds=(kind, kind), added=added, gelu=gelu, device="cuda"
    )


@needs_gpu
def test_depthwise_convolution_of_wide_tokens_under_autocast_stays_wide():
    tokens = torch.randn(2, 9, 11, 64, device="cuda", requires_grad=True)
    weight, bias = torch.randn(64, 1, 3, 3, device="cuda"), torch.randn(64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert depthwise_conv(tokens, weight, bias).dtype == torch.bfloat16
        assert depthwise_conv(tokens, weight, bias, added=tokens).dtype == torch.float32


@needs_gpu
def test_gradients_of_depthwise_weights_are_the_same_every_time():
    tokens = torch.randn(8, 60, 80, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(128, 1, 7, 7, device="cuda", requires_grad=True)
    bias = torch.randn(128, device="cuda", requires_grad=True)
    runs = [
        torch.autograd.grad(depthwise_conv(tokens, weight, bias).square().sum(), (weight, bias))
        for _ in range(3)
    ]
    for run in runs[1:]:
        # Chunks are summed in a fixed order.
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@needs_gpu
def test_kernels_of_dformer_are_compiled_in_one_graph():
    # A process of its own: here every function checks the shapes of what it is called with.
    done = subprocess.run(
        [sys.executable, kernel_cases.__file__, "compiled"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
