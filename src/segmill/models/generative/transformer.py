"""DiffusionTransformer: the trunk of DiT and SiT, told the time and the class.

Paper:   Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT), ICCV 2023,
         https://arxiv.org/abs/2212.09748
Follows: facebookresearch/DiT, willisma/SiT and sihyun-yu/REPA, which share it.
Weights: the files of all three load by `key_rules`, averaged weights first where a file has them;
         so does the file of a guide trained here.
"""

import math
import re

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from segmill.checkpoint.keys import Drop, Prefix, Rename, Rule
from segmill.errors import SegmillError
from segmill.ops.modulated_norm import modulated_norm

FREQUENCIES = 128  # of the time, cosine and sine each
PERIOD = 10_000.0  # longest wave of positions and times, over 2 pi
# Names of a guide's parts in the file of one that was trained here.
NETWORK, CODEC = "guide.network.", "guide.codec."

Latent = Float[Tensor, "N C h w"]


class DiffusionTransformer(nn.Module):
    """Noisy latents of any size become predictions of the same size, under one class each.

    Positions are computed for the size at hand. Class `num_classes` is "no condition". Times are
    in the unit of the weights (SiT: 0..1, DiT: 0..999).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        depth: int,
        num_heads: int,
        patch: int,
        mlp_ratio: float,
        num_classes: int,
        learn_sigma: bool,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.in_channels, self.patch, self.num_classes = in_channels, patch, num_classes
        self.x_embedder = PatchEmbedder(in_channels, channels, patch)
        self.t_embedder = TimeEmbedder(channels)
        self.y_embedder = ClassEmbedder(num_classes, channels)
        self.blocks = nn.ModuleList(
            Block(channels, num_heads=num_heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm)
            for _ in range(depth)
        )
        outputs = 2 * in_channels if learn_sigma else in_channels
        self.final_layer = FinalLayer(channels, patch * patch * outputs)
        self._initialise()

    def forward(
        self,
        noisy_latent: Latent,
        t: Float[Tensor, " N"],
        classes: Int64[Tensor, " N"] | Int64[Tensor, "N M"],
        weights: Float[Tensor, "N M"] | None = None,
    ) -> Latent:
        """Velocities or noise; where a variance is predicted beside them it is left out.

        With `weights` the condition is the weighted sum of M classes' vectors.
        """
        height, width = noisy_latent.shape[2:]
        if height % self.patch or width % self.patch:
            raise SegmillError(
                f"A latent of {height} x {width} cells has no whole number of patches of "
                f"{self.patch} x {self.patch}. Set view.multiple, and the crop when training, to "
                "multiples of the patch in pixels."
            )
        grid = height // self.patch, width // self.patch
        tokens = self.x_embedder(noisy_latent)
        tokens = tokens + position_code(grid, tokens.shape[2], tokens.device)
        condition = self.t_embedder(t) + self.y_embedder(classes, weights)
        branch = gate = None
        for block in self.blocks:
            tokens, branch, gate = block(tokens, branch, gate, condition)
        patches = self.final_layer(tokens, branch, gate, condition)
        return _unpatched(patches, grid, self.patch, self.in_channels)

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules from the files of DiT, SiT and REPA, and from a guide trained here."""
        # Positions are computed; the projectors align features in REPA's training, that is all.
        drop = (Drop("pos_embed"), Drop(r"projectors\.\d+\.[024]\.(weight|bias)"))
        depth = len(self.blocks)
        return {
            "sit": drop,
            "guide": (Prefix(NETWORK, ""), Drop(re.escape(CODEC) + ".+")),
            # REPA's older files count the blocks behind the projectors anew.
            **{
                f"repa, {first} blocks before the projectors": (
                    *drop,
                    *(
                        Rename(rf"decoder_blocks\.{index}\.(.+)", rf"blocks.{first + index}.\1")
                        for index in range(depth - first)
                    ),
                )
                for first in range(1, depth)
            },
        }

    def _initialise(self) -> None:
        """As in all three repositories: every block starts as the identity, the output as zero."""
        zero = ("final_layer.linear.", "adaLN_modulation.")
        for name, parameter in self.named_parameters():
            if any(part in name for part in zero) or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder.", "y_embedder.")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter.flatten(1))


