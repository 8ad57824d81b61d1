"""Attention whose scores fall with the distance of two tokens, in the image and in depth.

Paper:   Yin et al., "DFormerv2: Geometry Self-Attention for RGBD Semantic Segmentation", CVPR 2025,
         https://arxiv.org/abs/2504.04701
Follows: the official `GeoPriorGen` and its two attention forms: a row, a column and the whole map
         are one call each.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def geometry_attention(
    query: Float[Tensor, "N n L c"],
    key: Float[Tensor, "N n L c"],
    value: Float[Tensor, "N n L d"],
    position: Float[Tensor, "L 2"] | Float[Tensor, " L"],
    depth: Float[Tensor, "N L"],
    weight: Float[Tensor, " 2"],
    decay: Float[Tensor, " n"],
) -> Float[Tensor, "N n L d"]:
    """softmax(query key^T / sqrt(c) + bias) value.

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
