"""Parts of decoders in which learned queries become masks: attention, positions, inference.

Parameter names are MMDetection 3.3's, and so are the initial values.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from segmill.checkpoint.keys import Rename, Rule
from segmill.models.layers import resize

TEMPERATURE = 10_000  # of the positions' wavelengths
EPS = 1e-6  # the original's


class DecoderLayers(nn.Module):
    """The layers, called one by one by the head, and the norm before its predictions."""

    def __init__(self, layers: Iterable[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.post_norm = nn.LayerNorm(width)


class Attention(nn.Module):
    """Multi-head attention; what it adds to the query.

    `attn` only holds the weights. Query and key come with their positions, the value without.
    """

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attn = nn.MultiheadAttention(width, heads)
        self.proj_drop = nn.Dropout(dropout)

    def forward(
        self,
        query: Float[Tensor, "B Q D"],
        key: Float[Tensor, "B N D"],
        value: Float[Tensor, "B N D"],
        allowed: Bool[Tensor, "B Q N"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        weights, biases = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(tokens, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if allowed is None else allowed[:, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.proj_drop(self.attn.out_proj(attended.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Linear, ReLU, linear, and its input added; nested as the weights are named."""

    def __init__(self, width: int, hidden: int, *, dropout: float) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.layers = nn.Sequential(first, nn.Linear(hidden, width), nn.Dropout(dropout))

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return tokens + self.layers(tokens)


def keys_before_mmdet3(first: str, second: str) -> tuple[Rule, ...]:
    """Rules from the names of MMDetection 2 and the first 3.0 candidates, which number the parts.

    `first` and `second` are the two attentions of a decoder layer, in the order of its work.
    """
    decoder = r"decode_head\.transformer_decoder\.layers\.(\d+)\."
    encoder = r"decode_head\.pixel_decoder\.encoder\.layers\.(\d+)\."
    ours = r"decode_head.transformer_decoder.layers.\1."
    ours_encoder = r"decode_head.pixel_decoder.encoder.layers.\1."
    return (
        Rename(decoder + r"attentions\.0\.(.+)", ours + rf"{first}.\2"),
        Rename(decoder + r"attentions\.1\.(.+)", ours + rf"{second}.\2"),
        Rename(decoder + r"ffns\.0\.(.+)", ours + r"ffn.\2"),
        Rename(encoder + r"attentions\.0\.(.+)", ours_encoder + r"self_attn.\2"),
        Rename(encoder + r"ffns\.0\.(.+)", ours_encoder + r"ffn.\2"),
    )


def mask_embedding(width: int, channels: int) -> nn.Sequential:
    """Three linear layers from a query to the vector that is compared with every pixel."""
    return nn.Sequential(
        nn.Linear(width, width),
        nn.ReLU(inplace=True),
        nn.Linear(width, width),
        nn.ReLU(inplace=True),
        nn.Linear(width, channels),
    )


def initialise_matrices(module: nn.Module, fill: Callable[[Tensor], Tensor]) -> None:
    """Fill every parameter of two axes or more; the others keep what their layers gave them."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            fill(parameter)


def tokens(feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B N D"]:
    """Pixels one after another, row by row."""
    return feature.flatten(2).transpose(1, 2)


def sine_positions(feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "N D"]:
    """Sines and cosines of each pixel's row (first half) and column (DETR's encoding)."""
    width = feature.shape[1] // 2
    index = torch.arange(width, dtype=torch.float32, device=feature.device)
    wavelength = TEMPERATURE ** (2 * (index // 2) / width)
    rows, columns = (_waves(length, wavelength) for length in (feature.shape[2], feature.shape[3]))
    grid = (rows[:, None].expand(-1, len(columns), -1), columns.expand(len(rows), -1, -1))
    return torch.cat(grid, dim=-1).flatten(0, 1).to(feature.dtype)


def _waves(length: int, wavelength: Float[Tensor, " D"]) -> Float[Tensor, "L D"]:
    position = torch.arange(1, length + 1, dtype=torch.float32, device=wavelength.device)
    angle = (position / (position[-1] + EPS) * (2 * math.pi))[:, None] / wavelength
    return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)


def semantic_logits(
    classes: Float[Tensor, "B Q C"], masks: Float[Tensor, "B Q h w"], size: Sequence[int]
) -> Float[Tensor, "B K H W"]:
    """Probability of each class times that of the mask, summed over the queries (not logits)."""
    prob = classes.softmax(-1)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", prob, resize(masks, size).sigmoid())
