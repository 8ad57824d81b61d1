import torch
from torch import nn

from segmill.models.backbones.dilated_resnet import DilatedResNet


def backbone(name, **changes):
    settings = {"in_channels": 3, "out_indices": [1, 2, 3, 4], "options": {"layers": [1, 1, 2, 2]}}
    return DilatedResNet(name=name, **(settings | changes))


def test_a_stage_may_have_both_stride_and_dilation():
    trunk = backbone("resnet50c", output_stride=32, dilations=[1, 1, 2, 4]).eval()
    assert trunk.strides == (4, 8, 16, 32)
    with torch.no_grad():
        sizes = [feature.shape[-1] for feature in trunk(torch.rand(1, 3, 64, 64))]
    assert sizes == [16, 8, 4, 2]
    convolutions = [block.conv2 for block in trunk.trunk["layer4"]]
    assert [conv.dilation for conv in convolutions] == [(2, 2), (4, 4)]
    assert [conv.stride for conv in convolutions] == [(2, 2), (1, 1)]


def test_the_dilation_of_a_stride_is_timms():
    ours = backbone("resnet50c", output_stride=8, dilations=[1, 1, 2, 4])
    convolutions = [ours.trunk[f"layer{level}"] for level in (1, 2, 3, 4)]
    found = [[block.conv2.dilation[0] for block in stage] for stage in convolutions]
    assert found == [[1], [1], [1, 2], [2, 4]]


def test_only_a_stride_makes_resnests_shortcut_average():
    trunk = backbone("resnest101e", output_stride=8, dilations=[1, 1, 2, 4]).trunk
    pools = [type(trunk[f"layer{level}"][0].downsample[0]) for level in (1, 2, 3, 4)]
    assert pools == [nn.Identity, nn.AvgPool2d, nn.Identity, nn.Identity]
