"""Vision Transformer (ViT, DeiT): one sequence of patches, attention among all of them.

Paper:   Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at
         Scale", ICLR 2021, https://arxiv.org/abs/2010.11929; Touvron et al., "Training
         data-efficient image transformers & distillation through attention", ICML 2021,
         https://arxiv.org/abs/2012.12877
Follows: MMSegmentation 1.2.2 `VisionTransformer`: drop path on the feed-forward branch alone, and
         no bias in the patches unless asked for. One deviation: a grid of another shape but the
         same number of tokens (16 x 64 for 32 x 32) gets an interpolated position embedding too.
Weights: MMSegmentation's by name; those published in 2021 and 2022 have a bias in the patches and
         need `patch_bias`. timm's names, bare (its own files) and as `backbone.blocks.*`
         (MMSegmentation until June 2021), by `_keys_from_timm`; MMPretrain's and MMClassification's
         by `_keys_from_mmpretrain`. A position embedding of another size is interpolated.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.checkpoint.keys import Drop, Rename, Rule
from segmill.models.backbones.swin import FeedForward
from segmill.models.layers import DropPath

InterpolateMode = Literal["bilinear", "bicubic"]
Tokens = Float[Tensor, "B N D"]


class VisionTransformer(nn.Module):
    """One map at the patches' stride for every block in `out_indices`.

    `image_size` (height, width) is the one that the position embedding is stored for.
    `with_cls_token`: the blocks see the class token; the maps never hold it. `output_cls_token`:
    the class tokens follow the maps, each as a map of 1 x 1. `final_norm` normalises what the last
    block returns, no other. `name` is timm's name of the weights that fit, for `weights=timm`.
    """

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        image_size: Sequence[int],
        patch_size: int,
        channels: int,
        depth: int,
        num_heads: int,
        mlp_ratio: int,
        out_indices: Sequence[int],
        drop_path_rate: float,
        norm_eps: float,
        with_cls_token: bool,
        output_cls_token: bool,
        patch_bias: bool,
        patch_norm: bool,
        final_norm: bool,
        interpolate_mode: InterpolateMode,
    ) -> None:
        super().__init__()
        self.name, self.in_channels = name, in_channels
        self.out_indices = tuple(out_indices)
        self.channels = (channels,) * (len(out_indices) * (1 + output_cls_token))
        self.strides = (patch_size,) * len(out_indices)
        self.with_cls_token, self.output_cls_token = with_cls_token, output_cls_token
        self.interpolate_mode: InterpolateMode = interpolate_mode
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.patch_embed = PatchEmbed(
            in_channels,
            channels,
            size=patch_size,
            bias=patch_bias,
            norm_eps=norm_eps if patch_norm else None,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), channels))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.layers = nn.ModuleList(
            Block(
                channels,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                drop_path_rate=rate,
                norm_eps=norm_eps,
            )
            for rate in rates
        )
        self.ln1 = nn.LayerNorm(channels, eps=norm_eps) if final_norm else None
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B D _h _w"]]:
        patches, grid = self.patch_embed(image)
        class_token = self.cls_token.expand(len(patches), -1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + self._positions(grid)
        if not self.with_cls_token:
            tokens = tokens[:, 1:]
        maps, class_tokens = [], []
        for index, layer in enumerate(self.layers):
            tokens = layer(tokens)
            if self.ln1 is not None and index == len(self.layers) - 1:
                tokens = self.ln1(tokens)
            if index in self.out_indices:
                patches = tokens[:, 1:] if self.with_cls_token else tokens
                maps.append(patches.transpose(1, 2).unflatten(2, grid).contiguous())
                class_tokens.append(tokens[:, 0, :, None, None])
        return [*maps, *class_tokens] if self.output_cls_token else maps

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from MMSegmentation's files, MMPretrain's and timm's."""
        return {
            "mmseg": (Rename(r"backbone\.pos_embed", "backbone.pos_embed", self._stored_grid),),
            "mmpretrain": self._keys_from_mmpretrain(),
            "timm": self._keys_from_timm(),
        }

    def _keys_from_mmpretrain(self) -> tuple[Rule, ...]:
        block, ours = r"backbone\.layers\.(\d+)\.attn\.", r"backbone.layers.\1.attn.attn."
        return (
            Drop(r"head\..+"),
            Rename(r"backbone\.pos_embed", "backbone.pos_embed", self._stored_grid),
            Rename(block + r"qkv\.(.+)", ours + r"in_proj_\2"),
            Rename(block + r"proj\.(.+)", ours + r"out_proj.\2"),
        )

    def _keys_from_timm(self) -> tuple[Rule, ...]:
        block, ours = r"(?:backbone\.)?blocks\.(\d+)\.", r"backbone.layers.\1."
        return (
            Drop(r"(?:head|head_dist|fc_norm|pre_logits)\..+|dist_token"),
            Rename(r"(?:backbone\.)?norm\.(.+)", r"backbone.ln1.\1"),
            Rename(r"(?:backbone\.)?cls_token", "backbone.cls_token"),
            Rename(r"(?:backbone\.)?pos_embed", "backbone.pos_embed", self._stored_grid),
            Rename(
                r"(?:backbone\.)?patch_embed\.proj\.(.+)", r"backbone.patch_embed.projection.\1"
            ),
            Rename(block + r"norm([12])\.(.+)", ours + r"ln\2.\3"),
            Rename(block + r"attn\.qkv\.(.+)", ours + r"attn.attn.in_proj_\2"),
            Rename(block + r"attn\.proj\.(.+)", ours + r"attn.attn.out_proj.\2"),
            Rename(block + r"mlp\.fc1\.(.+)", ours + r"ffn.layers.0.0.\2"),
            Rename(block + r"mlp\.fc2\.(.+)", ours + r"ffn.layers.1.\2"),
        )

    def _positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 N D"]:
        if grid == self.grid:
            return self.pos_embed
        patches = _resized(self.pos_embed[:, 1:], self.grid, grid, self.interpolate_mode)
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    def _stored_grid(self, array: np.ndarray) -> np.ndarray:
        """A file's position embedding, made for a square image, at the size of this network's.

        Between the class token and the patches DeiT's distilled models have one token more.
        """
        if array.ndim != 3 or array.shape[1] == self.pos_embed.shape[1]:
            return array
        side = math.isqrt(array.shape[1] - 1)
        stored = torch.from_numpy(np.array(array, np.float32))
        patches = _resized(stored[:, -(side**2) :], (side, side), self.grid, self.interpolate_mode)
        return torch.cat([stored[:, :1], patches], dim=1).numpy()


