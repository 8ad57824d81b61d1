from functools import partial

import gate
import numpy as np
import timm
import torch
from torch import nn

from segmill.checkpoint import pretrained
from segmill.checkpoint.keys import apply_rules
from segmill.checkpoint.load import load_arrays, load_weights
from segmill.models.backbones.swin import SwinTransformer, join_windows, same_region, split_windows
from segmill.models.encoder_decoder import EncoderDecoder
from segmill.models.families.upernet import UPerHead

SIZES = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}


def swin(**changes):
    settings = {
        "name": "",
        "in_channels": 3,
        "window": 7,
        "mlp_ratio": 4,
        "drop_path_rate": 0.0,
        **SIZES,
    }
    return SwinTransformer(**(settings | changes))


def test_windows_are_rejoined_to_the_same_map():
    tokens = torch.rand(2, 6, 9, 4)
    windows = split_windows(tokens, 3)
    assert windows.shape == (2, 6, 9, 4)
    torch.testing.assert_close(windows[0, 1].reshape(3, 3, 4), tokens[0, :3, 3:6])
    torch.testing.assert_close(join_windows(windows, 3, 6, 9), tokens)


def test_only_the_last_windows_see_a_seam_after_the_shift():
    same = same_region(6, 9, 3, torch.device("cpu"))
    assert same[:2].all()  # windows (0, 0) and (0, 1)
    assert not same[2].all()  # last column
    assert not same[3].all()  # last row


def test_any_image_size_gives_maps_at_strides_4_8_16_32():
    with torch.no_grad():
        features = swin().eval()(torch.rand(1, 3, 50, 71))
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (24, 13, 18),
        (48, 7, 9),
        (96, 4, 5),
        (192, 2, 3),
    ]


def test_stochastic_depth_grows_to_its_rate():
    blocks = [block for stage in swin(drop_path_rate=0.3).stages for block in stage.blocks]
    rates = [block.drop_path.rate for block in blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 8), atol=1e-6)


def test_timms_weights_compute_timms_features():
    torch.manual_seed(0)
    # Without `always_partition`, timm does not shift a map of one window.
    options = {"num_classes": 0, "always_partition": True, **SIZES}
    peer = timm.create_model("swin_tiny_patch4_window7_224", **options).eval()
    for name, parameter in peer.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    ours = torch.nn.Module()
    ours.backbone = swin().eval()
    arrays = {key: value.numpy() for key, value in peer.state_dict().items()}
    load_arrays(
        ours,
        arrays,
        rules=ours.backbone.key_rules()["timm"],
        may_miss=[r"backbone\.norm\d\..+"],
    )
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        theirs = peer.forward_intermediates(image, intermediates_only=True)
        for feature, wanted in zip(ours.backbone(image), theirs, strict=True):
            normed = nn.functional.layer_norm(wanted.movedim(1, -1), wanted.shape[1:2])
            # float32, attention summed in another order; the features are normalised.
            torch.testing.assert_close(feature.movedim(1, -1), normed, atol=2e-5, rtol=0)


def test_the_index_of_old_files_is_dropped():
    network = gate.build("swin-tiny-patch4-window7-in1k-pre_upernet", num_classes=2)
    key = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"
    assert apply_rules({key: np.zeros((49, 49))}, network.key_rules()["mmseg"]) == {}


def test_weights_timm_fills_the_backbone_but_for_its_output_norms(monkeypatch):
    peer = timm.create_model("swin_tiny_patch4_window7_224", **SIZES)
    arrays = {key: value.numpy() for key, value in peer.state_dict().items()}
    monkeypatch.setattr(pretrained, "timm_weights", lambda module: arrays)
    head = partial(UPerHead, channels=8, grids=[1], dropout=0.1, num_classes=3)
    network = EncoderDecoder(backbone=swin(), decode_head=head)
    report = load_weights(network, "timm")
    filled = {key for key, _ in network.backbone.named_parameters(prefix="backbone")}
    assert filled - set(report.loaded) == {
        f"backbone.norm{level}.{part}" for level in range(4) for part in ("weight", "bias")
    }
