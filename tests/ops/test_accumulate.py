"""Sums in place of tensors whose types differ."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from segmill.ops.accumulate import accumulate

KINDS = [torch.float32, torch.bfloat16, torch.float16]
# Interpreted in a process of its own: the interpreter is chosen when triton is imported.
SCRIPT = """
import torch
from segmill.ops.triton_accumulate import accumulate_cuda
for count in (0, 1, 2049):
    total, part = torch.randn(count), torch.randn(count).bfloat16()
    expected = total + part.float()
    accumulate_cuda(total, part)
    assert torch.equal(total, expected)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrower_tensor_is_added_in_the_type_of_the_sum(kind):
    total, part = torch.randn(3, 4), torch.randn(3, 4).to(kind)
    expected = total + part.float()
    accumulate(total, part)
    assert torch.equal(total, expected)


def test_other_strides_are_no_matter():
    total, part = torch.randn(4, 3), torch.randn(3, 4).bfloat16().t()
    expected = total + part
    accumulate(total, part)
    assert torch.equal(total, expected)


def test_the_kernel_adds_like_torch_when_interpreted():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "narrow"), [*itertools.product(KINDS, KINDS)])
def test_sums_on_cuda_are_torchs(kind, narrow):
    total = torch.randn(1000, 1003, device="cuda").to(kind)
    part = torch.randn(1000, 1003, device="cuda").to(narrow)
    expected, version = (total.float() + part.float()).to(kind), total._version
    accumulate(total, part)
    assert torch.equal(total, expected)
    assert total._version > version