class PatchEmbed(nn.Module):
    """Squares of pixels become tokens; the image is zero padded on the right and at the bottom."""

    def __init__(
        self, in_channels: int, channels: int, *, size: int, bias: bool, norm_eps: float | None
    ) -> None:
        super().__init__()
        self.size = size
        self.projection = nn.Conv2d(in_channels, channels, size, stride=size, bias=bias)
        self.norm = None if norm_eps is None else nn.LayerNorm(channels, eps=norm_eps)

    def forward(self, image: Float[Tensor, "B C H W"]) -> tuple[Tokens, tuple[int, int]]:
        height, width = image.shape[-2:]
        padded = F.pad(image, (0, -width % self.size, 0, -height % self.size))
        feature = self.projection(padded)
        tokens = feature.flatten(2).transpose(1, 2)
        rows, columns = feature.shape[-2:]
        return tokens if self.norm is None else self.norm(tokens), (rows, columns)


class Block(nn.Module):
    """Pre-norm attention and a two-layer perceptron, both residual; MMSegmentation's names.

    Only the perceptron is dropped by `drop_path_rate`, as in MMSegmentation 1.2.2.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        mlp_ratio: int,
        drop_path_rate: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(channels, eps=norm_eps)
        self.attn = nn.ModuleDict({"attn": SelfAttention(channels, num_heads=num_heads)})
        self.ln2 = nn.LayerNorm(channels, eps=norm_eps)
        self.ffn = FeedForward(channels, mlp_ratio * channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens: Tokens) -> Tokens:
        tokens = tokens + self.attn["attn"](self.ln1(tokens))
        return tokens + self.drop_path(self.ffn(self.ln2(tokens)))


class SelfAttention(nn.Module):
    """Every token attends to every token; the parameters of nn.MultiheadAttention."""

    def __init__(self, channels: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, tokens: Tokens) -> Tokens:
        qkv = F.linear(tokens, self.in_proj_weight, self.in_proj_bias)
        heads = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def _resized(
    positions: Float[Tensor, "1 N D"],
    old: tuple[int, int],
    new: tuple[int, int],
    mode: InterpolateMode,
) -> Float[Tensor, "1 M D"]:
    feature = positions.transpose(1, 2).unflatten(2, old)
    resized = F.interpolate(feature, new, mode=mode, align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def _initialise(module: nn.Module) -> None:
    # FeedForward is visited after the linear maps in it.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, FeedForward):
        for name, bias in module.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(bias, std=1e-6)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
