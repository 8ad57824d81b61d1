"""Hamburger: global context as the low-rank part of a feature map, found by factorisation.

Paper:   Geng et al., "Is Attention Better Than Matrix Decomposition?", ICLR 2021,
         https://arxiv.org/abs/2109.04553
Follows: MMSegmentation 1.2.2 `Hamburger` and `NMF2D`; SegNeXt and DFormer stand on it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segmill.models.layers import resize

EPS = 1e-6  # keeps the multiplicative update from dividing by zero


class Hamburger(nn.Module):
    """Between two 1 x 1 convolutions, the "bread", the map is replaced by its factorisation.

    `ham_out` is the second of them with its norm and no activation.
    """

    def __init__(
        self, *, channels: int, rank: int, train_steps: int, eval_steps: int, ham_out: nn.Module
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, 1)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one by default
        self.ham_in = nn.Sequential(OrderedDict(conv=conv))
        self.ham = NMF(rank=rank, train_steps=train_steps, eval_steps=eval_steps)
        self.ham_out = ham_out

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        context = self.ham_out(self.ham(F.relu(self.ham_in(feature))))
        return F.relu(feature + context)


class NMF(nn.Module):
    """A non-negative map as a product of two non-negative matrices, (D, R) and (R, N).

    Multiplicative updates from random bases, which are drawn in every forward pass, in eval too:
    two passes differ slightly unless torch's seed is set before each. Always in float32, for `EPS`
    is nothing in float16.
    """

    def __init__(self, *, rank: int, train_steps: int, eval_steps: int) -> None:
        super().__init__()
        self.rank, self.train_steps, self.eval_steps = rank, train_steps, eval_steps

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        batch, width = feature.shape[:2]
        steps = self.train_steps if self.training else self.eval_steps
        with _without_autocast(feature.device):
            pixels = feature.flatten(2).float()
            bases = torch.rand(batch, width, self.rank, device=feature.device)
            low_rank = factorised(pixels, F.normalize(bases, dim=1), steps=steps)
        return low_rank.to(feature.dtype).unflatten(2, feature.shape[2:])


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    # The meta device, on which networks are counted, knows none. (Not `is_autocast_available`:
    # torch.compile cannot look into it.)
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def factorised(
    pixels: Float[Tensor, "B D N"], bases: Float[Tensor, "B D R"], *, steps: int
) -> Float[Tensor, "B D N"]:
    """The product of `bases` and their coefficients after `steps` updates of both.

    The coefficients are updated once more at the end.
    """
    response = pixels.mT @ bases
    coefficients = response.softmax(dim=-1)
    for _ in range(steps):
        coefficients = _updated(coefficients, response, bases)
        bases = _updated(bases, pixels @ coefficients, coefficients)
        response = pixels.mT @ bases
    return bases @ _updated(coefficients, response, bases).mT


def _updated(
    factor: Float[Tensor, "B M R"], numerator: Float[Tensor, "B M R"], other: Float[Tensor, "B L R"]
) -> Float[Tensor, "B M R"]:
    return factor * numerator / (factor @ (other.mT @ other) + EPS)


def merged_at_finest(
    features: Sequence[Float[Tensor, "B _D _h _w"]], weight: Float[Tensor, "E D 1 1"]
) -> Float[Tensor, "B E h w"]:
    """The 1 x 1 convolution of all maps side by side, each resized to the first one's size.

    Such a convolution commutes with resizing: every map is convolved with its own part of `weight`
    at its own size, so that the coarse ones cost little and nothing is concatenated.
    """
    parts = weight.split([feature.shape[1] for feature in features], dim=1)
    pairs = zip(features, parts, strict=True)
    finest, *others = (F.conv2d(feature, part) for feature, part in pairs)
    return sum((resize(other, finest.shape[-2:]) for other in others), start=finest)
