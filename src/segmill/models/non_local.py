"""What the non-local families share: attention over a whole map, and its place in a head.

Paper:   Wang et al., "Non-local Neural Networks", CVPR 2018, https://arxiv.org/abs/1711.07971
Follows: mmcv 2.x `NonLocal2d` and MMSegmentation 1.2.2 `SelfAttentionBlock`.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import ConvBNAct


def map_attention(
    query: Float[Tensor, "B E h w"],
    key: Float[Tensor, "B E k l"],
    value: Float[Tensor, "B D k l"],
    *,
    scale: float,
) -> Float[Tensor, "B D h w"]:
    """Every position of `query` averages `value` with the softmax of `scale` x its products."""
    # One head, and channels last in memory: what the fused kernels take.
    query_tokens, key_tokens, value_tokens = (
        feature.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
        for feature in (query, key, value)
    )
    tokens = F.scaled_dot_product_attention(query_tokens, key_tokens, value_tokens, scale=scale)
    return tokens.squeeze(1).transpose(1, 2).unflatten(2, query.shape[-2:])


def projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 1 x 1 convolution with a bias, named `conv`; it starts close to zero."""
    conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # a Conv2d has a bias unless told otherwise
    return nn.Sequential(OrderedDict(conv=conv))


def residual_projection(in_channels: int, out_channels: int) -> ConvBNAct:
    """A 1 x 1 convolution and its norm for a residual branch that starts as exactly zero."""
    block = ConvBNAct(in_channels, out_channels, kernel=1, activation=None)
    nn.init.zeros_(block.bn.weight)
    return block


def convolutions_around_a_block(width: int, channels: int) -> tuple[nn.Sequential, ConvBNAct]:
    """`convs`, the two convolutions, and `conv_cat`, for `hidden_around`."""
    convs = nn.Sequential(
        ConvBNAct(width, channels, kernel=3), ConvBNAct(channels, channels, kernel=3)
    )
    return convs, ConvBNAct(width + channels, channels, kernel=3)


def hidden_around(
    block: nn.Module,
    convs: nn.Sequential,
    conv_cat: nn.Module,
    feature: Float[Tensor, "B D h w"],
) -> Float[Tensor, "B E h w"]:
    """FCN's chain with `block` between its convolutions; `conv_cat` sees the input beside it."""
    before, after = convs
    return conv_cat(torch.cat([feature, after(block(before(feature)))], dim=1))
