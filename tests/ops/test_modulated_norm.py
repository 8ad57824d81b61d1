"""Layer normalisation scaled and shifted by a condition, with the residual before it."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from segmill.ops.modulated_norm import modulated_norm

needs_gpu = pytest.mark.gpu
SIZES = [(48, 256, 1152), (3, 77, 384), (2, 16, 64)]


def _parts(*, length=5, width=16):
    tokens, branch = torch.randn(2, 2, length, width)
    return tokens, branch, *torch.randn(3, 2, 1, width)


def test_tokens_are_normalised_then_scaled_by_one_plus_scale_and_shifted():
    tokens, _, shift, scale, _ = _parts()
    stream, normal = modulated_norm(tokens, shift, scale)
    unit = (tokens - tokens.mean(-1, keepdim=True)) / tokens.std(-1, correction=0, keepdim=True)
    assert stream is tokens
    torch.testing.assert_close(normal, unit * (1 + scale) + shift, rtol=1e-4, atol=1e-4)


def test_a_gated_branch_is_added_before():
    tokens, branch, shift, scale, gate = _parts()
    stream, normal = modulated_norm(tokens, shift, scale, branch=branch, gate=gate)
    torch.testing.assert_close(stream, tokens + gate * branch)
    expected = F.layer_norm(stream, (16,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(normal, expected)


def test_a_branch_without_its_gate_is_refused():
    tokens, branch, shift, scale, _ = _parts()
    with pytest.raises(ValueError, match="both branch and gate"):
        modulated_norm(tokens, shift, scale, branch=branch)


def _script():
    pytest.importorskip("triton")
    import norm_kernel_cases

    return norm_kernel_cases.__file__


def test_kernels_of_modulated_norm_agree_with_torch_when_interpreted():
    # A process of its own: the interpreter is chosen when triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", _script()], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_modulated_norm_on_cuda_is_torchs(size, added, kind):
    import norm_kernel_cases

    norm_kernel_cases.check_modulated_norm(size, added=added, kind=kind, device="cuda")


@needs_gpu
def test_gradients_of_the_condition_are_the_same_every_time():
    parts = [each.cuda().requires_grad_() for each in _parts(length=256, width=1152)]
    tokens, branch, shift, scale, gate = parts
    runs = []
    for _ in range(3):
        stream, normal = modulated_norm(tokens, shift, scale, branch=branch, gate=gate)
        runs.append(torch.autograd.grad((stream * normal).square().sum(), parts))
    # Programs' sums are added in a fixed order.
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@needs_gpu
def test_kernels_of_modulated_norm_are_compiled_in_one_graph():
    done = subprocess.run([sys.executable, _script(), "compiled"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
