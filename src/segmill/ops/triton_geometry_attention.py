"""Attention with a geometric bias on CUDA; the plain counterpart says what.

Tokens are read by their strides, so that rows and columns of a map are the same tensors; nothing
of the size L x L is in memory, and the backward pass computes the scores again.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from segmill.ops.triton_geometry_kernels import attend, to_keys, to_queries


class Turn(NamedTuple):
    """Sines and cosines of the pairs of each token: (M, L, c / 2), float32."""

    sine: Tensor
    cosine: Tensor


class Bias(NamedTuple):
    """What the scores fall by: positions (L, 1) or (L, 2), depth (B, M, L), factors; float32."""

    position: Tensor
    depth: Tensor
    weight: Tensor
    decay: Tensor


class GeometryAttentionCuda(torch.autograd.Function):
    """What tokens (B, M, L, n, c) find along L; if `across` is given, then also along M.

    The second pass has the same queries and keys; its values are what the first one found.
    `position` is (L, P), `across` (M, P).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        depth: Tensor,
        weight: Tensor,
        decay: Tensor,
        position: Tensor,
        across: Tensor | None,
        sine: Tensor | None,
        cosine: Tensor | None,
    ) -> Tensor:
        """Only queries, keys, values and `weight` have gradients."""
        query, key, value = _readable(query, key), _readable(key, query), _readable(value, value)
        turn = None if sine is None or cosine is None else Turn(sine.float(), cosine.float())
        bias = Bias(position.float(), depth.float(), weight.float(), decay.float())
        found, partition = _attended(query, key, value, turn, bias)
        saved = [query, key, value, found, partition]
        result = found
        if across is not None:
            other = _transposed(bias, across)
            query_, key_, found_ = (each.transpose(1, 2) for each in (query, key, found))
            found, partition = _attended(query_, key_, found_, _turned_over(turn), other)
            saved += [found, partition]
            result = found.transpose(1, 2)
        empty = query.new_empty(0)
        ctx.save_for_backward(
            *saved, *bias, empty if across is None else across.float(), *(turn or (empty, empty))
        )
        ctx.crossed, ctx.turns, ctx.weight_type = across is not None, turn is not None, weight.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's doing
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Scores are computed again from the logarithm of their sums."""
        query, key, value, found, partition, *rest = ctx.saved_tensors
        bias, across, turn = Bias(*rest[-7:-3]), rest[-3], Turn(*rest[-2:])
        turn = turn if ctx.turns else None
        gradient, wanted = gradients[0], ctx.needs_input_grad[4]
        to_query, to_key = _like(query), _like(key)
        to_weight = None
        if ctx.crossed:
            last, last_partition = rest[:2]
            to_found = _like(found)
            tokens = [each.transpose(1, 2) for each in (query, key, found)]
            results = [each.transpose(1, 2) for each in (to_query, to_key, to_found)]
            to_weight = _differentiated(
                tokens, last, last_partition, gradient.transpose(1, 2), results,
                _turned_over(turn), _transposed(bias, across), more=False, weighed=wanted,
            )  # fmt: skip
            gradient = to_found
        to_value = _like(value)
        along = _differentiated(
            [query, key, value], found, partition, gradient, [to_query, to_key, to_value],
            turn, bias, more=ctx.crossed, weighed=wanted,
        )  # fmt: skip
        if along is not None:
            to_weight = (along if to_weight is None else along + to_weight).to(ctx.weight_type)
        return to_query, to_key, to_value, None, to_weight, *[None] * 5


def _readable(tokens: Tensor, partner: Tensor) -> Tensor:
    """Channels side by side, and the strides of `partner`."""
    if tokens.stride(-1) == 1 and tokens.stride() == partner.stride():
        return tokens
    return tokens.contiguous()


def _like(tokens: Tensor) -> Tensor:
    return torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)


def _transposed(bias: Bias, across: Tensor) -> Bias:
    return bias._replace(position=across.float(), depth=bias.depth.transpose(1, 2))


def _turned_over(turn: Turn | None) -> Turn | None:
    return None if turn is None else Turn(turn.sine.transpose(0, 1), turn.cosine.transpose(0, 1))


def _attended(
    query: Tensor, key: Tensor, value: Tensor, turn: Turn | None, bias: Bias
) -> tuple[Tensor, Tensor]:
    """What was found (B, M, L, n, d), and the logarithms, of base 2, of the sums (B, M, n, L)."""
    B, M, L, n, _ = query.shape
    found = torch.empty((B, M, L, n, value.shape[4]), dtype=value.dtype, device=value.device)
    partition = torch.empty((B, M, n, L), dtype=torch.float32, device=value.device)
    block = _block(L, query.dtype)
    attend[(B * M * n * triton.cdiv(L, block["BLOCK"]),)](
        query, key, value, found, partition, *_tables(query, turn), *bias,
        *_sizes(query, value, turn, bias), *found.stride()[:4],
        **_constants(query, value, turn, bias), **block,
    )  # fmt: skip
    return found, partition


def _differentiated(
    tokens: list[Tensor],
    found: Tensor,
    partition: Tensor,
    gradient: Tensor,
    results: list[Tensor],
    turn: Turn | None,
    bias: Bias,
    *,
    more: bool,
    weighed: bool,
) -> Tensor | None:
    """Fills `results`; `more` adds to what is in those of queries and keys. To the weights."""
    query, key, value = tokens
    gradient = _readable(gradient, gradient)
    B, M, L, n, _ = query.shape
    block = _block(L, query.dtype)
    programs = B * M * n * triton.cdiv(L, block["BLOCK"])
    overlap = torch.empty_like(partition)
    to_weight = partition.new_empty((programs, 2) if weighed else (1, 2))
    to_query, to_key, to_value = results
    tables, sizes = _tables(query, turn), _sizes(query, value, turn, bias)
    constants = _constants(query, value, turn, bias) | block | {"MORE": more}
    to_queries[(programs,)](
        query, key, value, found, gradient, partition, overlap, to_query, to_weight,
        *tables, *bias, *sizes, *found.stride()[:4], *gradient.stride()[:4], *to_query.stride()[:4],
        **constants, WEIGHED=weighed,
    )  # fmt: skip
    to_keys[(programs,)](
        query, key, value, gradient, partition, overlap, to_key, to_value,
        *tables, *bias, *sizes, *gradient.stride()[:4], *to_key.stride()[:4],
        *to_value.stride()[:4], **constants,
    )  # fmt: skip
    return to_weight.sum(0) if weighed else None


def _block(length: int, kind: torch.dtype) -> dict[str, int]:
    """Queries and keys of a block: the smaller one where it computes less padding.

    Of float32 always: Hopper's matrix units for four warps read TF32 in one direction only.
    """
    padded = [triton.cdiv(length, block) * block for block in (32, 64)]
    small = padded[0] < padded[1] or kind == torch.float32
    # Two stages: with three, the registers of a thread run out.
    return {"BLOCK": 32 if small else 64, "num_warps": 2 if small else 4, "num_stages": 2}


def _tables(query: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor]:
    return (query, query) if turn is None else (turn.sine, turn.cosine)


def _sizes(query: Tensor, value: Tensor, turn: Turn | None, bias: Bias) -> tuple[float, ...]:
    _, M, L, n, c = query.shape
    table = (0, 0) if turn is None else turn.sine.stride()[:2]
    scale = c**-0.5
    return (scale, M, L, n, *query.stride()[:4], *value.stride()[:4], *table, *bias.depth.stride())


def _constants(query: Tensor, value: Tensor, turn: Turn | None, bias: Bias) -> dict[str, Any]:
    c, d = query.shape[4], value.shape[4]
    return {
        "C": c,
        "D": d,
        # The matrix units take no less than 16.
        "WIDTH": max(16, triton.next_power_of_2(c)),
        "VALUES": max(16, triton.next_power_of_2(d)),
        "PLANE": bias.position.shape[1] == 2,
        "TURNS": turn is not None,
        "TF32": torch.backends.cuda.matmul.allow_tf32,
    }
