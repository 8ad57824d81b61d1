"""Mix Transformer (MiT), SegFormer's trunk: overlapping patches, attention to shrunk maps, Mix-FFN.

Paper:   Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with
         Transformers", NeurIPS 2021, https://arxiv.org/abs/2105.15203
Follows: MMSegmentation 1.2.2 `MixVisionTransformer`, whose LayerNorms all have eps 1e-6; those of
         transformers' SegFormer have 1e-5.
Weights: MMSegmentation's load by name (mit_b*.pth, which lack the prefix, by KEYS_FROM_MMSEG),
         transformers' SegFormer encoders by KEYS_FROM_HF, the authors' mit_b*.pth by
         KEYS_FROM_NVIDIA.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.checkpoint.keys import Concat, Drop, Rename, Rule
from segmill.models.layers import DropPath, initialise_trunk

KEYS_FROM_MMSEG: tuple[Rule, ...] = (Rename(r"(layers\.\d\..+)", r"backbone.\1"),)


def as_kernel(array: np.ndarray) -> np.ndarray:
    """A matrix as a 1 x 1 convolution; a bias stays."""
    return array[:, :, None, None] if array.ndim == 2 else array


# transformers 5 renamed its modules but not its files: both spellings, the file's first.
PATCHES = r"segformer\.(?:encoder\.patch_embeddings\.(\d)|stages\.(\d)\.patch_embeddings)\."
NORM = r"segformer\.(?:encoder\.layer_norm\.(\d)|stages\.(\d)\.layer_norm)\."
BLOCK = r"segformer\.(?:encoder\.block\.(\d)|stages\.(\d)\.blocks)\.(\d+)\."
OURS = r"backbone.layers.\1\2.1.\3."
KEYS_FROM_HF: tuple[Rule, ...] = (
    Drop(r"classifier\..+"),  # of the encoders trained on ImageNet
    Rename(PATCHES + r"proj\.(.+)", r"backbone.layers.\1\2.0.projection.\3"),
    Rename(PATCHES + r"layer_norm\.(.+)", r"backbone.layers.\1\2.0.norm.\3"),
    Rename(NORM + r"(.+)", r"backbone.layers.\1\2.2.\3"),
    Rename(BLOCK + r"(?:layer_norm_1|layernorm_before)\.(.+)", OURS + r"norm1.\4"),
    Rename(BLOCK + r"(?:layer_norm_2|layernorm_after)\.(.+)", OURS + r"norm2.\4"),
    *(
        Concat(
            BLOCK + rf"attention\.(?:self\.{name}|{name[0]}_proj)\.(.+)",
            OURS + r"attn.attn.in_proj_\4",
            index=index,
            parts=3,
        )
        for index, name in enumerate(("query", "key", "value"))
    ),
    Rename(BLOCK + r"attention\.(?:output\.dense|o_proj)\.(.+)", OURS + r"attn.attn.out_proj.\4"),
    Rename(
        BLOCK + r"attention\.(?:self\.sr|sequence_reduction\.sequence_reduction)\.(.+)",
        OURS + r"attn.sr.\4",
    ),
    Rename(
        BLOCK + r"attention\.(?:self|sequence_reduction)\.layer_norm\.(.+)", OURS + r"attn.norm.\4"
    ),
    Rename(BLOCK + r"mlp\.(?:dense|fc)1\.(.+)", OURS + r"ffn.layers.0.\4", as_kernel),
    Rename(BLOCK + r"mlp\.dwconv\.dwconv\.(.+)", OURS + r"ffn.layers.1.\4"),
    Rename(BLOCK + r"mlp\.(?:dense|fc)2\.(.+)", OURS + r"ffn.layers.4.\4", as_kernel),
)


def _keys_from_nvidia(stage: int) -> tuple[Rule, ...]:
    """The authors count stages from 1 and keep patches, blocks and norms in lists of their own."""
    block, ours = rf"(?:backbone\.)?block{stage}\.(\d+)\.", rf"backbone.layers.{stage - 1}.1.\1."
    embed = rf"(?:backbone\.)?patch_embed{stage}\."
    return (
        Rename(embed + r"proj\.(.+)", rf"backbone.layers.{stage - 1}.0.projection.\1"),
        Rename(embed + r"norm\.(.+)", rf"backbone.layers.{stage - 1}.0.norm.\1"),
        Rename(rf"(?:backbone\.)?norm{stage}\.(.+)", rf"backbone.layers.{stage - 1}.2.\1"),
        Concat(block + r"attn\.q\.(.+)", ours + r"attn.attn.in_proj_\2", index=0, parts=2),
        Concat(block + r"attn\.kv\.(.+)", ours + r"attn.attn.in_proj_\2", index=1, parts=2),
        Rename(block + r"attn\.proj\.(.+)", ours + r"attn.attn.out_proj.\2"),
        Rename(block + r"mlp\.fc1\.(.+)", ours + r"ffn.layers.0.\2", as_kernel),
        Rename(block + r"mlp\.dwconv\.dwconv\.(.+)", ours + r"ffn.layers.1.\2"),
        Rename(block + r"mlp\.fc2\.(.+)", ours + r"ffn.layers.4.\2", as_kernel),
        Rename(block + r"(attn\.sr|attn\.norm|norm1|norm2)\.(.+)", ours + r"\2.\3"),
    )


KEYS_FROM_NVIDIA: tuple[Rule, ...] = (
    Drop(r"head\..+"),  # of the encoders trained on ImageNet
    *(rule for stage in (1, 2, 3, 4) for rule in _keys_from_nvidia(stage)),
)

Tokens = Float[Tensor, "B N D"]


class MixVisionTransformer(nn.Module):
    """Four stages at strides 4, 8, 16, 32; each ends with a LayerNorm.

    `reductions` is the stride at which a stage's attention sees its keys and values.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        reductions: Sequence[int],
        mlp_ratio: int,
        drop_path_rate: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.strides = tuple(4 * 2**level for level in range(len(depths)))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        inputs = (in_channels, *channels[:-1])
        self.layers = nn.ModuleList()
        for level, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            blocks = [
                Block(
                    width,
                    num_heads=num_heads[level],
                    reduction=reductions[level],
                    mlp_ratio=mlp_ratio,
                    drop_path_rate=next(rates),
                    norm_eps=norm_eps,
                )
                for _ in range(depth)
            ]
            kernel, stride = (7, 4) if level == 0 else (3, 2)
            embed = PatchEmbed(inputs[level], width, kernel, stride=stride, norm_eps=norm_eps)
            # A list of (patches, blocks, norm), as MMSegmentation numbers them.
            norm = nn.LayerNorm(width, eps=norm_eps)
            self.layers.append(nn.ModuleList([embed, nn.ModuleList(blocks), norm]))
        self.apply(initialise_trunk)

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        features, feature = [], image
        for embed, blocks, norm in self.layers:  # pyright: ignore[reportGeneralTypeIssues] - lists
            tokens, size = embed(feature)
            for block in blocks:
                tokens = block(tokens, size)
            feature = to_map(norm(tokens), size)
            features.append(feature)
        return features

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from MMSegmentation's files, transformers' and the authors'."""
        return {"mmseg": KEYS_FROM_MMSEG, "hf": KEYS_FROM_HF, "nvidia": KEYS_FROM_NVIDIA}


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution, then LayerNorm."""

    def __init__(
        self, in_channels: int, width: int, kernel: int, *, stride: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, width, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, feature: Float[Tensor, "B C H W"]) -> tuple[Tokens, tuple[int, int]]:
        feature = self.projection(feature)
        height, width = feature.shape[-2:]
        return self.norm(to_tokens(feature)), (height, width)


class Block(nn.Module):
    """Pre-norm attention and Mix-FFN, each with a residual."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        reduction: int,
        mlp_ratio: int,
        drop_path_rate: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = EfficientAttention(
            width, num_heads=num_heads, reduction=reduction, norm_eps=norm_eps
        )
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.ffn = MixFFN(width, mlp_ratio * width)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens: Tokens, size: tuple[int, int]) -> Tokens:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), size))
        return tokens + self.drop_path(self.ffn(self.norm2(tokens), size))


