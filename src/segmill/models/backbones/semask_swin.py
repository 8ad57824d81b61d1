"""SeMask on Swin: after each stage, attention by what the tokens seem to show.

Paper:   Jain et al., "SeMask: Semantically Masked Transformers for Semantic Segmentation", 2021,
         https://arxiv.org/abs/2112.12782
Follows: the authors' `SeMaskSwinTransformer`. Theirs chooses windows by width and class count (at
         widths 96 and 192 with more than 19 classes the last two stages attend over the whole
         map); here the YAML says the window of each stage.
Weights: the authors' semask_*_fpn files (`backbone.layers.N.semantic_layer.*`) through
         KEYS_FROM_SEMASK, timm's Swin for all but the semantic layers. No file of the authors
         could be had for a test: their names are read off their code.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.checkpoint.keys import Drop, Rename, Rule
from segmill.models.backbones import swin
from segmill.models.backbones.swin import SwinTransformer, join_windows, split_windows

THEIRS, OURS = r"backbone\.layers\.(\d)\.blocks\.(\d+)\.", r"backbone.trunk.stages.\1.blocks.\2."
KEYS_FROM_SEMASK: tuple[Rule, ...] = (
    Drop(r".+\.(relative_position_index|attn_mask)"),
    Rename(r"backbone\.patch_embed\.proj\.(.+)", r"backbone.trunk.patch_embed.projection.\1"),
    Rename(r"backbone\.(patch_embed\.norm\..+|norm\d\..+)", r"backbone.trunk.\1"),
    Rename(
        rf"backbone\.layers\.(\d)\.{swin.MERGE}",
        r"backbone.trunk.stages.\1.downsample.\2",
        transform=swin.unfold_order,
    ),
    Rename(r"backbone\.layers\.(\d)\.semantic_layer\.(.+)", r"backbone.semantic_layers.\1.\2"),
    Rename(THEIRS + r"attn\.(.+)", OURS + r"attn.w_msa.\3"),
    Rename(THEIRS + r"mlp\.fc1\.(.+)", OURS + r"ffn.layers.0.0.\3"),
    Rename(THEIRS + r"mlp\.fc2\.(.+)", OURS + r"ffn.layers.1.\3"),
    Rename(THEIRS + r"(norm[12])\.(.+)", OURS + r"\3.\4"),
)


def _into_trunk(rule: Rule) -> Rule:
    if not isinstance(rule, Rename):
        return rule
    return replace(rule, replacement=rule.replacement.replace("backbone.", "backbone.trunk.", 1))


KEYS_FROM_TIMM: tuple[Rule, ...] = tuple(_into_trunk(rule) for rule in swin.KEYS_FROM_TIMM)


class SeMaskSwin(nn.Module):
    """Twice as many maps as the trunk has stages: first the features, then the class maps.

    `windows`: of the semantic layer of each stage; null: it attends over the whole map.
    """

    def __init__(
        self, *, trunk: SwinTransformer, windows: Sequence[int | None], num_classes: int
    ) -> None:
        super().__init__()
        self.name, self.in_channels = trunk.name, trunk.in_channels
        self.trunk = trunk
        self.channels = (*trunk.channels, *[num_classes] * len(trunk.channels))
        self.strides = (*trunk.strides, *trunk.strides)
        self.semantic_layers = nn.ModuleList(
            SemanticLayer(width, num_classes, window=window)
            for width, window in zip(trunk.channels, windows, strict=True)
        )

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        tokens, features, class_maps = self.trunk.patch_embed(image), [], []
        for level, stage in enumerate(self.trunk.stages):
            assert isinstance(stage, swin.Stage)
            classes, tokens = self.semantic_layers[level](stage.attended(tokens))
            normed = self.trunk.get_submodule(f"norm{level}")(tokens)
            features.append(normed.permute(0, 3, 1, 2).contiguous())
            class_maps.append(classes.permute(0, 3, 1, 2).contiguous())
            if stage.downsample is not None:
                tokens = stage.downsample(tokens)
        return [*features, *class_maps]

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from the authors' files and from timm's Swin."""
        return {"mmseg": (), "semask": KEYS_FROM_SEMASK, "timm": KEYS_FROM_TIMM}


class SemanticLayer(nn.Module):
    """Norm, then semantic attention inside of windows, or of the whole map."""

    def __init__(self, width: int, num_classes: int, *, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(width)
        self.class_injection = nn.ModuleList([SemanticAttention(width, num_classes)])

    def forward(
        self, tokens: Float[Tensor, "B h w D"]
    ) -> tuple[Float[Tensor, "B h w K"], Float[Tensor, "B h w D"]]:
        normed, (attend,) = self.norm1(tokens), self.class_injection
        height, width = tokens.shape[1:3]
        if self.window is None:
            classes, masked = attend(normed.flatten(1, 2)[:, None])
            size = (height, width)
            return classes[:, 0].unflatten(1, size), masked[:, 0].unflatten(1, size)
        padded = F.pad(normed, (0, 0, 0, -width % self.window, 0, -height % self.window))
        windows = attend(split_windows(padded, self.window))
        joined = (join_windows(each, self.window, *padded.shape[1:3]) for each in windows)
        classes, masked = (each[:, :height, :width] for each in joined)
        return classes, masked


class SemanticAttention(nn.Module):
    """Attention whose queries and keys are class scores; the queries are the class map.

    The result is added with a weight that starts at 0, so that pretrained features stay.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.mlp_cls_q = nn.Linear(width, num_classes)
        self.mlp_cls_k = nn.Linear(width, num_classes)
        self.mlp_v = nn.Linear(width, width)
        self.mlp_res = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.1)
        self.gamma = nn.Parameter(self.mlp_v.weight.new_zeros(1))
        for layer in (self.mlp_cls_q, self.mlp_cls_k, self.mlp_v, self.mlp_res):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(
        self, tokens: Float[Tensor, "B N T D"]
    ) -> tuple[Float[Tensor, "B N T K"], Float[Tensor, "B N T D"]]:
        classes = self.mlp_cls_q(tokens)
        # Not divided by the root of the number of classes.
        attended = F.scaled_dot_product_attention(
            classes, self.mlp_cls_k(tokens), self.mlp_v(tokens), scale=1.0
        )
        return classes, self.gamma * self.proj_drop(self.mlp_res(attended)) + tokens
