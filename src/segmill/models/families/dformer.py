"""DFormer's head: the three coarser maps merged, then global context. For DFormer and DFormerv2.

Paper:   Yin et al., "DFormer: Rethinking RGBD Representation Learning for Semantic Segmentation",
         ICLR 2024, https://arxiv.org/abs/2309.09668
Follows: the official `LightHamHead`, BatchNorm with eps 1e-3. Its logits depend on torch's seed, in
         eval too: see `models/hamburger.py`.
Weights: the official files load by name.
"""

from collections.abc import Sequence

from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.models.hamburger import Hamburger, merged_at_finest
from segmill.models.layers import ConvBNAct
from segmill.ops.upsample_cross_entropy import upsample_cross_entropy

EPS = 1e-3  # of all its norms


class LightHamHead(nn.Module):
    """The maps of `in_index`, squeezed to `ham_channels` at the first one's size; a Hamburger.

    `rank`, `train_steps` and `eval_steps` are the Hamburger's.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: Sequence[int],
        ham_channels: int,
        channels: int,
        rank: int,
        train_steps: int,
        eval_steps: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = tuple(in_index)
        total = sum(in_channels[index] for index in in_index)
        self.squeeze = ConvBNAct(total, ham_channels, kernel=1)
        self.hamburger = Hamburger(
            channels=ham_channels,
            rank=rank,
            train_steps=train_steps,
            eval_steps=eval_steps,
            ham_out=ConvBNAct(ham_channels, ham_channels, kernel=1, activation=None),
        )
        self.align = ConvBNAct(ham_channels, channels, kernel=1)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.apply(_initialise)

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D h w"]:
        """What is classified."""
        chosen = [features[index] for index in self.in_index]
        merged = merged_at_finest(chosen, self.squeeze.conv.weight)
        squeezed = self.squeeze.activate(self.squeeze.bn(merged))
        return self.align(self.hamburger(squeezed))

    def forward(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B K h w"]:
        return self.conv_seg(self.dropout(self.hidden(features)))

    def losses(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy over the pixels of the whole batch that have a label."""
        return {"loss_ce": upsample_cross_entropy(self(features), label, average="valid")}


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        module.eps = EPS
