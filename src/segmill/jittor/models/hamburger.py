"""Hamburger: global context as the low-rank part of a feature map, found by factorisation.

Paper:   Geng et al., "Is Attention Better Than Matrix Decomposition?", ICLR 2021,
         https://arxiv.org/abs/2109.04553
Follows: `segmill.models.hamburger`.
"""

from collections.abc import Sequence

import jittor as jt
import numpy as np
from jaxtyping import Float
from jittor import nn

from segmill.jittor import random
from segmill.jittor.models.layers import ConvBNAct, PointwiseConv, constant, pointwise, resize

EPS = 1e-6  # keeps the multiplicative update from dividing by zero
SHORTEST = 1e-12  # of a basis that is brought to length 1


class Hamburger(jt.Module):
    """Between two 1 x 1 convolutions, the "bread", the map is replaced by its factorisation.

    `ham_out` is the second of them with its norm and no activation.
    """

    def __init__(
        self, *, channels: int, rank: int, train_steps: int, eval_steps: int, ham_out: ConvBNAct
    ) -> None:
        self.ham_in = nn.Sequential()
        self.ham_in.add_module("conv", PointwiseConv(channels, channels, bias=True))
        self.ham = NMF(rank=rank, train_steps=train_steps, eval_steps=eval_steps)
        self.ham_out = ham_out

    def execute(self, feature: Float[jt.Var, "B D h w"]) -> Float[jt.Var, "B D h w"]:
        context = self.ham_out(self.ham(nn.relu(self.ham_in(feature))))
        return nn.relu(feature + context)


class NMF(jt.Module):
    """A non-negative map as a product of two non-negative matrices, (D, R) and (R, N).

    Multiplicative updates from random bases, which are drawn in every pass, in eval too: two
    passes differ slightly unless `segmill.jittor.random` is seeded before each.
    """

    def __init__(self, *, rank: int, train_steps: int, eval_steps: int) -> None:
        self.rank, self.train_steps, self.eval_steps = rank, train_steps, eval_steps

    def execute(self, feature: Float[jt.Var, "B D h w"]) -> Float[jt.Var, "B D h w"]:
        batch, width = feature.shape[:2]
        steps = self.train_steps if self.is_training() else self.eval_steps
        drawn = random.uniform((batch, width, self.rank))
        lengths = np.sqrt((drawn * drawn).sum(axis=1, keepdims=True))
        bases = constant(drawn / np.maximum(lengths, np.float32(SHORTEST)))
        low_rank = factorised(feature.reshape(batch, width, -1), bases, steps=steps)
        return low_rank.reshape(feature.shape)


def factorised(
    pixels: Float[jt.Var, "B D N"], bases: Float[jt.Var, "B D R"], *, steps: int
) -> Float[jt.Var, "B D N"]:
    """The product of `bases` and their coefficients after `steps` updates of both.

    The coefficients are updated once more at the end.
    """
    response = jt.matmul(_transposed(pixels), bases)
    coefficients = nn.softmax(response, dim=-1)
    for _ in range(steps):
        coefficients = _updated(coefficients, response, bases)
        bases = _updated(bases, jt.matmul(pixels, coefficients), coefficients)
        response = jt.matmul(_transposed(pixels), bases)
    return jt.matmul(bases, _transposed(_updated(coefficients, response, bases)))


def _updated(
    factor: Float[jt.Var, "B M R"], numerator: Float[jt.Var, "B M R"], other: Float[jt.Var, "B L R"]
) -> Float[jt.Var, "B M R"]:
    gram = jt.matmul(_transposed(other), other)
    return factor * numerator / (jt.matmul(factor, gram) + EPS)


def _transposed(matrices: Float[jt.Var, "B M N"]) -> Float[jt.Var, "B N M"]:
    return matrices.transpose(0, 2, 1)


def merged_at_finest(
    features: Sequence[Float[jt.Var, "B _D _h _w"]], weight: Float[jt.Var, "E D 1 1"]
) -> Float[jt.Var, "B E h w"]:
    """The 1 x 1 convolution of all maps side by side, each resized to the first one's size.

    Such a convolution commutes with resizing: every map is convolved with its own part of `weight`
    at its own size.
    """
    merged, start, size = None, 0, tuple(features[0].shape[-2:])
    for feature in features:
        stop = start + feature.shape[1]
        part = resize(pointwise(feature, weight[:, start:stop], None), size)
        merged = part if merged is None else merged + part
        start = stop
    return merged
