"""Attention whose scores fall with the distance of two tokens, in the image and in depth.

On CUDA by Triton kernels that compute the bias as they need it; elsewhere it is a matrix.

Paper:   Yin et al., "DFormerv2: Geometry Self-Attention for RGBD Semantic Segmentation", CVPR 2025,
         https://arxiv.org/abs/2504.04701
Follows: the official `GeoPriorGen` and its two attention forms: a row, a column and the whole map
         are one call each.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attention_along_lines(
    query: Float[Tensor, "B M L n c"],
    key: Float[Tensor, "B M L n c"],
    value: Float[Tensor, "B M L n d"],
    depth: Float[Tensor, "B M L"],
    weight: Float[Tensor, " 2"],
    decay: Float[Tensor, " n"],
    *,
    position: Float[Tensor, "L P"],
    across: Float[Tensor, "M P"] | None,
    sine: Float[Tensor, "M L pairs"],
    cosine: Float[Tensor, "M L pairs"],
) -> Float[Tensor, "B M L n d"]:
    """`geometry_attention` in each of M lines; if `across` is given, then also across them.

    That second pass sees the lines' first tokens as a line, and so on, at the positions `across`;
    its values are what the first pass found. Queries and keys are turned before: each pair of
    channels (0 and 1, 2 and 3, ...) in its plane.
    """
    real = (torch.float32, torch.bfloat16, torch.float16)
    if query.is_cuda and query.dtype in real and not depth.requires_grad:
        # Imported here: triton is absent from CPU builds of torch.
        from segmill.ops.triton_geometry_attention import GeometryAttentionCuda

        return GeometryAttentionCuda.apply(
            query, key, value, depth, weight, decay, position, across, sine, cosine
        )
    query, key = _turned(query, sine, cosine), _turned(key, sine, cosine)
    found = _plain(query, key, value, depth, weight, decay, position)
    if across is None:
        return found
    query, key, found = (each.transpose(1, 2) for each in (query, key, found))
    return _plain(query, key, found, depth.mT, weight, decay, across).transpose(1, 2)


def geometry_attention(
    query: Float[Tensor, "N n L c"],
    key: Float[Tensor, "N n L c"],
    value: Float[Tensor, "N n L d"],
    position: Float[Tensor, "L 2"] | Float[Tensor, " L"],
    depth: Float[Tensor, "N L"],
    weight: Float[Tensor, " 2"],
    decay: Float[Tensor, " n"],
) -> Float[Tensor, "N n L d"]:
    """softmax(query key^T / sqrt(c) + bias) value, on any device with the bias in memory.

    bias[N, n, i, j] = decay[n] (weight[0] |p_i - p_j| + weight[1] |d_i - d_j|), p the positions, d
    the depth of N, with Manhattan distances; in the dtype of `depth`, however narrow `query`.
    """
    bias = geometry_bias(position, depth, weight, decay).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def geometry_bias(
    position: Float[Tensor, "L 2"] | Float[Tensor, " L"],
    depth: Float[Tensor, "N L"],
    weight: Float[Tensor, " 2"],
    decay: Float[Tensor, " n"],
) -> Float[Tensor, "N n L L"]:
    """What `geometry_attention` adds to the scores; the heads differ by their factor alone."""
    points = position if position.ndim == 2 else position[:, None]
    apart = (points[:, None] - points[None]).abs().sum(dim=-1)
    deeper = (depth[:, :, None] - depth[:, None, :]).abs()
    distance = weight[0] * apart + weight[1] * deeper
    return decay[:, None, None] * distance[:, None]


def _plain(
    query: Float[Tensor, "B M L n c"],
    key: Float[Tensor, "B M L n c"],
    value: Float[Tensor, "B M L n d"],
    depth: Float[Tensor, "B M L"],
    weight: Float[Tensor, " 2"],
    decay: Float[Tensor, " n"],
    position: Float[Tensor, "L P"],
) -> Float[Tensor, "B M L n d"]:
    query, key, value = (each.flatten(0, 1).transpose(1, 2) for each in (query, key, value))
    # One coordinate without its axis: `geometry_bias` takes points of the plane, or numbers.
    places = position if position.shape[1] == 2 else position[:, 0]
    found = geometry_attention(query, key, value, places, depth.flatten(0, 1), weight, decay)
    return found.transpose(1, 2).unflatten(0, depth.shape[:2])


def _turned(
    tokens: Float[Tensor, "B M L n c"],
    sine: Float[Tensor, "M L pairs"],
    cosine: Float[Tensor, "M L pairs"],
) -> Float[Tensor, "B M L n c"]:
    sine, cosine = sine.unsqueeze(2).to(tokens.dtype), cosine.unsqueeze(2).to(tokens.dtype)
    first, second = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.stack(pairs, dim=-1).flatten(-2)
