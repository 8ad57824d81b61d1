"""Attention under a geometric bias, against the formula written out with loops."""

import pytest
import torch
from torch import Tensor

from segmill.ops.geometry_attention import geometry_attention, geometry_bias

SIZES = {"samples": 3, "heads": 2, "tokens": 6, "width": 4}


def drawn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def case(*, positions: tuple[int, ...]) -> dict[str, Tensor]:
    samples, heads, tokens, width = SIZES.values()
    torch.manual_seed(0)
    return {
        "query": drawn(samples, heads, tokens, width),
        "key": drawn(samples, heads, tokens, width),
        "value": drawn(samples, heads, tokens, width + 1),
        "position": drawn(*positions),
        "depth": drawn(samples, tokens),
        "weight": drawn(2),
        "decay": -drawn(heads).abs(),
    }


def by_loops(case: dict[str, Tensor]) -> Tensor:
    query, key, value, position, depth, weight, decay = case.values()
    out = torch.zeros_like(value)
    samples, heads, tokens, width = query.shape
    for sample in range(samples):
        for head in range(heads):
            for i in range(tokens):
                scores = torch.stack(
                    [
                        query[sample, head, i] @ key[sample, head, j] / width**0.5
                        + decay[head] * weight[0] * (position[i] - position[j]).abs().sum()
                        + decay[head] * weight[1] * (depth[sample, i] - depth[sample, j]).abs()
                        for j in range(tokens)
                    ]
                )
                out[sample, head, i] = scores.softmax(0) @ value[sample, head]
    return out


@pytest.mark.parametrize("positions", [(6, 2), (6,)], ids=["plane", "line"])
def test_scores_fall_with_the_distance_in_the_image_and_in_depth(positions):
    tensors = case(positions=positions)
    out = geometry_attention(**tensors)
    torch.testing.assert_close(out, by_loops(tensors), atol=1e-12, rtol=0)  # float64, other order


def test_gradients_reach_both_weights_and_the_tokens():
    tensors = case(positions=(6, 2))
    learnt = [tensors[name].requires_grad_() for name in ("query", "key", "value", "weight")]
    ours = torch.autograd.grad(geometry_attention(**tensors).square().sum(), learnt)
    theirs = torch.autograd.grad(by_loops(tensors).square().sum(), learnt)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)  # float64, other order


def test_heads_differ_by_their_decay_alone():
    tensors = case(positions=(6,))
    names = ("position", "depth", "weight", "decay")
    bias = geometry_bias(**{name: tensors[name] for name in names})
    scaled = bias / tensors["decay"][:, None, None]
    torch.testing.assert_close(scaled[:, 0], scaled[:, 1])


def test_narrow_tokens_stay_narrow():
    tensors = {name: tensor.float() for name, tensor in case(positions=(6, 2)).items()}
    narrow = {name: tensors[name].bfloat16() for name in ("query", "key", "value")}
    out = geometry_attention(**(tensors | narrow))
    assert out.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits of values up to 3.
    torch.testing.assert_close(out.float(), geometry_attention(**tensors), atol=0.05, rtol=0.02)
