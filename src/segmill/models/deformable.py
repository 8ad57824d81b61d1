"""Deformable attention as a layer: queries look at a few points around their place on each map."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.ops.deformable_attention import deformable_attention


class DeformableAttention(nn.Module):
    """What the points that a query reads add to it; names and initial values of Deformable DETR.

    The values have `value_width` channels, the queries `width`.
    """

    def __init__(
        self, width: int, *, value_width: int, heads: int, levels: int, points: int
    ) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, value_width)
        self.output_proj = nn.Linear(value_width, width)
        self.initialise()

    def initialise(self) -> None:
        """Each head looks into its own direction, point after point one pixel further."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        offsets = [
            coordinate * point / max(abs(math.cos(angle)), abs(math.sin(angle)))
            for angle in (2 * math.pi * head / self.heads for head in range(self.heads))
            for _ in range(self.levels)
            for point in range(1, self.points + 1)
            for coordinate in (math.cos(angle), math.sin(angle))
        ]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(torch.tensor(offsets))
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Float[Tensor, "B Q D"],
        value: Float[Tensor, "B N D"],
        centres: Float[Tensor, "Q 2"],
        shapes: Sequence[tuple[int, int]],
    ) -> Float[Tensor, "B Q D"]:
        """`value` holds the maps of `shapes` (height, width); `centres` are 0..1 over a map."""
        sizes = (self.heads, self.levels, self.points)
        values = self.value_proj(value).unflatten(-1, (self.heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (*sizes, 2))
        scores = self.attention_weights(query).unflatten(-1, (self.heads, -1))
        pixels = centres.new_tensor([(width, height) for height, width in shapes])[:, None]
        locations = centres[:, None, None, None] + offsets / pixels
        weights = scores.softmax(-1).unflatten(-1, sizes[1:])
        return self.output_proj(deformable_attention(values, shapes, locations, weights))


def pixel_centres(shapes: Sequence[tuple[int, int]], device: torch.device) -> Float[Tensor, "Q 2"]:
    """(x, y) of each pixel of each map, 0..1 from edge to edge, row by row."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))
    return torch.cat(centres)
