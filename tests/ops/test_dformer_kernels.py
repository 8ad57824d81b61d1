"""DFormer's Triton kernels: interpreted on the CPU at small sizes, compiled on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

import dformer_kernel_cases  # noqa: E402 - imports triton

from segmill.ops.cell_means import cell_means  # noqa: E402
from segmill.ops.depthwise_conv import depthwise_conv  # noqa: E402

needs_gpu = pytest.mark.gpu


def test_dformers_kernels_agree_with_torch_when_interpreted():
    # A process of its own: the interpreter is chosen when triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = dformer_kernel_cases.__file__
    done = subprocess.run(
        [sys.executable, "-W", "error", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


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
        ("along", 2, 2, 16, 16),
    ],
)
def test_geometry_attention_on_cuda_is_torchs(form, lines, length, width, values, kind):
    dformer_kernel_cases.check_geometry_attention(
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
        dformer_kernel_cases.check_geometry_attention(
            images=2, lines_of=lines, length=length, heads=4, width=32, values=32,
            kind=torch.float32, form=form, device="cuda", tf32=True,
        )  # fmt: skip


def _lines_on_cuda(kind, *, length):
    case = dformer_kernel_cases.lines(
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
        found = dformer_kernel_cases.attention(case)
        runs.append((found, *torch.autograd.grad(found.square().sum(), learnt)))
    for run in runs[1:]:
        # Nothing is added atomically: equal to the last bit.
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@needs_gpu
def test_geometry_attention_on_cuda_holds_no_matrix_of_scores():
    case = _lines_on_cuda(torch.bfloat16, length=160)
    learnt = [case[name].requires_grad_() for name in ("query", "key", "value")]
    torch.autograd.grad(dformer_kernel_cases.attention(case).square().sum(), learnt)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(dformer_kernel_cases.attention(case).square().sum(), learnt)
    scores = 8 * 120 * 4 * 160 * 160 * 4
    # A dozen results and gradients of the size of the values are less than one matrix of float32.
    assert torch.cuda.max_memory_allocated() - before < scores


@needs_gpu
def test_frozen_weights_of_the_bias_get_no_gradient():
    case = _lines_on_cuda(torch.float32, length=40)
    dformer_kernel_cases.attention(
        case | {"query": case["query"].requires_grad_()}
    ).sum().backward()
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
    dformer_kernel_cases.check_depthwise_conv(
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
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(2, 60, 80, 128), (8, 15, 20, 512), (3, 7, 31, 40)])
def test_means_of_cells_on_cuda_are_torchs(size, kind):
    dformer_kernel_cases.check_cell_means(size=size, grid=7, kind=kind, device="cuda")


@needs_gpu
def test_a_map_smaller_than_the_grid_has_torchs_means():
    tokens = torch.randn(2, 5, 9, 16, device="cuda")
    torch.testing.assert_close(cell_means(tokens, 7).cpu(), cell_means(tokens.cpu(), 7))


@needs_gpu
def test_kernels_of_dformer_are_compiled_in_one_graph():
    # A process of its own: here every function checks the shapes of what it is called with.
    done = subprocess.run(
        [sys.executable, dformer_kernel_cases.__file__, "compiled"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
