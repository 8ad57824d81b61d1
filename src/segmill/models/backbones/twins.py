"""Twins, PCPVT and SVT: global attention to shrunk maps, positions from a convolution.

Paper:   Chu et al., "Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
         NeurIPS 2021, https://arxiv.org/abs/2104.13840
Follows: MMSegmentation 1.2.2 `PCPVT` and `SVT`, two surprises included: drop path acts twice on
         most branches, and SVT hides the padding of its windows only where a map is padded along
         both axes. timm's Twins has neither.
Weights: MMSegmentation's load by name, its trunks (pcpvt_*.pth, alt_gvt_*.pth) through
         KEYS_FROM_MMSEG; timm's, named as the authors' own, through `key_rules`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from segmill.checkpoint.keys import Concat, Drop, Rename, Rule
from segmill.models.backbones.mit import EfficientAttention, Tokens, to_map, to_tokens
from segmill.models.backbones.swin import FeedForward, PatchEmbed, join_windows, split_windows
from segmill.models.layers import DropPath, initialise_trunk

# Of the trunks trained on ImageNet.
KEYS_FROM_MMSEG: tuple[Rule, ...] = (Drop(r"backbone\.(?:norm|head)\.\w+"),)

BLOCK, OURS = r"blocks\.(\d)\.(\d+)\.", r"backbone.layers.\1.\2."
LOCAL_BLOCK = r"blocks\.(\d)\.(\d*[02468])\."  # SVT's are the even ones
KEYS_FROM_TIMM: tuple[Rule, ...] = (
    Drop(r"(?:norm|head)\..+"),
    Rename(r"patch_embeds\.(\d)\.proj\.(.+)", r"backbone.patch_embeds.\1.projection.\2"),
    Rename(r"patch_embeds\.(\d)\.norm\.(.+)", r"backbone.patch_embeds.\1.norm.\2"),
    Rename(r"pos_block\.(\d)\.proj\.0\.(.+)", r"backbone.position_encodings.\1.proj.\2"),
    Concat(BLOCK + r"attn\.q\.(.+)", OURS + r"attn.attn.in_proj_\3", index=0, parts=2),
    Concat(BLOCK + r"attn\.kv\.(.+)", OURS + r"attn.attn.in_proj_\3", index=1, parts=2),
    Rename(BLOCK + r"attn\.proj\.(.+)", OURS + r"attn.attn.out_proj.\3"),
    Rename(BLOCK + r"mlp\.fc1\.(.+)", OURS + r"ffn.layers.0.0.\3"),
    Rename(BLOCK + r"mlp\.fc2\.(.+)", OURS + r"ffn.layers.1.\3"),
    Rename(BLOCK + r"(attn\.qkv|attn\.sr|attn\.norm|norm1|norm2)\.(.+)", OURS + r"\3.\4"),
)
LOCAL_FROM_TIMM = Rename(LOCAL_BLOCK + r"attn\.proj\.(.+)", OURS + r"attn.proj.\3")
NORM_EPS = 1e-5


class Twins(nn.Module):
    """Four stages at strides 4, 8, 16, 32.

    `window` is the side of the windows in which every other block of SVT attends, starting with
    the first; SVT also normalises each output. null is PCPVT, which does neither. `reductions` is
    the stride at which a stage's global attention sees its keys and values. `name` is timm's name
    of the pretrained weights that fit, for `weights=timm`.
    """

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        channels: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        reductions: Sequence[int],
        mlp_ratios: Sequence[int],
        window: int | None,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.name, self.in_channels, self.window = name, in_channels, window
        self.channels = tuple(channels)
        self.strides = tuple(4 * 2**level for level in range(len(depths)))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        inputs = (in_channels, *channels[:-1])
        self.patch_embeds, self.layers = nn.ModuleList(), nn.ModuleList()
        for level, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            embed = PatchEmbed(inputs[level], width, patch=2 if level else 4)
            self.patch_embeds.append(embed)
            blocks = [
                Block(
                    width,
                    num_heads=num_heads[level],
                    reduction=reductions[level],
                    window=window if index % 2 == 0 else None,
                    mlp_ratio=mlp_ratios[level],
                    rate=next(rates),
                )
                for index in range(depth)
            ]
            self.layers.append(nn.ModuleList(blocks))
        self.position_encodings = nn.ModuleList(PositionEncoding(width) for width in channels)
        normed = channels if window else ()
        self.norm_list = nn.ModuleList(nn.LayerNorm(width) for width in normed)
        self.apply(initialise_trunk)

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        features, feature = [], image
        for level, embed in enumerate(self.patch_embeds):
            grid = embed(feature)
            size = (grid.shape[1], grid.shape[2])
            tokens = self._stage(level, grid.flatten(1, 2), size)
            feature = to_map(tokens, size)
            features.append(feature)
        return features

    def _stage(self, level: int, tokens: Tokens, size: tuple[int, int]) -> Tokens:
        first, *others = self.layers[level]  # type: ignore[misc]  # a list of blocks
        tokens = self.position_encodings[level](first(tokens, size), size)
        for block in others:
            tokens = block(tokens, size)
        return self.norm_list[level](tokens) if self.norm_list else tokens

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from MMSegmentation's files and from timm's."""
        local = (LOCAL_FROM_TIMM,) if self.window else ()
        return {"mmseg": KEYS_FROM_MMSEG, "timm": (*local, *KEYS_FROM_TIMM)}


