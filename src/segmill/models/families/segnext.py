"""SegNeXt: a convolutional MSCAN trunk; its three coarser maps merged, then global context.

Paper:   Guo et al., "SegNeXt: Rethinking Convolutional Attention Design for Semantic Segmentation",
         NeurIPS 2022, https://arxiv.org/abs/2209.08575
Follows: MMSegmentation 1.2.2 `LightHamHead`, align_corners=False. Its logits depend on torch's
         seed, in eval too: see `models/hamburger.py`.
Weights: MMSegmentation's segnext_mscan-* load by name, the authors' through the trunk's rules.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.hamburger import Hamburger, merged_at_finest
from segmill.models.layers import classifier


class LightHamHead(nn.Module):
    """The maps of `in_index`, squeezed to `ham_channels` at the first one's size; a Hamburger.

    `groups` are those of every GroupNorm, `rank`, `train_steps` and `eval_steps` the Hamburger's.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: Sequence[int],
        channels: int,
        ham_channels: int,
        groups: int,
        rank: int,
        train_steps: int,
        eval_steps: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_index = tuple(in_index)
        total = sum(in_channels[index] for index in in_index)
        self.squeeze = ConvGNAct(total, ham_channels, groups=groups)
        self.hamburger = Hamburger(
            channels=ham_channels,
            rank=rank,
            train_steps=train_steps,
            eval_steps=eval_steps,
            ham_out=ConvGNAct(ham_channels, ham_channels, groups=groups, activation=None),
        )
        self.align = ConvGNAct(ham_channels, channels, groups=groups)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def hidden(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B D h w"]:
        """What is classified."""
        chosen = [features[index] for index in self.in_index]
        merged = merged_at_finest(chosen, self.squeeze.conv.weight)
        squeezed = self.squeeze.activate(self.squeeze.gn(merged))
        return self.align(self.hamburger(squeezed))

    def forward(self, features: Sequence[Float[Tensor, "B _D _h _w"]]) -> Float[Tensor, "B K h w"]:
        return self.conv_seg(self.dropout(self.hidden(features)))


class ConvGNAct(nn.Sequential):
    """1 x 1 convolution without bias, GroupNorm, activation (None: none)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        activation: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.gn = nn.GroupNorm(groups, out_channels)
        if activation is not None:
            self.activate = activation()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
