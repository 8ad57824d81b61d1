"""Modulated layer normalisation on CUDA; the plain counterpart says what.

A program has some tokens of one image. Forward it takes one at a time with all its channels;
backward all of them, some channels at a time, twice, and sums what the condition gets over its
tokens. The programs' sums are added in a fixed order, so that gradients are the same each time.
"""
# ruff: noqa: ANN001, ANN202, N803 - arguments of kernels: pointers and numbers on the device

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from segmill.ops.modulated_norm import EPS

ROWS = 16  # tokens of a program
TILE_CHANNELS = 64  # of a step of the backward pass: 8 values a thread
WARPS = {"num_warps": 4}


class ModulatedNormCuda(torch.autograd.Function):
    """`tokens` and `branch` (N, T, D), the others (N, 1, D); the second result is of type `kind`.

    Without a branch the first result is a copy of the tokens: both gradients meet in one pass then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        shift: Tensor,
        scale: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        kind: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """One pass; the mean and the deviation of each token are kept."""
        tokens = tokens.contiguous()
        branch = None if branch is None else branch.contiguous()
        N, T, D = tokens.shape
        held = torch.empty_like(tokens)
        normal = torch.empty_like(tokens, dtype=kind)
        mean = tokens.new_empty((N, T), dtype=torch.float32)
        deviation = torch.empty_like(mean)
        _normalise[(N, triton.cdiv(T, ROWS))](
            tokens, tokens if branch is None else branch, shift, scale,
            shift if gate is None else gate, held, normal, mean, deviation,
            T, D, shift.stride(0), scale.stride(0), 0 if gate is None else gate.stride(0),
            EPS=EPS, ADDED=branch is not None, ROWS=ROWS, CHANNELS=triton.next_power_of_2(D),
            **WARPS,
        )  # fmt: skip
        ctx.save_for_backward(held, branch, scale, gate, mean, deviation)
        return held, normal

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's doing
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """To tokens, shift, scale, branch and gate."""
        held, branch, scale, gate, mean, deviation = ctx.saved_tensors
        to_held, to_normal = (each.contiguous() for each in gradients)
        N, T, D = held.shape
        chunks = triton.cdiv(T, ROWS)
        to_tokens = torch.empty_like(held)
        to_branch = to_tokens if branch is None else torch.empty_like(branch)
        sums = mean.new_empty((N, chunks, 2 if branch is None else 3, D))
        _differentiate[(N, chunks)](
            held, held if branch is None else branch, scale, scale if gate is None else gate,
            mean, deviation, to_held, to_normal, to_tokens, to_branch, sums,
            T, D, scale.stride(0), 0 if gate is None else gate.stride(0),
            ADDED=branch is not None, ROWS=ROWS, CHANNELS=TILE_CHANNELS, **WARPS,
        )  # fmt: skip
        of_image = sums.sum(dim=1, keepdim=True).to(scale.dtype)
        to_shift, to_scale = of_image[:, :, 0], of_image[:, :, 1]
        if branch is None:
            return to_tokens, to_shift, to_scale, None, None, None
        return to_tokens, to_shift, to_scale, to_branch, of_image[:, :, 2], None


@triton.jit
@no_type_check
def _normalise(
    tokens, branch, shift, scale, gate, held, normal, mean, deviation,
    T, D, of_shift, of_scale, of_gate,
    EPS: tl.constexpr, ADDED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    c = tl.arange(0, CHANNELS)
    real = c < D
    for step in range(ROWS):
        known = first + step < T
        row = image * T + first + step
        mask = real & known
        x = _values(tokens + row * D, c, mask)
        if ADDED:
            x += _values(gate + image * of_gate, c, real) * _values(branch + row * D, c, mask)
        # What is normalised is what is held, in its type.
        rounded = x.to(held.dtype.element_ty)
        tl.store(held + row * D + c, rounded, mask=mask)
        x = rounded.to(tl.float32)
        average = tl.sum(x, axis=0) / D
        centred = tl.where(real, x - average, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + EPS)
        scales = 1.0 + _values(scale + image * of_scale, c, real)
        result = centred * inverse * scales + _values(shift + image * of_shift, c, real)
        tl.store(normal + row * D + c, result.to(normal.dtype.element_ty), mask=mask)
        tl.store(mean + row, average, mask=known)
        tl.store(deviation + row, inverse, mask=known)


@triton.jit
@no_type_check
def _differentiate(
    held, branch, scale, gate, mean, deviation, to_held, to_normal, to_tokens, to_branch, sums,
    T, D, of_scale, of_gate,
    ADDED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    known = row < T
    place = image * T + row
    average = tl.load(mean + place, mask=known, other=0.0)[:, None]
    inverse = tl.load(deviation + place, mask=known, other=0.0)[:, None]
    scale += image * of_scale
    along = tl.zeros([ROWS, CHANNELS], tl.float32)
    across = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, D, CHANNELS):
        c, at, mask = _tile(place, known, first, D, CHANNELS)
        inner = _values(to_normal, at, mask) * (1.0 + _values(scale, c, c < D))[None, :]
        along += inner
        across += inner * (_values(held, at, mask) - average) * inverse
    along = (tl.sum(along, axis=1) / D)[:, None]
    across = (tl.sum(across, axis=1) / D)[:, None]
    parts = 3 if ADDED else 2
    sums += (image * tl.num_programs(1) + tl.program_id(1)) * parts * D
    # Once more, out of the cache for the most part.
    for first in range(0, D, CHANNELS):
        c, at, mask = _tile(place, known, first, D, CHANNELS)
        real = c < D
        upstream = _values(to_normal, at, mask)
        unit = (_values(held, at, mask) - average) * inverse
        inner = upstream * (1.0 + _values(scale, c, real))[None, :]
        gradient = _values(to_held, at, mask) + inverse * (inner - along - unit * across)
        tl.store(to_tokens + at, gradient.to(to_tokens.dtype.element_ty), mask=mask)
        # What is read is 0 beyond the tokens and the channels.
        tl.store(sums + c, tl.sum(upstream, axis=0), mask=real)
        tl.store(sums + D + c, tl.sum(upstream * unit, axis=0), mask=real)
        if ADDED:
            shared = gradient * _values(gate + image * of_gate, c, real)[None, :]
            tl.store(to_branch + at, shared.to(to_branch.dtype.element_ty), mask=mask)
            to_gate = tl.sum(gradient * _values(branch, at, mask), axis=0)
            tl.store(sums + 2 * D + c, to_gate, mask=real)


@triton.jit
@no_type_check
def _tile(place, known, first, D, CHANNELS: tl.constexpr):
    c = first + tl.arange(0, CHANNELS)
    return c, place[:, None] * D + c[None, :], known[:, None] & (c < D)[None, :]


@triton.jit
@no_type_check
def _values(start, offsets, mask):
    return tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)
