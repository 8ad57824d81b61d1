import numpy as np
import pytest
import timm
import torch
from torch import nn

from segmill.checkpoint import pretrained
from segmill.checkpoint.load import choose_rules, load_arrays, load_weights
from segmill.checkpoint.storage import CheckpointError
from segmill.models.backbones.vit import VisionTransformer

SIZES = {"depth": 3, "num_heads": 2}


def vit(**changes):
    settings = {
        "name": "",
        "in_channels": 3,
        "image_size": (32, 32),
        "patch_size": 8,
        "channels": 16,
        "mlp_ratio": 4,
        "out_indices": (0, 2),
        "drop_path_rate": 0.0,
        "norm_eps": 1e-6,
        "with_cls_token": True,
        "output_cls_token": False,
        "patch_bias": True,
        "patch_norm": False,
        "final_norm": True,
        "interpolate_mode": "bicubic",
        **SIZES,
    }
    return VisionTransformer(**(settings | changes)).eval()


def peer(image_size: int, **options):
    """timm's ViT of the same size, with weights that all matter."""
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=image_size,
        patch_size=8,
        embed_dim=16,
        num_classes=5,
        **SIZES,
        **options,
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def in_network(backbone: VisionTransformer) -> nn.Module:
    network = nn.Module()
    network.backbone = backbone
    network.key_rules = backbone.key_rules
    return network


def arrays_of(network: nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    return {prefix + key: value.numpy() for key, value in network.state_dict().items()}


@torch.no_grad()
def test_timms_weights_compute_timms_features():
    theirs, ours = peer(32), in_network(vit())
    load_arrays(ours, arrays_of(theirs), rules=ours.backbone.key_rules()["timm"])
    image = torch.rand(2, 3, 32, 32)
    wanted = theirs.forward_intermediates(image, indices=[0], intermediates_only=True)
    first, last = ours.backbone(image)
    # float32, attention summed in another order.
    torch.testing.assert_close(first, wanted[0], atol=2e-5, rtol=1e-5)
    normed = theirs.forward_features(image)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(last, normed, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_another_image_size_gets_an_interpolated_position_embedding():
    theirs, ours = peer(32), in_network(vit())
    load_arrays(ours, arrays_of(theirs), rules=ours.backbone.key_rules()["timm"])
    patches = theirs.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    larger = peer(48)
    larger.load_state_dict(theirs.state_dict() | {"pos_embed": larger.pos_embed})
    resized = nn.functional.interpolate(patches, (6, 6), mode="bicubic", align_corners=False)
    larger.pos_embed.copy_(torch.cat([theirs.pos_embed[:, :1].mT, resized.flatten(2)], 2).mT)
    image = torch.rand(1, 3, 48, 48)
    wanted = larger.forward_features(image)[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    torch.testing.assert_close(ours.backbone(image)[-1], wanted, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_loaded_position_embedding_is_brought_to_the_networks_size():
    network = in_network(vit())
    stored = np.ones((1, 5, 16), np.float32)
    stored[:, 0] = 7.0
    rules = network.backbone.key_rules()["timm"]
    load_arrays(network, {"pos_embed": stored}, rules=rules, may_miss=[r".*"])
    loaded = network.backbone.pos_embed
    torch.testing.assert_close(loaded[:, 0], torch.full((1, 16), 7.0))
    # What is constant stays so: the class token does not leak into the patches.
    torch.testing.assert_close(loaded[:, 1:], torch.ones(1, 16, 16))


@torch.no_grad()
def test_the_image_is_padded_with_zeros_to_whole_patches():
    network, image = vit(), torch.rand(1, 3, 29, 43)
    padded = nn.functional.pad(image, (0, 5, 0, 3))
    torch.testing.assert_close(network(image), network(padded))
    assert [tuple(feature.shape) for feature in network(image)] == [(1, 16, 4, 6)] * 2


@torch.no_grad()
def test_without_the_class_token_only_patches_attend():
    network, image = vit(with_cls_token=False), torch.rand(1, 3, 32, 32)
    before = network(image)
    network.cls_token += 1
    torch.testing.assert_close(network(image), before, atol=0, rtol=0)


@torch.no_grad()
def test_class_tokens_follow_the_maps_when_asked_for():
    network = vit(output_cls_token=True, final_norm=False)
    network.layers = nn.ModuleList(nn.Identity() for _ in network.layers)
    *maps, first, last = network(torch.rand(1, 3, 32, 32))
    assert [tuple(feature.shape) for feature in maps] == [(1, 16, 4, 4)] * 2
    untouched = (network.cls_token + network.pos_embed[:, :1]).mT[..., None]
    torch.testing.assert_close([first, last], [untouched, untouched])
    assert len(network.channels) == 4


@torch.no_grad()
def test_the_final_norm_is_the_last_blocks_alone():
    first, last = vit()(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(last.mean(1), torch.zeros(1, 4, 4), atol=1e-6, rtol=0)
    assert first.mean(1).abs().max() > 1e-4


def test_stochastic_depth_grows_to_its_rate():
    rates = [layer.drop_path.rate for layer in vit(drop_path_rate=0.2).layers]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2], atol=1e-6)


def test_mmpretrains_encoder_is_recognised_and_fits():
    network = in_network(vit(image_size=(48, 48)))
    renamed = {
        "backbone."
        + key.replace("attn.attn.in_proj_", "attn.qkv.").replace(
            "attn.attn.out_proj", "attn.proj"
        ): value
        for key, value in arrays_of(vit()).items()
    }
    arrays = renamed | {"head.layers.head.weight": np.zeros((5, 16))}
    origin, rules = choose_rules(network, arrays)
    assert origin == "mmpretrain"
    report = load_arrays(network, arrays, rules=rules)
    assert report.problems == 0


def test_timms_names_inside_an_old_checkpoint_are_recognised():
    network = in_network(vit())
    arrays = {
        key: value
        for key, value in arrays_of(peer(32), prefix="backbone.").items()
        if "head" not in key
    }
    origin, rules = choose_rules(network, arrays)
    assert origin == "timm"
    load_arrays(network, arrays, rules=rules)


def test_a_bias_of_the_patches_is_not_dropped_in_silence():
    network = in_network(vit(patch_bias=False))
    arrays = arrays_of(vit(), prefix="backbone.")
    _, rules = choose_rules(network, arrays)
    with pytest.raises(CheckpointError, match=r"patch_embed\.projection\.bias"):
        load_arrays(network, arrays, rules=rules)


def test_weights_timm_fills_the_whole_backbone(monkeypatch):
    arrays = arrays_of(peer(24))
    monkeypatch.setattr(pretrained, "timm_weights", lambda module: arrays)
    network = in_network(vit())
    report = load_weights(network, "timm")
    assert set(report.loaded) == {key for key, _ in network.named_parameters()}
