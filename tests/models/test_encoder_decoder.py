from functools import partial

import pytest
import torch
from torch import nn

from segmill.checkpoint.keys import Rename
from segmill.errors import SegmillError
from segmill.models.encoder_decoder import EncoderDecoder
from segmill.models.families.fcn import FCNHead
from segmill.models.families.sem_fpn import FPN


class Backbone(nn.Module):
    channels, strides = (2, 4), (1, 2)

    def forward(self, image):
        return [image[:, :2], image[:, :1, ::2, ::2].repeat(1, 4, 1, 1)]

    def key_rules(self):
        return {"mmseg": (Rename("a", "b"),), "timm": ()}


class HeadOfItsOwn(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.in_channels = in_channels

    def forward(self, features):
        return features[0]

    def losses(self, features, label):
        return {"loss_own": features[0].sum()}

    def key_rules(self):
        return {"mmseg": (Rename("c", "d"),), "hf": ()}


HEAD = partial(
    FCNHead,
    in_index=1,
    channels=5,
    num_convs=1,
    kernel=3,
    concat_input=False,
    dropout=0.0,
    num_classes=3,
)
IMAGE, LABEL = torch.rand(2, 3, 8, 6), torch.zeros(2, 8, 6, dtype=torch.long)


def network(**parts) -> EncoderDecoder:
    return EncoderDecoder(backbone=Backbone(), **{"decode_head": HEAD, **parts})


def test_heads_learn_their_sizes_from_the_backbone():
    assert network().decode_head.convs[0].conv.in_channels == 4


def test_heads_learn_their_sizes_from_the_neck():
    composed = network(neck=partial(FPN, channels=7))
    assert composed.decode_head.convs[0].conv.in_channels == 7
    assert composed(IMAGE).shape == (2, 3, 4, 3)


def test_losses_have_mmsegmentations_names():
    single = network(auxiliary_head=HEAD, auxiliary_weight=0.4)
    assert set(single.losses(IMAGE, LABEL)) == {"decode.loss_ce", "aux.loss_ce"}
    several = network(auxiliary_head=[HEAD, HeadOfItsOwn], auxiliary_weight=0.4)
    names = {"decode.loss_ce", "aux_0.loss_ce", "aux_1.loss_own"}
    assert set(several.losses(IMAGE, LABEL)) == names


def test_auxiliary_losses_are_weighted():
    losses = network(auxiliary_head=HeadOfItsOwn, auxiliary_weight=0.5).losses(IMAGE, LABEL)
    torch.testing.assert_close(losses["aux.loss_own"], 0.5 * IMAGE[:, :2].sum())


def test_an_auxiliary_head_without_its_weight_is_refused():
    with pytest.raises(SegmillError, match="auxiliary_weight together"):
        network(auxiliary_head=HEAD)


def test_class_weights_that_nothing_would_use_are_refused():
    with pytest.raises(SegmillError, match="HeadOfItsOwn has losses of its own"):
        network(decode_head=HeadOfItsOwn, class_weight=[1.0, 2.0])


def test_rules_of_all_parts_are_joined_by_origin():
    rules = network(decode_head=HeadOfItsOwn).key_rules()
    assert [rule.pattern for rule in rules["mmseg"]] == ["c", "a"]
    assert set(rules) == {"mmseg", "timm", "hf"}
