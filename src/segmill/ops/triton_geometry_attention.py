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


class Tokens(NamedTuple):
    """Of (B, M, L, n, c) and (B, M, L, n, d); queries and keys have the same strides."""

    query: Tensor
    key: Tensor
    value: Tensor


class Geometry(NamedTuple):
    """All float32. Sines and cosines are those of the pairs of each token: (M, L, c / 2).

    `position` is (L, P), or (M, P) where attention goes across the lines; depth is (B, M, L).
    """

    sine: Tensor
    cosine: Tensor
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
        sine: Tensor,
        cosine: Tensor,
    ) -> Tensor:
        """Only queries, keys, values and `weight` have gradients."""
        tokens = Tokens(_readable(query, key), _readable(key, query), _readable(value, value))
        # Tables have one distance from pair to pair, and both the same.
        tables = sine.float().contiguous(), cosine.float().contiguous()
        bias = (depth.float(), weight.float(), decay.float())
        geometry = Geometry(*tables, position.float(), *bias)
        found, partition = _attended(tokens, geometry, crossed=False)
        saved, result = (*tokens, *geometry, found, partition), found
        if across is not None:
            geometry = geometry._replace(position=across.float())
            tokens = tokens._replace(value=found)
            result, partition = _attended(tokens, geometry, crossed=True)
            saved = (*saved, geometry.position, result, partition)
        ctx.save_for_backward(*saved)
        ctx.crossed, ctx.weight_type = across is not None, weight.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's doing
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Scores are computed again from the logarithm of their sums."""
        saved = ctx.saved_tensors
        tokens, geometry = Tokens(*saved[:3]), Geometry(*saved[3:9])
        found, partition = saved[9:11]
        gradient, weighed = _readable(gradients[0], gradients[0]), ctx.needs_input_grad[4]
        results = Tokens(*(_like(each) for each in tokens))
        to_weight = None
        if ctx.crossed:
            position, last, last_partition = saved[11:]
            to_found = _like(found)
            to_weight = _differentiated(
                tokens._replace(value=found), geometry._replace(position=position), last,
                last_partition, gradient, results._replace(value=to_found),
                crossed=True, more=False, weighed=weighed,
            )  # fmt: skip
            gradient = to_found
        along = _differentiated(
            tokens, geometry, found, partition, gradient, results,
            crossed=False, more=ctx.crossed, weighed=weighed,
        )  # fmt: skip
        if along is not None:
            to_weight = (along if to_weight is None else along + to_weight).to(ctx.weight_type)
        return *results, None, to_weight, None, None, None, None, None


def _readable(tokens: Tensor, partner: Tensor) -> Tensor:
    """Channels side by side, and the strides of `partner`."""
    if tokens.stride(-1) == 1 and tokens.stride() == partner.stride():
        return tokens
    return tokens.contiguous()


def _like(tokens: Tensor) -> Tensor:
    return torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)


def _attended(tokens: Tokens, geometry: Geometry, *, crossed: bool) -> tuple[Tensor, Tensor]:
    """What was found (B, M, L, n, d), and the logarithms, of base 2, of the sums: (programs, L)."""
    B, M, L, n = _extent(tokens.query, crossed)
    found = _like(tokens.value)
    partition = torch.empty((B * M * n, L), dtype=torch.float32, device=found.device)
    block = _block(L, found.dtype)
    arguments: tuple[Any, ...] = (*tokens, found, partition, *geometry)
    arguments += (*_sizes(tokens, geometry, crossed), *_strides(found, crossed))
    programs = B * M * n * triton.cdiv(L, block["BLOCK"])
    attend[(programs,)](*arguments, **_constants(tokens, geometry), **block)
    return found, partition


def _differentiated(
    tokens: Tokens,
    geometry: Geometry,
    found: Tensor,
    partition: Tensor,
    gradient: Tensor,
    results: Tokens,
    *,
    crossed: bool,
    more: bool,
    weighed: bool,
) -> Tensor | None:
    """Fills `results`; `more` adds to what is in those of queries and keys. To the weights."""
    B, M, L, n = _extent(tokens.query, crossed)
    block = _block(L, found.dtype)
    programs = B * M * n * triton.cdiv(L, block["BLOCK"])
    overlap = torch.empty_like(partition)
    to_weight = partition.new_empty((programs if weighed else 1, 2))
    common = (*geometry, *_sizes(tokens, geometry, crossed))
    of_gradient, of_query = _strides(gradient, crossed), _strides(results.query, crossed)
    constants = {**_constants(tokens, geometry), **block, "MORE": more}
    arguments: tuple[Any, ...] = (*tokens, found, gradient, partition, overlap, results.query)
    arguments += (to_weight, *common, *_strides(found, crossed), *of_gradient, *of_query)
    to_queries[(programs,)](*arguments, **constants, WEIGHED=weighed)
    arguments = (*tokens, gradient, partition, overlap, results.key, results.value, *common)
    arguments += (*of_gradient, *_strides(results.key, crossed), *_strides(results.value, crossed))
    to_keys[(programs,)](*arguments, **constants)
    return to_weight.sum(0) if weighed else None


def _block(length: int, kind: torch.dtype) -> dict[str, int]:
    """Queries and keys of a block: the smaller one where it computes less padding.

    Of float32 always: Hopper's matrix units for four warps read TF32 in one direction only.
    """
    padded = [triton.cdiv(length, block) * block for block in (32, 64)]
    small = padded[0] < padded[1] or kind == torch.float32
    # Two stages: with three, the registers of a thread run out.
    return {"BLOCK": 32 if small else 64, "num_warps": 2 if small else 4, "num_stages": 2}


def _extent(query: Tensor, crossed: bool) -> tuple[int, int, int, int]:
    """Images, lines, tokens of a line, and heads."""
    B, M, L, n, _ = query.shape
    return (B, L, M, n) if crossed else (B, M, L, n)


def _strides(tokens: Tensor, crossed: bool) -> tuple[int, int, int, int]:
    """From image to image, line to line, token to token and head to head."""
    image, line, token, head, _ = tokens.stride()
    return (image, token, line, head) if crossed else (image, line, token, head)


def _sizes(tokens: Tokens, geometry: Geometry, crossed: bool) -> tuple[float, ...]:
    _, *extent = _extent(tokens.query, crossed)
    scale = tokens.query.shape[4] ** -0.5
    of_tokens = (*_strides(tokens.query, crossed), *_strides(tokens.value, crossed))
    line, token = geometry.sine.stride()[:2]
    image, depth_line, depth_token = geometry.depth.stride()
    if crossed:
        line, token, depth_line, depth_token = token, line, depth_token, depth_line
    return (scale, *extent, *of_tokens, line, token, image, depth_line, depth_token)


def _constants(tokens: Tokens, geometry: Geometry) -> dict[str, Any]:
    c, d = tokens.query.shape[4], tokens.value.shape[4]
    return {
        "C": c,
        "D": d,
        # The matrix units take no less than 16.
        "WIDTH": max(16, triton.next_power_of_2(c)),
        "VALUES": max(16, triton.next_power_of_2(d)),
        "PLANE": geometry.position.shape[1] == 2,
        "TF32": torch.backends.cuda.matmul.allow_tf32,
    }
