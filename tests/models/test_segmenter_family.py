import torch

from segmill.models.families.segmenter import SegmenterMaskTransformerHead


def head(**changes):
    settings = {
        "in_channels": (6,),
        "in_index": 0,
        "channels": 8,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 4,
        "drop_path_rate": 0.1,
        "num_classes": 5,
    }
    return SegmenterMaskTransformerHead(**(settings | changes)).eval()


@torch.no_grad()
def test_logits_are_normalised_over_classes():
    logits = head()([torch.rand(2, 6, 3, 4)])
    assert logits.shape == (2, 5, 3, 4)
    torch.testing.assert_close(logits.mean(1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_are_cosine_similarities_before_their_norm():
    network, feature = head(), [torch.rand(1, 6, 3, 4)]
    before = network(feature)
    network.patch_proj.weight *= 3
    network.classes_proj.weight *= 0.5
    torch.testing.assert_close(network(feature), before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_patch_sees_every_other():
    network, feature = head(), torch.rand(1, 6, 3, 4)
    # At its start a block adds almost nothing.
    torch.nn.init.normal_(network.layers[0].attn["attn"].out_proj.weight)
    before = network([feature])
    feature[..., 0, 0] += 1.0
    assert ((network([feature]) - before).abs().amax(1)[0] > 1e-6).all()


def test_stochastic_depth_of_the_decoder_starts_at_zero():
    assert [round(layer.drop_path.rate, 6) for layer in head().layers] == [0.0, 0.1]
