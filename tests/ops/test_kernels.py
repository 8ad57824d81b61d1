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
