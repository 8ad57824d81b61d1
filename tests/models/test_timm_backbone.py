import gate
import numpy as np
import pytest
import timm
import torch
from torch import nn

from segmill.checkpoint.keys import apply_rules
from segmill.checkpoint.load import load_arrays
from segmill.errors import SegmillError
from segmill.models.backbones.timm_backbone import TimmBackbone

CONVNEXT = "model/backbone@model.network.backbone=convnext_tiny"


def backbone(name, **changes):
    settings = {"in_channels": 3, "out_indices": [0, 1, 2, 3], "output_stride": 32, "options": {}}
    return TimmBackbone(name=name, **(settings | changes))


def test_convnext_stands_under_upernet():
    network = gate.build("upernet_r50", CONVNEXT, num_classes=5)
    image = torch.rand(1, 3, 64, 96)
    label = torch.randint(0, 5, (1, 64, 96))
    assert network.eval()(image).shape == (1, 5, 16, 24)
    sum(
        network.train().losses(image.expand(2, -1, -1, -1), label.expand(2, -1, -1)).values()
    ).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_an_unknown_model_is_refused_with_close_names():
    with pytest.raises(SegmillError, match=r"has no model 'resnet5oc'.*resnet50c"):
        backbone("resnet5oc")


def test_a_dilated_resnet_says_its_strides():
    trunk = backbone("resnet18", out_indices=[1, 2, 3, 4], output_stride=8).eval()
    assert trunk.strides == (4, 8, 8, 8)
    sizes = [feature.shape[-2:] for feature in trunk(torch.rand(1, 3, 64, 64))]
    assert sizes == [(16, 16), (8, 8), (8, 8), (8, 8)]


def test_channels_last_features_come_out_channels_first():
    options = {"strict_img_size": False, "embed_dim": 24, "num_heads": [1, 2, 4, 8]}
    trunk = backbone("swin_tiny_patch4_window7_224", options=options).eval()
    features = trunk(torch.rand(1, 3, 64, 96))
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (24, 16, 24),
        (48, 8, 12),
        (96, 4, 6),
        (192, 2, 3),
    ]


def test_depth_is_a_fourth_input_channel():
    trunk = backbone("resnet18", in_channels=4, out_indices=[4])
    assert trunk(torch.rand(2, 4, 32, 32))[0].shape == (2, 512, 1, 1)


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_every_weight_of_mmsegmentations_resnets_has_a_place(depth):
    with torch.device("meta"):
        network = gate.build(f"upernet_r{depth}")
    ours = [key for key in network.state_dict() if key.startswith("backbone.")]
    theirs = [
        key.replace("trunk.conv1.", "stem.").replace("trunk.bn1.", "stem.7.").replace("trunk.", "")
        for key in ours
    ]
    arrays = dict.fromkeys(theirs, np.zeros(1))
    assert list(apply_rules(arrays, network.key_rules()["mmseg"])) == ours


@pytest.mark.parametrize(
    ("name", "levels", "left"),
    [
        ("resnet18", [1, 2, 3, 4], r"fc\..+"),
        ("convnext_atto", [0, 1, 2, 3], r"head\..+"),
        ("efficientnet_b0", [1, 2, 3, 4], r"(conv_head|bn2|classifier)\..+"),
        ("vit_tiny_patch16_224", [5, 11], r"(norm|head)\..+"),
    ],
)
def test_only_the_classifier_of_timms_own_weights_is_left_over(name, levels, left):
    network = nn.Module()
    network.backbone = backbone(name, out_indices=levels)
    arrays = {key: value.numpy() for key, value in timm.create_model(name).state_dict().items()}
    rules = network.backbone.key_rules()["timm"]
    report = load_arrays(network, arrays, rules=rules, may_leave=[left])
    first = next(iter(arrays))
    loaded = dict(network.named_parameters())[next(iter(report.loaded))]
    assert torch.equal(loaded, torch.from_numpy(arrays[first]))


def test_frozen_norms_keep_their_scale_but_not_their_statistics():
    trunk = backbone("resnet18", frozen=[r"(.+\.)?bn\d\..+"]).train()
    trunk(torch.rand(2, 3, 32, 32))
    assert not trunk.trunk.bn1.weight.requires_grad
    assert trunk.trunk.conv1.weight.requires_grad
    assert trunk.trunk.bn1.running_mean.any()


def test_a_frozen_pattern_that_matches_nothing_is_refused():
    with pytest.raises(SegmillError, match=r"'norm1' of backbone.frozen.*conv1.weight"):
        backbone("resnet18", frozen=["norm1"])


def test_norm_eval_keeps_the_statistics():
    trunk = backbone("resnet18", norm_eval=True).train()
    trunk(torch.rand(2, 3, 32, 32))
    assert not trunk.trunk.bn1.running_mean.any()
    assert trunk.trunk.layer1.training
