"""Mask2Former and MaskFormer at tiny sizes; their numbers are `test_parity`'s matter."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from segmill.checkpoint.keys import apply_rules
from segmill.models.encoder_decoder import EncoderDecoder
from segmill.models.families.mask2former import Mask2FormerHead, inside
from segmill.models.families.maskformer import MaskFormerHead
from segmill.models.mask_losses import DenseMaskLosses, LossWeights, PointMaskLosses
from segmill.models.pixel_decoder import ConvPixelDecoder, DeformablePixelDecoder

WEIGHTS = LossWeights(classes=2.0, masks=5.0, dice=5.0, no_object=0.1)
SIZES = {"channels": 32, "num_queries": 6, "num_layers": 2, "num_heads": 4, "hidden": 32}
HEADS = {
    "mask2former": partial(
        Mask2FormerHead,
        pixel_decoder=partial(
            DeformablePixelDecoder, num_levels=3, num_layers=1, num_heads=4, num_points=2, hidden=32
        ),
        criterion=PointMaskLosses(weights=WEIGHTS, num_points=128, oversample=3.0, importance=0.75),
        num_classes=3,
        **SIZES,
    ),
    "maskformer": partial(
        MaskFormerHead,
        pixel_decoder=ConvPixelDecoder,
        criterion=DenseMaskLosses(weights=WEIGHTS, alpha=0.25, gamma=2.0),
        dropout=0.0,
        num_classes=3,
        **SIZES,
    ),
}


class Pooled(nn.Module):
    """Colours at four strides."""

    channels, strides = (3, 3, 3, 3), (4, 8, 16, 32)

    def forward(self, image):
        pool = nn.functional.avg_pool2d
        return [pool(image, stride, ceil_mode=True) for stride in self.strides]

    def key_rules(self):
        return {"mmseg": ()}


@pytest.fixture(params=HEADS)
def network(request):
    torch.manual_seed(0)
    return EncoderDecoder(backbone=Pooled(), decode_head=HEADS[request.param])


def batch():
    label = torch.randint(0, 3, (2, 4, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    image = nn.functional.one_hot(label, 3).permute(0, 3, 1, 2).float()
    label[:, :4] = 255
    return image, label


def test_logits_have_the_images_size_whatever_it_is(network):
    with torch.no_grad():
        assert network.eval()(torch.rand(2, 3, 45, 70)).shape == (2, 3, 45, 70)


def test_it_learns(network):
    image, label = batch()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    totals = []
    for _ in range(5):
        total = sum(network.losses(image, label).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert totals[-1] < 0.9 * totals[0]


def test_the_same_seed_gives_the_same_points():
    network = EncoderDecoder(backbone=Pooled(), decode_head=HEADS["mask2former"])
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(network.losses(*batch_of_seed())["decode.loss_mask"].item())
    assert losses[0] == losses[1] != losses[2]


def batch_of_seed():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return batch()


def test_older_files_number_the_attentions_in_the_order_of_work(network):
    names = [f"decode_head.{name}" for name in network.decode_head.state_dict()]
    masked = any("pixel_decoder.encoder" in name for name in names)
    order = ("cross_attn", "self_attn") if masked else ("self_attn", "cross_attn")
    older = {}
    for number, name in enumerate(names):
        old = name.replace(".ffn.", ".ffns.0.")
        if ".transformer_decoder." in name:
            for index, part in enumerate(order):
                old = old.replace(f".{part}.", f".attentions.{index}.")
        older[old.replace(".self_attn.", ".attentions.0.")] = np.array(number)
    assert older.keys() != set(names)
    renamed = apply_rules(older, network.key_rules()["mmseg"])
    assert renamed == {name: np.array(number) for number, name in enumerate(names)}


def test_a_query_with_an_empty_mask_attends_everywhere():
    masks = torch.tensor([[[[-1.0, 1.0]], [[-1.0, -1.0]]]])
    assert inside(masks, (1, 2)).tolist() == [[[False, True], [True, True]]]