class EfficientAttention(nn.Module):
    """Every token attends to the map shrunk by `reduction` with a convolution of that stride."""

    def __init__(self, width: int, *, num_heads: int, reduction: int, norm_eps: float) -> None:
        super().__init__()
        self.reduction = reduction
        self.attn = Attention(width, num_heads=num_heads)
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, reduction)
            self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, tokens: Tokens, size: tuple[int, int]) -> Tokens:
        if self.reduction == 1:
            return self.attn(tokens, tokens)
        shrunk = self.norm(to_tokens(self.sr(to_map(tokens, size))))
        return self.attn(tokens, shrunk)


class Attention(nn.Module):
    """Multi-head attention; one matrix makes query, key and value, as in nn.MultiheadAttention."""

    def __init__(self, width: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, tokens: Tokens, context: Float[Tensor, "B M D"]) -> Tokens:
        width = tokens.shape[-1]
        q = F.linear(tokens, self.in_proj_weight[:width], self.in_proj_bias[:width])
        kv = F.linear(context, self.in_proj_weight[width:], self.in_proj_bias[width:])
        k, v = (self._split(part) for part in kv.chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(self._split(q), k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, tokens: Float[Tensor, "B M D"]) -> Float[Tensor, "B heads M d"]:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MixFFN(nn.Module):
    """Two linear maps, and between them a depthwise 3 x 3 convolution that knows positions.

    The linear maps are 1 x 1 convolutions by name and shape only.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "0": nn.Conv2d(width, hidden, 1),
                "1": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
                "4": nn.Conv2d(hidden, width, 1),
            }
        )

    def forward(self, tokens: Tokens, size: tuple[int, int]) -> Tokens:
        widen, depthwise, narrow = self.layers.values()
        hidden = to_map(_linear(widen, tokens), size)
        return _linear(narrow, F.gelu(to_tokens(depthwise(hidden))))


def to_map(tokens: Tokens, size: tuple[int, int]) -> Float[Tensor, "B D h w"]:
    """A view: what is a matrix of tokens is a feature map in channels_last order."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def to_tokens(feature: Float[Tensor, "B D h w"]) -> Tokens:
    """The inverse of `to_map`; a view where the map is in channels_last order."""
    return feature.flatten(2).transpose(1, 2)


def _linear(conv: nn.Module, tokens: Tokens) -> Float[Tensor, "B N _E"]:
    assert isinstance(conv, nn.Conv2d)
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)
