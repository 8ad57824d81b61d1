import timm
import torch
from torch import nn

from segmill.checkpoint.load import load_arrays
from segmill.models.backbones.mobilenet_v2 import MobileNetV2

DILATED = {"strides": [1, 2, 2, 1, 1, 1, 1], "dilations": [1, 1, 1, 2, 2, 4, 4]}
PLAIN = {"strides": [1, 2, 2, 2, 1, 2, 1], "dilations": [1] * 7}


def backbone(**changes):
    settings = {"name": "mobilenetv2_100", "in_channels": 3, "out_indices": [1, 2, 4, 6]}
    return MobileNetV2(**(settings | changes)).eval()


def test_a_dilated_trunk_says_its_sizes():
    trunk = backbone(**DILATED)
    assert trunk.channels == (24, 32, 96, 320)
    assert trunk.strides == (4, 8, 8, 8)
    with torch.no_grad():
        sizes = [tuple(feature.shape[1:]) for feature in trunk(torch.rand(1, 3, 33, 64))]
    assert sizes == [(24, 9, 16), (32, 5, 8), (96, 5, 8), (320, 5, 8)]


def test_only_the_first_block_of_a_stage_is_dilated():
    dilations = [block.conv[1].conv.dilation[0] for block in backbone(**DILATED).layer6]
    assert dilations == [4, 1, 1]


def test_timms_weights_compute_timms_features():
    torch.manual_seed(0)
    peer = timm.create_model("mobilenetv2_100").eval()
    for parameter in peer.parameters():
        # Norms that are not the identity, so that each one counts.
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    ours = nn.Module()
    ours.backbone = backbone(**PLAIN)
    arrays = {key: value.numpy() for key, value in peer.state_dict().items()}
    load_arrays(ours, arrays, rules=ours.backbone.key_rules()["timm"])
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        theirs = peer.forward_intermediates(image, intermediates_only=True)
        mine = ours.backbone(image)
    # timm's levels are strides: 2, 4, 8, 16 and 32.
    for feature, wanted in ((mine[0], theirs[1]), (mine[1], theirs[2]), (mine[3], theirs[4])):
        torch.testing.assert_close(feature, wanted, atol=1e-5, rtol=1e-4)
