"""SeMask has no golden values: what its paper and its authors' code say of it."""

from functools import partial

import gate
import pytest
import timm
import torch
from torch import nn

from segmill.checkpoint.load import choose_rules, load_arrays
from segmill.models.backbones.semask_swin import SemanticAttention, SemanticLayer, SeMaskSwin
from segmill.models.backbones.swin import SwinTransformer
from segmill.models.encoder_decoder import EncoderDecoder
from segmill.models.families.sem_fpn import FPNHead
from segmill.models.families.semask import SeMaskHead

CLASSES = 5


@pytest.fixture
def network() -> EncoderDecoder:
    torch.manual_seed(0)
    trunk = SwinTransformer(
        name="swin_tiny_patch4_window7_224",
        in_channels=3,
        embed_dim=8,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 2, 4],
        window=3,
        mlp_ratio=2,
        drop_path_rate=0.1,
    )
    windows = [3, 3, None, None]
    head = partial(FPNHead, channels=6, dropout=0.1)
    return EncoderDecoder(
        backbone=SeMaskSwin(trunk=trunk, windows=windows, num_classes=CLASSES),
        decode_head=partial(SeMaskHead, head=head, prior_weight=0.4, num_classes=CLASSES),
    )


def test_any_image_size_gives_features_and_class_maps(network):
    with torch.no_grad():
        maps = network.eval().backbone(torch.rand(1, 3, 50, 71))
    sizes = [(13, 18), (7, 9), (4, 5), (2, 3)]
    assert [tuple(each.shape[2:]) for each in maps] == [*sizes, *sizes]
    assert [each.shape[1] for each in maps] == [8, 16, 32, 64, *[CLASSES] * 4]


def test_semantic_attention_starts_as_the_identity():
    tokens = torch.randn(2, 3, 4, 8)
    classes, masked = SemanticAttention(8, CLASSES)(tokens)
    torch.testing.assert_close(masked, tokens, atol=0, rtol=0)
    assert classes.shape == (2, 3, 4, CLASSES)


def test_semantic_attention_is_softmax_of_query_times_key_unscaled():
    torch.manual_seed(0)
    attention = SemanticAttention(8, CLASSES).eval()
    nn.init.ones_(attention.gamma)
    tokens = torch.randn(1, 1, 6, 8)
    query, key = attention.mlp_cls_q(tokens), attention.mlp_cls_k(tokens)
    weights = (query @ key.transpose(-2, -1)).softmax(-1)
    expected = tokens + attention.mlp_res(weights @ attention.mlp_v(tokens))
    torch.testing.assert_close(attention(tokens)[1], expected, atol=1e-6, rtol=0)  # float32


def test_a_token_of_a_window_does_not_see_other_windows():
    torch.manual_seed(0)
    layer = SemanticLayer(8, CLASSES, window=2).eval()
    nn.init.ones_(layer.class_injection[0].gamma)
    tokens = torch.randn(1, 4, 4, 8)
    changed = tokens.clone()
    changed[:, 2:] += 1 + torch.rand(1, 2, 4, 8)
    torch.testing.assert_close(layer(changed)[1][:, :2], layer(tokens)[1][:, :2], atol=0, rtol=0)
    whole = SemanticLayer(8, CLASSES, window=None).eval()
    nn.init.ones_(whole.class_injection[0].gamma)
    assert not torch.allclose(whole(changed)[1][:, :2], whole(tokens)[1][:, :2])


def test_every_parameter_learns(network):
    for layer in network.backbone.semantic_layers:
        nn.init.ones_(layer.class_injection[0].gamma)
    image, label = torch.rand(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64))
    losses = network.train().losses(image, label)
    assert set(losses) == {"decode.loss_ce", "decode.loss_cate"}
    sum(losses.values()).backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_the_authors_names_load(network):
    """Swin's own names, with `semantic_layer` in every stage; patches merged column by column."""
    theirs = {}
    for name, value in network.state_dict().items():
        renamed = name.replace("backbone.trunk.stages.", "backbone.layers.")
        renamed = renamed.replace(
            "backbone.trunk.patch_embed.projection", "backbone.patch_embed.proj"
        )
        renamed = renamed.replace("backbone.trunk.", "backbone.").replace("attn.w_msa", "attn")
        renamed = renamed.replace("ffn.layers.0.0", "mlp.fc1").replace("ffn.layers.1", "mlp.fc2")
        parts = renamed.split(".")
        if parts[1] == "semantic_layers":
            renamed = ".".join([parts[0], "layers", parts[2], "semantic_layer", *parts[3:]])
        theirs[renamed] = value.numpy()
    origin, rules = choose_rules(network, theirs)
    assert origin == "semask"
    assert load_arrays(network, theirs, rules=rules).problems == 0


def test_timms_swin_fills_all_but_the_semantic_layers_and_the_output_norms(network):
    peer = timm.create_model(
        "swin_tiny_patch4_window7_224",
        embed_dim=8,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 2, 4],
        window_size=3,
        mlp_ratio=2,
        img_size=96,
    )
    arrays = {key: value.numpy() for key, value in peer.state_dict().items()}
    report = load_arrays(
        network,
        arrays,
        rules=network.key_rules()["timm"],
        may_miss=[
            r"decode_head\..+",
            r"backbone\.semantic_layers\..+",
            r"backbone\.trunk\.norm\d\..+",
        ],
    )
    assert any(name.startswith("backbone.trunk.stages.3") for name in report.loaded)


@pytest.mark.parametrize(("size", "millions"), [("t", 35), ("s", 56), ("b", 96), ("l", 211)])
def test_it_has_the_published_size(size, millions):
    with torch.device("meta"):
        built = gate.build(f"semask_swin-{size}_fpn")
    assert round(sum(p.numel() for p in built.parameters()) / 1e6) == millions