class PatchEmbedder(nn.Module):
    """Patches of the latent as tokens, row by row."""

    def __init__(self, in_channels: int, channels: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, patch, stride=patch)

    def forward(self, latent: Latent) -> Float[Tensor, "N T D"]:
        return self.proj(latent).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """Waves of the time, cosines first, through a small network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, t: Float[Tensor, " N"]) -> Float[Tensor, "N D"]:
        steps = torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device)
        angle = t[:, None].float() * torch.exp(-math.log(PERIOD) * steps / FREQUENCIES)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class ClassEmbedder(nn.Module):
    """One vector for each class, and a last one for "no condition"."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, channels)

    def forward(
        self,
        classes: Int64[Tensor, " N"] | Int64[Tensor, "N M"],
        weights: Float[Tensor, "N M"] | None = None,
    ) -> Float[Tensor, "N D"]:
        if weights is None:
            return self.embedding_table(classes)
        # One product with the table, however many classes: no vectors of each are gathered.
        table = self.embedding_table.weight
        shares = weights.new_zeros(len(weights), len(table)).scatter_add(1, classes, weights)
        return shares.to(table.dtype) @ table


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition (adaLN-zero).

    What its MLP found is left to the next block to add: adding and normalising are one operation.
    """

    def __init__(self, channels: int, *, num_heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(channels, num_heads=num_heads, qk_norm=qk_norm)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    def forward(
        self,
        tokens: Float[Tensor, "N T D"],
        branch: Float[Tensor, "N T D"] | None,
        gate: Float[Tensor, "N 1 D"] | None,
        condition: Float[Tensor, "N D"],
    ) -> tuple[Float[Tensor, "N T D"], Float[Tensor, "N T D"], Float[Tensor, "N 1 D"]]:
        """Tokens, and the branch and its gate that are still to be added: before and after."""
        parts = self.adaLN_modulation(condition)[:, None].chunk(6, dim=2)
        shift, scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = parts
        tokens, normal = modulated_norm(tokens, shift, scale, branch=branch, gate=gate)
        tokens, normal = modulated_norm(
            tokens, mlp_shift, mlp_scale, branch=self.attn(normal), gate=attn_gate
        )
        return tokens, _no_view(self.mlp(normal)), _no_view(mlp_gate)


class Attention(nn.Module):
    """Self-attention over all tokens; `qkv` makes queries, keys and values in this order."""

    def __init__(self, channels: int, *, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        width = channels // num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        heads = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).movedim(1, 3)
        query, key, value = heads.unbind(dim=1)
        query, key = self.q_norm(query), self.k_norm(key)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with the tanh approximation of GELU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, tokens: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


class FinalLayer(nn.Module):
    """From tokens to patches; a patch is (row, column, channel), the channel fastest."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(
        self,
        tokens: Float[Tensor, "N T D"],
        branch: Float[Tensor, "N T D"] | None,
        gate: Float[Tensor, "N 1 D"] | None,
        condition: Float[Tensor, "N D"],
    ) -> Float[Tensor, "N T P"]:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=2)
        _, normal = modulated_norm(tokens, shift, scale, branch=branch, gate=gate)
        return self.linear(normal)


def position_code(
    grid: tuple[int, int], channels: int, device: torch.device
) -> Float[Tensor, "T D"]:
    """Waves of the column, then of the row, of each token; sines first."""
    quarter = channels // 4
    steps = torch.arange(quarter, dtype=torch.float64, device=device)
    frequency = PERIOD ** (-steps / quarter)
    rows, columns = (
        torch.cat([angle.sin(), angle.cos()], dim=1).float()
        for size in grid
        for angle in [torch.arange(size, device=device)[:, None] * frequency]
    )
    height, width = grid
    by_column = columns[None].expand(height, width, -1)
    by_row = rows[:, None].expand(height, width, -1)
    return torch.cat([by_column, by_row], dim=2).flatten(0, 1)


def _no_view(tensor: Tensor) -> Tensor:
    """Sharding (FSDP2) cannot see changes of a view, and says so; compiled code returns none."""
    return tensor if torch.compiler.is_compiling() else tensor.clone()


def _unpatched(
    patches: Float[Tensor, "N T P"], grid: tuple[int, int], patch: int, channels: int
) -> Latent:
    """The first channels of the patches as an image; a copy, as sharded networks' outputs are."""
    height, width = grid
    split = patches.unflatten(2, (patch, patch, -1)).unflatten(1, grid)[..., :channels]
    image = split.permute(0, 5, 1, 3, 2, 4)  # N, C, row, row in patch, column, column in patch
    return image.reshape(len(patches), channels, height * patch, width * patch)
