"""Swin Transformer: attention inside windows that shift by half from block to block.

Paper:   Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
         ICCV 2021, https://arxiv.org/abs/2103.14030
Follows: MMSegmentation 1.2.2 `SwinTransformer`: every map is padded to whole windows, windows never
         shrink, a LayerNorm on each output. timm's Swin does neither, so this trunk is our own.
Weights: MMSegmentation's load by name; timm's through `KEYS_FROM_TIMM`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from segmill.checkpoint.keys import Drop, Rename, Rule
from segmill.models.layers import DropPath

KEYS_FROM_MMSEG: tuple[Rule, ...] = (Drop(r"backbone\..+\.relative_position_index"),)


def unfold_order(array: np.ndarray) -> np.ndarray:
    """timm merges patches as (column, row, channel), `nn.Unfold` as (channel, row, column)."""
    lead, merged = array.shape[:-1], array.shape[-1]
    parts = array.reshape(*lead, 2, 2, merged // 4)
    return np.ascontiguousarray(np.swapaxes(parts, -1, -3).reshape(*lead, merged))


BLOCK, OURS = r"layers\.(\d)\.blocks\.(\d+)\.", r"backbone.stages.\1.blocks.\2."
MERGE = r"downsample\.(norm\.weight|norm\.bias|reduction\.weight)"
KEYS_FROM_TIMM: tuple[Rule, ...] = (
    Drop(r".+\.(relative_position_index|attn_mask)|(norm|head)\..+"),
    Rename(r"patch_embed\.proj\.(.+)", r"backbone.patch_embed.projection.\1"),
    Rename(r"patch_embed\.norm\.(.+)", r"backbone.patch_embed.norm.\1"),
    # timm merges at the start of a stage, MMSegmentation at the end of the one before.
    *(
        Rename(
            rf"layers\.{stage + 1}\.{MERGE}",
            rf"backbone.stages.{stage}.downsample.\1",
            transform=unfold_order,
        )
        for stage in range(3)
    ),
    Rename(BLOCK + r"attn\.(.+)", OURS + r"attn.w_msa.\3"),
    Rename(BLOCK + r"mlp\.fc1\.(.+)", OURS + r"ffn.layers.0.0.\3"),
    Rename(BLOCK + r"mlp\.fc2\.(.+)", OURS + r"ffn.layers.1.\3"),
    Rename(BLOCK + r"(norm[12])\.(.+)", OURS + r"\3.\4"),
)


class SwinTransformer(nn.Module):
    """Four stages at strides 4, 8, 16, 32; each output is normalised.

    `name` is timm's name of the pretrained weights that fit, for `weights=timm`.
    """

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window: int,
        mlp_ratio: int,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.name, self.in_channels = name, in_channels
        self.channels = tuple(embed_dim * 2**level for level in range(len(depths)))
        self.strides = tuple(4 * 2**level for level in range(len(depths)))
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch=4)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            Stage(
                [
                    SwinBlock(width, heads=heads, window=window, mlp_ratio=mlp_ratio, rate=rate)
                    for _, rate in zip(range(depth), rates, strict=False)
                ],
                PatchMerging(width) if width < self.channels[-1] else None,
                window=window,
            )
            for width, depth, heads in zip(self.channels, depths, num_heads, strict=True)
        )
        for level, width in enumerate(self.channels):
            self.add_module(f"norm{level}", nn.LayerNorm(width))
        self.apply(_initialise)

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        tokens, outputs = self.patch_embed(image), []
        for level, stage in enumerate(self.stages):
            feature, tokens = stage(tokens)
            normed = self.get_submodule(f"norm{level}")(feature)
            outputs.append(normed.permute(0, 3, 1, 2).contiguous())
        return outputs

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from MMSegmentation's files and from timm's."""
        return {"mmseg": KEYS_FROM_MMSEG, "timm": KEYS_FROM_TIMM}


