"""Mask2Former: queries that attend to the inside of the mask they predicted one layer before.

Paper:   Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation",
         CVPR 2022, https://arxiv.org/abs/2112.01527
Follows: MMSegmentation 1.2.2 `Mask2FormerHead` (MMDetection 3.3's), without compiled operators.
Weights: MMSegmentation's mask2former_* files load by name; those made before MMDetection 3.0's new
         transformer (`attentions.0`, `ffns.0`) through the head's key rules.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from segmill.checkpoint.keys import Rule
from segmill.models.layers import resize
from segmill.models.mask_losses import PointMaskLosses, Prediction
from segmill.models.matching import MaskLabel
from segmill.models.pixel_decoder import DeformablePixelDecoder
from segmill.models.query_decoder import (
    Attention,
    DecoderLayers,
    FeedForward,
    initialise_matrices,
    keys_before_mmdet3,
    mask_embedding,
    semantic_logits,
    sine_positions,
    tokens,
)


class Mask2FormerHead(nn.Module):
    """Each decoder layer attends to one level of the pixel decoder, the coarsest first.

    The queries predict masks before the first layer and after every one.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        channels: int,
        pixel_decoder: Callable[..., DeformablePixelDecoder],
        criterion: PointMaskLosses,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        hidden: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.criterion, self.num_classes = criterion, num_classes
        self.pixel_decoder = pixel_decoder(in_channels=in_channels, channels=channels)
        layers = (MaskedLayer(channels, heads=num_heads, hidden=hidden) for _ in range(num_layers))
        self.transformer_decoder = DecoderLayers(layers, channels)
        self.query_embed = nn.Embedding(num_queries, channels)
        self.query_feat = nn.Embedding(num_queries, channels)
        self.level_embed = nn.Embedding(len(self.pixel_decoder.input_convs), channels)
        self.cls_embed = nn.Linear(channels, num_classes + 1)
        self.mask_embed = mask_embedding(channels, channels)
        initialise_matrices(self.transformer_decoder, nn.init.xavier_normal_)

    def logits_at(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], size: Sequence[int]
    ) -> Float[Tensor, "B K H W"]:
        """Scores at the image's size; the masks are upsampled, not what is made of them."""
        last = self.predict(features)[-1]
        return semantic_logits(last.classes, last.masks, size)

    def losses(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms of every layer; draws random points."""
        masks = MaskLabel(label, self.num_classes)
        return self.criterion(self.predict(features), masks)

    def predict(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> list[Prediction]:
        """What the queries say before the first layer and after each."""
        mask_feature, levels = self.pixel_decoder(features)
        embeddings = self.level_embed.weight
        memory = [tokens(each) + level for each, level in zip(levels, embeddings, strict=True)]
        keys = [each + sine_positions(level) for each, level in zip(memory, levels, strict=True)]
        query = self.query_feat.weight.expand(len(mask_feature), -1, -1)
        predictions = [self._prediction(query, mask_feature)]
        for index, layer in enumerate(self.transformer_decoder.layers):
            level = index % len(levels)
            allowed = inside(predictions[-1].masks, levels[level].shape[-2:])
            query = layer(query, self.query_embed.weight, keys[level], memory[level], allowed)
            predictions.append(self._prediction(query, mask_feature))
        return predictions

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `decode_head.*` from older files of MMSegmentation."""
        return {"mmseg": keys_before_mmdet3("cross_attn", "self_attn")}

    def _prediction(
        self, query: Float[Tensor, "B Q D"], mask_feature: Float[Tensor, "B D h w"]
    ) -> Prediction:
        normed = self.transformer_decoder.post_norm(query)
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask_embed(normed), mask_feature)
        return Prediction(self.cls_embed(normed), masks)


class MaskedLayer(nn.Module):
    """Masked attention to the image, attention among queries, a perceptron; norms after each."""

    def __init__(self, width: int, *, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads=heads, dropout=0.0)
        self.cross_attn = Attention(width, heads=heads, dropout=0.0)
        self.ffn = FeedForward(width, hidden, dropout=0.0)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self,
        query: Float[Tensor, "B Q D"],
        positions: Float[Tensor, "Q D"],
        key: Float[Tensor, "B N D"],
        value: Float[Tensor, "B N D"],
        allowed: Bool[Tensor, "B Q N"],
    ) -> Float[Tensor, "B Q D"]:
        query = self.norms[0](query + self.cross_attn(query + positions, key, value, allowed))
        placed = query + positions
        query = self.norms[1](query + self.self_attn(placed, placed, query))
        return self.norms[2](self.ffn(query))


@torch.no_grad()
def inside(masks: Float[Tensor, "B Q h w"], size: Sequence[int]) -> Bool[Tensor, "B Q N"]:
    """Which pixels of a level each query may attend to: its mask; if that is empty, all."""
    # Of the probability: a logit just below 0 has probability 0.5 in float32 and is inside.
    outside = resize(masks, size).flatten(2).sigmoid() < 0.5
    return ~(outside & ~outside.all(-1, keepdim=True))