class Block(nn.Module):
    """Attention, in windows or of all tokens to the shrunk map, and a perceptron; both residual."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        reduction: int,
        window: int | None,
        mlp_ratio: int,
        rate: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = (
            EfficientAttention(width, num_heads=num_heads, reduction=reduction, norm_eps=NORM_EPS)
            if window is None
            else WindowAttention(width, num_heads=num_heads, window=window)
        )
        self.norm2 = nn.LayerNorm(width)
        self.ffn = FeedForward(width, mlp_ratio * width)
        # The original's perceptron and global attention drop their result, then the block does so
        # again; two draws in a row are one draw.
        twice = 1.0 - (1.0 - rate) ** 2
        self.drop_attention = DropPath(twice if window is None else rate)
        self.drop_ffn = DropPath(twice)

    def forward(self, tokens: Tokens, size: tuple[int, int]) -> Tokens:
        tokens = tokens + self.drop_attention(self.attn(self.norm1(tokens), size))
        return tokens + self.drop_ffn(self.ffn(self.norm2(tokens)))


class WindowAttention(nn.Module):
    """Attention among the tokens of each window; no bias by position, no shift.

    Maps are padded with zeros to whole windows. As in the original, whose mask covers everything
    when one of its two margins is empty, the padding is attended to unless both axes have some.
    """

    def __init__(self, width: int, *, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tokens, size: tuple[int, int]) -> Tokens:
        height, width = size
        right, bottom = -width % self.window, -height % self.window
        padded = F.pad(tokens.unflatten(1, size), (0, 0, 0, right, 0, bottom))
        windows = split_windows(self.qkv(padded), self.window)
        batch, count, area, _ = windows.shape
        # Windows and heads share one axis: attention kernels take four.
        query, key, value = (
            windows.reshape(batch, count, area, 3, self.num_heads, -1)
            .permute(3, 0, 1, 4, 2, 5)
            .flatten(2, 3)
        )
        mask = None
        if right and bottom:
            inside = inside_map(size, self.window, tokens.device)[:, None, None]
            mask = inside.expand(-1, self.num_heads, area, -1).flatten(0, 1)[None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        merged = mixed.unflatten(1, (count, self.num_heads)).transpose(2, 3).flatten(3)
        joined = join_windows(merged, self.window, height + bottom, width + right)
        return self.proj(joined[:, :height, :width].flatten(1, 2))


def inside_map(size: tuple[int, int], window: int, device: torch.device) -> Bool[Tensor, "N T"]:
    """Which tokens of each window are of a map of this size, and not of its padding."""
    height, width = size
    rows = torch.arange(height + -height % window, device=device) < height
    columns = torch.arange(width + -width % window, device=device) < width
    inside = (rows[:, None] & columns).int()
    return split_windows(inside[None, :, :, None], window)[0, :, :, 0].bool()


class PositionEncoding(nn.Module):
    """A depthwise convolution, added: the border's zeros tell where a token is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, tokens: Tokens, size: tuple[int, int]) -> Tokens:
        return tokens + to_tokens(self.proj(to_map(tokens, size)))