class PatchEmbed(nn.Module):
    """A square of pixels becomes one token; zeros on the right and at the bottom make it whole."""

    def __init__(self, in_channels: int, width: int, *, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.projection = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        height, width = image.shape[-2:]
        padded = F.pad(image, (0, -width % self.patch, 0, -height % self.patch))
        return self.norm(self.projection(padded).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """2 x 2 tokens become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, tokens: Float[Tensor, "B h w D"]) -> Float[Tensor, "B _h _w E"]:
        height, width = tokens.shape[1:3]
        tokens = F.pad(tokens, (0, 0, 0, width % 2, 0, height % 2))
        batch, height, width, channels = tokens.shape
        blocks = tokens.reshape(batch, height // 2, 2, width // 2, 2, channels)
        # Channel, row, column: the order in which the weights expect the block.
        merged = blocks.permute(0, 1, 3, 5, 2, 4).flatten(3)
        return self.reduction(self.norm(merged))


class Stage(nn.Module):
    """Blocks at one resolution; returns their output and what the next stage starts from."""

    def __init__(
        self, blocks: Sequence["SwinBlock"], downsample: PatchMerging | None, *, window: int
    ) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(
        self, tokens: Float[Tensor, "B h w D"]
    ) -> tuple[Float[Tensor, "B h w D"], Float[Tensor, "B _h _w _D"]]:
        tokens = self.attended(tokens)
        return tokens, tokens if self.downsample is None else self.downsample(tokens)

    def attended(self, tokens: Float[Tensor, "B h w D"]) -> Float[Tensor, "B h w D"]:
        """The blocks alone."""
        same = same_region(tokens.shape[1], tokens.shape[2], self.window, tokens.device)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, same if index % 2 else None)
        return tokens


class SwinBlock(nn.Module):
    """Window attention and a two-layer perceptron, both residual."""

    def __init__(self, width: int, *, heads: int, window: int, mlp_ratio: int, rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        attention = WindowAttention(width, heads=heads, window=window)
        self.attn = nn.ModuleDict({"w_msa": attention})
        self.norm2 = nn.LayerNorm(width)
        self.ffn = FeedForward(width, mlp_ratio * width)
        self.drop_path = DropPath(rate)

    def forward(
        self, tokens: Float[Tensor, "B h w D"], same: Bool[Tensor, "N T T"] | None
    ) -> Float[Tensor, "B h w D"]:
        tokens = tokens + self.drop_path(self.attn["w_msa"](self.norm1(tokens), same))
        return tokens + self.drop_path(self.ffn(self.norm2(tokens)))


class FeedForward(nn.Module):
    """Linear, GELU, linear; nested as the weights are named."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(width, hidden), nn.GELU())
        self.layers = nn.Sequential(first, nn.Linear(hidden, width))

    def forward(self, tokens: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.layers(tokens)


class WindowAttention(nn.Module):
    """Attention among the T tokens of each of N windows, biased by relative position.

    With `same` (tokens that were neighbours before the shift) the windows are shifted by half.
    """

    def __init__(self, width: int, *, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        table = torch.zeros((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(table)
        index = relative_position_index(window)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, tokens: Float[Tensor, "B h w D"], same: Bool[Tensor, "N T T"] | None
    ) -> Float[Tensor, "B h w D"]:
        height, width = tokens.shape[1:3]
        shift = 0 if same is None else self.window // 2
        padded = F.pad(tokens, (0, 0, 0, -width % self.window, 0, -height % self.window))
        shifted = padded.roll((-shift, -shift), dims=(1, 2)) if shift else padded
        windows = split_windows(shifted, self.window)
        attended = self.proj(self._attend(windows, same))
        merged = join_windows(attended, self.window, *shifted.shape[1:3])
        restored = merged.roll((shift, shift), dims=(1, 2)) if shift else merged
        return restored[:, :height, :width]

    def _attend(
        self, windows: Float[Tensor, "B N T D"], same: Bool[Tensor, "N T T"] | None
    ) -> Float[Tensor, "B N T D"]:
        batch, count, area, width = windows.shape
        qkv = self.qkv(windows).reshape(batch, count, area, 3, self.heads, width // self.heads)
        # Windows and heads share one axis, so that one bias serves every image of the batch.
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        bias = self._bias().expand(count, -1, -1, -1)
        if same is not None:
            # MMSegmentation's -100 and not minus infinity.
            bias = bias + torch.where(same, 0.0, -100.0)[:, None]
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.flatten(0, 1)[None].to(query.dtype)
        )
        heads_last = attended.reshape(batch, count, self.heads, area, -1).transpose(2, 3)
        return heads_last.flatten(3)

    def _bias(self) -> Float[Tensor, "1 heads T T"]:
        area = self.window**2
        table: Tensor = self.relative_position_bias_table
        bias = table[self.get_buffer("relative_position_index").flatten()]
        return bias.reshape(1, area, area, self.heads).permute(0, 3, 1, 2)


def relative_position_index(window: int) -> Int[Tensor, "T T"]:
    """Row of the bias table for each pair of tokens: (row distance, column distance), row major."""
    axis = torch.arange(window)
    rows, columns = axis.repeat_interleave(window), axis.repeat(window)
    down = rows[:, None] - rows[None] + window - 1
    right = columns[:, None] - columns[None] + window - 1
    return down * (2 * window - 1) + right


def same_region(
    height: int, width: int, window: int, device: torch.device
) -> Bool[Tensor, "N T T"]:
    """Whether two tokens of a shifted window were neighbours before the map was rolled."""
    rows, columns = _region(height, window, device), _region(width, window, device)
    region = split_windows((3 * rows[:, None] + columns)[None, :, :, None], window)[0, :, :, 0]
    return region[:, :, None] == region[:, None, :]


def _region(length: int, window: int, device: torch.device) -> Int[Tensor, " L"]:
    """0 before the last window, 1 in its first part, 2 in the part that was rolled in."""
    padded = length + -length % window
    position = torch.arange(padded, device=device)
    return (position >= padded - window).int() + (position >= padded - window // 2).int()


def split_windows(
    tokens: Float[Tensor, "B h w D"] | Int[Tensor, "B h w D"], window: int
) -> Float[Tensor, "B N T D"] | Int[Tensor, "B N T D"]:
    """Whole windows, row by row."""
    batch, height, width, channels = tokens.shape
    grid = tokens.reshape(batch, height // window, window, width // window, window, channels)
    return grid.transpose(2, 3).reshape(batch, -1, window * window, channels)


def join_windows(
    windows: Float[Tensor, "B N T D"], window: int, height: int, width: int
) -> Float[Tensor, "B h w D"]:
    """The inverse of `split_windows`."""
    batch, channels = windows.shape[0], windows.shape[-1]
    grid = windows.reshape(batch, height // window, width // window, window, window, channels)
    return grid.transpose(2, 3).reshape(batch, height, width, channels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention):
        nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
