"""ViT-Adapter at a tiny size; loading from timm's ViT."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from segmill.checkpoint.load import load_arrays
from segmill.models.backbones.vit_adapter import ViTAdapter

SIZES = {"depth": 4, "num_heads": 2, "mlp_ratio": 2}


def adapter(**changes):
    torch.manual_seed(0)
    settings = {
        "name": "",
        "in_channels": 3,
        "image_size": 64,
        "channels": 16,
        "drop_path_rate": 0.0,
        "stem_channels": 4,
        "deform_heads": 2,
        "deform_points": 3,
        "deform_ratio": 0.5,
        "ffn_ratio": 0.25,
        **SIZES,
    }
    return ViTAdapter(**(settings | changes)).eval()


def last_tokens(backbone, image):
    """What the last block of the ViT returns."""
    found = []
    hook = backbone.blocks[-1].register_forward_hook(lambda *call: found.append(call[2]))
    backbone(image)
    hook.remove()
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (61, 75), (33, 32), (1, 5)])
def test_maps_cover_an_image_of_any_size(size):
    backbone = adapter()
    maps = backbone(torch.randn(1, 3, *size))
    wanted = [tuple(-(-side // stride) for side in size) for stride in backbone.strides]
    assert [tuple(each.shape) for each in maps] == [(1, 16, *shape) for shape in wanted]


@torch.no_grad()
def test_an_odd_size_is_padded_with_zeros():
    backbone, image = adapter(), torch.randn(1, 3, 61, 75)
    padded = nn.functional.pad(image, (0, 21, 0, 3))
    for cut, whole in zip(backbone(image), backbone(padded), strict=True):
        assert torch.equal(cut, whole[..., : cut.shape[2], : cut.shape[3]])


@torch.no_grad()
def test_an_untrained_adapter_leaves_the_vit_as_it_is():
    backbone, image = adapter(), torch.randn(2, 3, 64, 64)
    patches = backbone.patch_embed(image).flatten(2).transpose(1, 2)
    plain = backbone.blocks(patches + backbone.pos_embed[:, 1:])
    assert torch.equal(last_tokens(backbone, image), plain)
    for interaction in backbone.interactions:
        nn.init.ones_(interaction.injector.gamma)
    assert not torch.allclose(last_tokens(backbone, image), plain, atol=0.01)


def test_every_parameter_gets_a_gradient():
    backbone = adapter().train()
    with torch.no_grad():
        for parameter in backbone.parameters():  # a weight of 0 lets nothing through
            parameter += 0.1 * torch.randn_like(parameter)
    maps = backbone(torch.randn(2, 3, 64, 96))
    # The sum of a normalised map is constant.
    sum((each * torch.randn_like(each)).sum() for each in maps).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert backbone.pos_embed.grad[:, 0].abs().max() == 0  # nobody sees the class token


@torch.no_grad()
@pytest.mark.parametrize("distilled", [False, True])
def test_timms_weights_compute_timms_tokens(distilled):
    name = "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224"
    theirs = timm.create_model(name, img_size=64, embed_dim=16, num_classes=5, **SIZES).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    network = nn.Module()
    network.backbone = adapter()
    arrays = {key: value.numpy() for key, value in theirs.state_dict().items()}
    own = r"backbone\.(spm|interactions|up|norm\d|level_embed).*"
    load_arrays(network, arrays, rules=network.backbone.key_rules()["timm"], may_miss=[own])
    image = torch.randn(1, 3, 64, 64)
    tokens = theirs.patch_embed(image) + theirs.pos_embed[:, -16:]
    torch.testing.assert_close(last_tokens(network.backbone, image), theirs.blocks(tokens))


@torch.no_grad()
def test_a_stored_position_embedding_is_brought_to_the_networks_size():
    network = nn.Module()
    network.backbone = adapter()
    stored = np.ones((1, 1 + 6 * 6, 16), np.float32)
    stored[:, 0] = 7.0
    rules = network.backbone.key_rules()["timm"]
    load_arrays(network, {"pos_embed": stored}, rules=rules, may_miss=[r".*"])
    torch.testing.assert_close(network.backbone.pos_embed[:, 1:], torch.ones(1, 16, 16))


def test_the_names_are_the_published_ones():
    keys = set(adapter().state_dict())
    assert {
        "pos_embed",
        "level_embed",
        "patch_embed.proj.weight",
        "blocks.3.attn.qkv.bias",
        "blocks.0.mlp.fc2.weight",
        "spm.stem.7.running_var",
        "spm.conv4.0.weight",
        "spm.fc1.bias",
        "interactions.0.injector.gamma",
        "interactions.1.injector.attn.sampling_offsets.weight",
        "interactions.2.extractor.ffn.dwconv.dwconv.weight",
        "interactions.3.extra_extractors.1.attn.output_proj.bias",
        "up.weight",
        "norm4.running_mean",
    } <= keys
    assert not any("interactions.2.extra_" in key for key in keys)
