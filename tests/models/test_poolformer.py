"""PoolFormer's trunk. The original's numbers are in test_parity.py."""

import gate
import pytest
import torch
from timm.models.metaformer import GroupNorm1, MetaFormer
from torch import nn

from segmill.checkpoint.load import load_arrays
from segmill.models.backbones.poolformer import PoolFormer

# Millions of parameters with Semantic FPN as the paper gives them, but for S24.
MILLIONS = {"s12": 15.7, "s24": 25.1, "s36": 34.6, "m36": 59.8, "m48": 77.1}
SIZES = {"channels": [8, 16, 20, 24], "depths": [1, 2, 1, 1], "mlp_ratio": 4}


def poolformer() -> PoolFormer:
    return PoolFormer(name="", in_channels=3, layer_scale=0.5, drop_path_rate=0.0, **SIZES)


@pytest.mark.parametrize("size", MILLIONS)
def test_sizes_are_the_published_ones(size):
    with torch.device("meta"):
        network = gate.build(f"fpn_poolformer_{size}")
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert round(count, 1) == MILLIONS[size]


def test_only_the_stem_is_frozen():
    network = gate.build("fpn_poolformer_s12", num_classes=2)
    frozen = {name for name, each in network.named_parameters() if not each.requires_grad}
    assert frozen == {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}


def test_any_image_size_gives_maps_at_strides_4_8_16_32():
    with torch.no_grad():
        features = poolformer()(torch.rand(1, 3, 50, 71))
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (8, 12, 18),
        (16, 6, 9),
        (20, 3, 5),
        (24, 2, 3),
    ]


def test_timms_weights_compute_timms_features():
    torch.manual_seed(0)
    # As timm's poolformer_s12, which takes no other sizes.
    peer = MetaFormer(
        depths=SIZES["depths"],
        dims=SIZES["channels"],
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
        num_classes=0,
    ).eval()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, mean=0.5, std=0.5)
    ours = nn.Module()
    ours.backbone = poolformer().eval()
    arrays = {key: value.numpy() for key, value in peer.state_dict().items()}
    rules = ours.backbone.key_rules()["timm"]
    load_arrays(ours, arrays, rules=rules, may_miss=[r"backbone\.norm\d\..+"])
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        theirs = peer.forward_intermediates(image, intermediates_only=True)
        for feature, wanted in zip(ours.backbone(image), theirs, strict=True):
            # float32, the same operations; the features are normalised.
            torch.testing.assert_close(
                feature, nn.functional.group_norm(wanted, 1), atol=1e-5, rtol=0
            )
