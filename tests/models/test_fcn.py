import torch
from torch import nn

from segmill.models.families.fcn import FCNHead

SIZES = {"num_convs": 2, "kernel": 3, "dropout": 0.1, "num_classes": 3}


def test_a_head_that_concatenates_sees_its_input_twice():
    head = FCNHead(in_channels=[4], in_index=0, channels=6, concat_input=True, **SIZES)
    assert head.conv_cat.conv.in_channels == 10
    assert head([torch.rand(2, 4, 5, 5)]).shape == (2, 3, 5, 5)


def test_several_maps_are_resized_to_the_first_and_concatenated():
    head = FCNHead(in_channels=[2, 4], in_index=[0, 1], channels=6, concat_input=False, **SIZES)
    assert head.convs[0].conv.in_channels == 6
    assert head([torch.rand(2, 2, 8, 6), torch.rand(2, 4, 4, 3)]).shape == (2, 3, 8, 6)


def test_dropout_before_the_classifier_drops_whole_channels():
    head = FCNHead(in_channels=[4], in_index=0, channels=6, concat_input=False, **SIZES)
    assert isinstance(head.dropout, nn.Dropout2d)
