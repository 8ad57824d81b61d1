"""MaskFormer: queries attend to the coarsest feature map; each becomes a class and a mask.

Paper:   Cheng et al., "Per-Pixel Classification is Not All You Need for Semantic Segmentation",
         NeurIPS 2021, https://arxiv.org/abs/2107.06278
Follows: MMSegmentation 1.2.2 `MaskFormerHead` (MMDetection 3.3's) with its `PixelDecoder`.
Weights: MMSegmentation's maskformer_* files load by name; those made before MMDetection 3.0's new
         transformer (`attentions.0`, `ffns.0`) through the head's key rules.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.checkpoint.keys import Rule
from segmill.models.mask_losses import DenseMaskLosses, Prediction
from segmill.models.matching import MaskLabel
from segmill.models.pixel_decoder import ConvPixelDecoder, xavier_caffe2
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


class MaskFormerHead(nn.Module):
    """A DETR decoder beside a feature pyramid; every decoder layer predicts classes and masks."""

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        channels: int,
        pixel_decoder: Callable[..., ConvPixelDecoder],
        criterion: DenseMaskLosses,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        hidden: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.criterion, self.num_classes = criterion, num_classes
        self.pixel_decoder = pixel_decoder(in_channels=in_channels, channels=channels)
        layers = (
            DecoderLayer(channels, heads=num_heads, hidden=hidden, dropout=dropout)
            for _ in range(num_layers)
        )
        self.transformer_decoder = DecoderLayers(layers, channels)
        self.decoder_input_proj = nn.Conv2d(in_channels[-1], channels, 1)
        self.query_embed = nn.Embedding(num_queries, channels)
        self.cls_embed = nn.Linear(channels, num_classes + 1)
        self.mask_embed = mask_embedding(channels, channels)
        xavier_caffe2(self.decoder_input_proj)
        initialise_matrices(self.transformer_decoder, nn.init.xavier_uniform_)

    def logits_at(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], size: Sequence[int]
    ) -> Float[Tensor, "B K H W"]:
        """Scores at the image's size; the masks are upsampled, not what is made of them."""
        mask_feature, queries = self._decode(features)
        last = self._prediction(queries[-1], mask_feature)
        return semantic_logits(last.classes, last.masks, size)

    def losses(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms of every layer."""
        masks = MaskLabel(label, self.num_classes)
        mask_feature, queries = self._decode(features)
        return self.criterion([self._prediction(each, mask_feature) for each in queries], masks)

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `decode_head.*` from older files of MMSegmentation."""
        return {"mmseg": keys_before_mmdet3("self_attn", "cross_attn")}

    def _decode(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> tuple[Float[Tensor, "B D h w"], list[Float[Tensor, "B Q D"]]]:
        """The map that masks are made of, and the queries after each layer."""
        mask_feature, coarsest = self.pixel_decoder(features)
        projected = self.decoder_input_proj(coarsest)
        memory = tokens(projected)
        key = memory + sine_positions(projected)
        positions = self.query_embed.weight
        query = torch.zeros_like(positions).expand(len(mask_feature), -1, -1)
        queries = []
        for layer in self.transformer_decoder.layers:
            query = layer(query, positions, key, memory)
            queries.append(query)
        return mask_feature, queries

    def _prediction(
        self, query: Float[Tensor, "B Q D"], mask_feature: Float[Tensor, "B D h w"]
    ) -> Prediction:
        normed = self.transformer_decoder.post_norm(query)
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask_embed(normed), mask_feature)
        return Prediction(self.cls_embed(normed), masks)


class DecoderLayer(nn.Module):
    """Attention among queries, attention to the image, a perceptron; norms after each."""

    def __init__(self, width: int, *, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads=heads, dropout=dropout)
        self.cross_attn = Attention(width, heads=heads, dropout=dropout)
        self.ffn = FeedForward(width, hidden, dropout=dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self,
        query: Float[Tensor, "B Q D"],
        positions: Float[Tensor, "Q D"],
        key: Float[Tensor, "B N D"],
        value: Float[Tensor, "B N D"],
    ) -> Float[Tensor, "B Q D"]:
        placed = query + positions
        query = self.norms[0](query + self.self_attn(placed, placed, query))
        query = self.norms[1](query + self.cross_attn(query + positions, key, value))
        return self.norms[2](self.ffn(query))
