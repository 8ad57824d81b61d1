"""Twins' trunks. The original's numbers for PCPVT are in test_parity.py."""

import gate
import numpy as np
import pytest
import timm
import torch
from torch import nn

from segmill.checkpoint.keys import apply_rules
from segmill.checkpoint.load import load_arrays
from segmill.models.backbones.twins import Twins, WindowAttention, inside_map

# Millions of parameters with Semantic FPN as the paper gives them (some cut, not rounded): with the
# trunk's classifier of 1000 classes, which segmentation leaves out.
FPN = {
    "pcpvt-s": 28.4,
    "pcpvt-b": 48.1,
    "pcpvt-l": 65.3,
    "svt-s": 28.3,
    "svt-b": 60.4,
    "svt-l": 103.7,
}
PCPVT = {
    "name": "",
    "in_channels": 3,
    "channels": [8, 16, 24, 32],
    "depths": [2, 3, 2, 2],
    "num_heads": [1, 2, 3, 4],
    "reductions": [8, 4, 2, 1],
    "mlp_ratios": [4, 4, 4, 4],
    "window": None,
    "drop_path_rate": 0.0,
}
SVT = PCPVT | {"window": 7}


@pytest.mark.parametrize("size", FPN)
def test_sizes_are_the_published_ones(size):
    with torch.device("meta"):
        network = gate.build(f"twins_{size}_fpn_fpnhead")
    count = sum(parameter.numel() for parameter in network.parameters())
    classifier = 1000 * network.backbone.channels[-1] + 1000
    assert (count + classifier) / 1e6 == pytest.approx(FPN[size], abs=0.1)


@pytest.mark.parametrize(
    ("variant", "rate"),
    [
        ("pcpvt-b_fpn_fpnhead", 0.2),
        ("pcpvt-b_uperhead", 0.3),
        ("svt-b_uperhead", 0.2),
    ],
)
def test_drop_path_acts_twice_on_what_the_original_drops_twice(variant, rate):
    with torch.device("meta"):
        network = gate.build(f"twins_{variant}")
    blocks = [block for stage in network.backbone.layers for block in stage]
    rates = np.linspace(0, rate, len(blocks))
    twice = 1 - (1 - rates) ** 2
    np.testing.assert_allclose([block.drop_ffn.rate for block in blocks], twice, atol=1e-7)
    local = [isinstance(block.attn, WindowAttention) for block in blocks]
    expected = np.where(local, rates, twice)
    np.testing.assert_allclose([b.drop_attention.rate for b in blocks], expected, atol=1e-7)


@pytest.mark.parametrize("settings", [PCPVT, SVT], ids=["pcpvt", "svt"])
def test_any_image_size_gives_maps_at_strides_4_8_16_32(settings):
    with torch.no_grad():
        features = Twins(**settings)(torch.rand(1, 3, 50, 71))
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (8, 13, 18),
        (16, 7, 9),
        (24, 4, 5),
        (32, 2, 3),
    ]


@pytest.mark.parametrize(("kind", "settings"), [("pcpvt", PCPVT), ("svt", SVT)])
def test_timms_weights_compute_timms_features(kind, settings):
    torch.manual_seed(0)
    same = {key: settings[key] for key in ("depths", "num_heads", "mlp_ratios")}
    sizes = {"embed_dims": settings["channels"], "num_classes": 0, **same}
    peer = timm.create_model(f"twins_{kind}_small", **sizes).eval()
    for name, parameter in peer.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    ours = nn.Module()
    ours.backbone = Twins(**settings).eval()
    arrays = {key: value.numpy() for key, value in peer.state_dict().items()}
    rules = ours.backbone.key_rules()["timm"]
    load_arrays(ours, arrays, rules=rules, may_miss=[r"backbone\.norm_list\..+"])
    # Outputs before their norm; and one eps, for timm's is 1e-6 outside of the attention.
    ours.backbone.norm_list = nn.ModuleList()
    for module in (*peer.modules(), *ours.modules()):
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    image = torch.rand(1, 3, 224, 224)  # maps are whole numbers of windows
    with torch.no_grad():
        theirs = peer.forward_intermediates(image, intermediates_only=True)
        for feature, wanted in zip(ours.backbone(image), theirs, strict=True):
            # float32; attention summed in another order, values up to about 10.
            torch.testing.assert_close(feature, wanted, atol=2e-5, rtol=1e-5)


def test_rules_from_timm_leave_nothing_over():
    for kind, settings in (("pcpvt", PCPVT), ("svt", SVT)):
        same = {key: settings[key] for key in ("depths", "num_heads", "mlp_ratios")}
        peer = timm.create_model(f"twins_{kind}_small", embed_dims=settings["channels"], **same)
        arrays = {key: value.numpy() for key, value in peer.state_dict().items()}
        backbone = Twins(**settings)
        wanted = {f"backbone.{key}" for key in backbone.state_dict() if "norm_list" not in key}
        assert set(apply_rules(arrays, backbone.key_rules()["timm"])) == wanted


def _as_the_original(attention: WindowAttention, tokens: torch.Tensor) -> torch.Tensor:
    """One map (h, w, D), window by window, with the original's mask written out."""
    side, (height, width, _) = attention.window, tokens.shape
    bottom, right = -height % side, -width % side
    padding = torch.zeros(height + bottom, width + right)
    padding[-bottom:] = 1  # all of it, where `bottom` is 0
    padding[:, -right:] = 1
    query, key, value = attention.qkv(nn.functional.pad(tokens, (0, 0, 0, right, 0, bottom))).chunk(
        3, dim=-1
    )
    mixed = torch.zeros_like(value)
    for top in range(0, height, side):
        for left in range(0, width, side):
            here = (slice(top, top + side), slice(left, left + side))
            flag = padding[here].flatten()
            mask = torch.where(flag[:, None] == flag, 0.0, -1000.0)
            q, k, v = (
                part[here].flatten(0, 1).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
                for part in (query, key, value)
            )
            weight = (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1)
            mixed[here] = (weight @ v).transpose(0, 1).flatten(1).view(*mixed[here].shape)
    return attention.proj(mixed[:height, :width])


@pytest.mark.parametrize("size", [(6, 9), (7, 9), (6, 10), (7, 10)])
def test_padding_is_hidden_only_when_both_axes_are_padded(size):
    torch.manual_seed(0)
    attention = WindowAttention(8, num_heads=2, window=3)
    tokens = torch.randn(1, size[0] * size[1], 8)
    with torch.no_grad():
        expected = _as_the_original(attention, tokens.view(*size, 8))
        torch.testing.assert_close(attention(tokens, size), expected.view_as(tokens))


def test_the_mask_covers_what_is_beyond_the_map():
    inside = inside_map((3, 5), 4, torch.device("cpu")).view(1, 2, 4, 4)
    assert inside[0, 0].sum() == 12
    assert inside[0, 1].tolist() == [[True, False, False, False]] * 3 + [[False] * 4]


def test_a_trunk_trained_on_imagenet_has_a_norm_and_a_classifier_too_many():
    keys = ["backbone.norm.weight", "backbone.norm.bias", "backbone.head.weight"]
    arrays = {key: np.zeros(1) for key in keys}
    assert apply_rules(arrays, Twins(**PCPVT).key_rules()["mmseg"]) == {}
