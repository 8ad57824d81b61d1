"""DFormer's head: the three coarser maps merged, then global context. For DFormer and DFormerv2.

Paper:   Yin et al., "DFormer: Rethinking RGBD Representation Learning for Semantic Segmentation",
         ICLR 2024, https://arxiv.org/abs/2309.09668
Follows: `segmill.models.families.dformer`, by name and by number.
Weights: the official files load by name.
"""

import math
from collections.abc import Sequence

import jittor as jt
import numpy as np
from jaxtyping import Float, Int

from segmill.jittor import random
from segmill.jittor.losses import upsample_cross_entropy
from segmill.jittor.models.hamburger import Hamburger, merged_at_finest
from segmill.jittor.models.layers import ConvBNAct, Dropout2d, PointwiseConv

EPS = 1e-3  # of all its norms


class LightHamHead(jt.Module):
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
        self.in_index = tuple(in_index)
        total = sum(in_channels[index] for index in in_index)
        self.squeeze = ConvBNAct(total, ham_channels, eps=EPS)
        self.hamburger = Hamburger(
            channels=ham_channels,
            rank=rank,
            train_steps=train_steps,
            eval_steps=eval_steps,
            ham_out=ConvBNAct(ham_channels, ham_channels, eps=EPS, activated=False),
        )
        self.align = ConvBNAct(ham_channels, channels, eps=EPS)
        self.dropout = Dropout2d(dropout)
        self.conv_seg = PointwiseConv(channels, num_classes, bias=True)
        for module in self.modules():
            if isinstance(module, PointwiseConv):
                _initialise(module)

    def hidden(self, features: Sequence[Float[jt.Var, "B _D _h _w"]]) -> Float[jt.Var, "B D h w"]:
        """What is classified."""
        chosen = [features[index] for index in self.in_index]
        merged = merged_at_finest(chosen, self.squeeze.conv.weight)
        squeezed = self.squeeze.activate(self.squeeze.bn(merged))
        return self.align(self.hamburger(squeezed))

    def execute(self, features: Sequence[Float[jt.Var, "B _D _h _w"]]) -> Float[jt.Var, "B K h w"]:
        return self.conv_seg(self.dropout(self.hidden(features)))

    def losses(
        self, features: Sequence[Float[jt.Var, "B _D _h _w"]], label: Int[jt.Var, "B H W"]
    ) -> dict[str, Float[jt.Var, "1"]]:
        """Cross-entropy over the pixels of the whole batch that have a label."""
        return {"loss_ce": upsample_cross_entropy(self(features), label)}


def _initialise(conv: PointwiseConv) -> None:
    # He et al. 2015, by what comes in.
    scale = np.float32(math.sqrt(2.0 / conv.weight.shape[1]))
    conv.weight = jt.array(random.normal(tuple(conv.weight.shape)) * scale)
