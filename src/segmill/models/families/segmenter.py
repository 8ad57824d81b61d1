"""Segmenter: a ViT encoder; class embeddings join the patches in a small transformer, and the
similarity of a patch and a class is the logit.

Paper:   Strudel et al., "Segmenter: Transformer for Semantic Segmentation", ICCV 2021,
         https://arxiv.org/abs/2105.05633
Follows: MMSegmentation 1.2.2 `SegmenterMaskTransformerHead`. The paper's linear decoder is FCN's
         head without convolutions (segmenter_vit-s_fcn).
Weights: MMSegmentation's segmenter_* files by name; the published ones need
         model.network.backbone.patch_bias=true.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.backbones.vit import Block

NORM_EPS = 1e-5  # of the decoder; the encoder's LayerNorms have 1e-6


class SegmenterMaskTransformerHead(nn.Module):
    """Blocks over patches and class embeddings; cosine similarities, normalised over classes."""

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: int,
        channels: int,
        depth: int,
        num_heads: int,
        mlp_ratio: int,
        drop_path_rate: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index, self.num_classes = in_index, num_classes
        self.layers = nn.ModuleList(
            Block(
                channels,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                drop_path_rate=rate,
                norm_eps=NORM_EPS,
            )
            for rate in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        )
        self.dec_proj = nn.Linear(in_channels[in_index], channels)
        self.cls_emb = nn.Parameter(torch.zeros(1, num_classes, channels))
        self.patch_proj = nn.Linear(channels, channels, bias=False)
        self.classes_proj = nn.Linear(channels, channels, bias=False)
        self.decoder_norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.mask_norm = nn.LayerNorm(num_classes, eps=NORM_EPS)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)

    def forward(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B K h w"]:
        feature = features[self.in_index]
        patches = self.dec_proj(feature.flatten(2).transpose(1, 2))
        tokens = torch.cat([patches, self.cls_emb.expand(len(patches), -1, -1)], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        normed = self.decoder_norm(tokens)
        patches = F.normalize(self.patch_proj(normed[:, : -self.num_classes]), dim=2)
        classes = F.normalize(self.classes_proj(normed[:, -self.num_classes :]), dim=2)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        return masks.transpose(1, 2).unflatten(2, feature.shape[-2:])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
