import pytest
import torch
from torch import nn

from segmill.errors import SegmillError
from segmill.models.families.dnlnet import DisentangledNonLocal2d, DNLHead
from segmill.models.families.gcnet import ContextBlock, GCHead
from segmill.models.families.nonlocal_net import NLHead, NonLocal2d

SIZES = {"in_channels": [6], "in_index": 0, "channels": 8, "dropout": 0.1, "num_classes": 3}
BLOCKS = {
    "non-local": NonLocal2d(8, 4, mode="embedded_gaussian", use_scale=True),
    "disentangled": DisentangledNonLocal2d(8, 4, use_scale=True, temperature=0.05),
    "context": ContextBlock(8, 2, pooling_type="att", fusion_types=["channel_add"]),
}


def randomised(block):
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block.eval()


def flat(convolution, feature):
    return convolution(feature).flatten(2)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_block_starts_as_the_identity(block):
    feature = torch.rand(2, 8, 5, 4)
    torch.testing.assert_close(block.eval()(feature), feature, atol=0, rtol=0)


@pytest.mark.parametrize(
    "head",
    [
        GCHead(ratio=0.25, pooling_type="att", fusion_types=["channel_add"], **SIZES),
        NLHead(reduction=2, mode="dot_product", use_scale=False, **SIZES),
        DNLHead(reduction=2, use_scale=True, temperature=0.05, **SIZES),
    ],
)
def test_a_head_keeps_the_size_and_trains_every_parameter(head):
    feature = torch.rand(2, 6, 5, 7)
    assert head.hidden([feature]).shape == (2, 8, 5, 7)
    logits = head([feature])
    assert logits.shape == (2, 3, 5, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize(("use_scale", "scale"), [(True, 0.5), (False, 1.0)])
@torch.no_grad()
def test_non_local_attention_is_a_softmax_over_all_positions(use_scale, scale):
    block = randomised(NonLocal2d(8, 4, mode="embedded_gaussian", use_scale=use_scale))
    feature = torch.rand(2, 8, 3, 4)
    products = flat(block.theta, feature).transpose(1, 2) @ flat(block.phi, feature)
    context = flat(block.g, feature) @ (scale * products).softmax(dim=2).transpose(1, 2)
    wanted = feature + block.conv_out(context.unflatten(2, (3, 4)))
    torch.testing.assert_close(block(feature), wanted)


@torch.no_grad()
def test_non_local_products_are_divided_by_the_number_of_positions():
    block = randomised(NonLocal2d(8, 4, mode="dot_product", use_scale=False))
    feature = torch.rand(2, 8, 3, 4)
    products = flat(block.theta, feature).transpose(1, 2) @ flat(block.phi, feature) / 12
    context = flat(block.g, feature) @ products.transpose(1, 2)
    wanted = feature + block.conv_out(context.unflatten(2, (3, 4)))
    torch.testing.assert_close(block(feature), wanted)


def test_a_scale_without_a_softmax_is_refused():
    with pytest.raises(SegmillError, match="use_scale"):
        NonLocal2d(8, 4, mode="dot_product", use_scale=True)


@torch.no_grad()
def test_disentangled_attention_ignores_what_all_positions_share():
    block = randomised(DisentangledNonLocal2d(8, 4, use_scale=True, temperature=0.05))
    feature = torch.rand(2, 8, 3, 4)
    before = block(feature)
    for embedding in (block.theta, block.phi):
        embedding.conv.bias.add_(1.0)
    # The temperature makes products 20 times larger, and with them their rounding.
    torch.testing.assert_close(block(feature), before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_unary_term_is_one_vector_for_all_positions():
    block = randomised(DisentangledNonLocal2d(8, 4, use_scale=True, temperature=0.05))
    for embedding in (block.theta, block.phi):
        embedding.conv.weight.zero_()
    feature = torch.rand(1, 8, 3, 4)
    value, mask = flat(block.g, feature), flat(block.conv_mask, feature).softmax(dim=2)
    context = value.mean(dim=2) + (value * mask).sum(dim=2)
    wanted = feature + block.conv_out(context[:, :, None, None])
    torch.testing.assert_close(block(feature), wanted)


@torch.no_grad()
def test_global_context_multiplies_before_it_adds():
    fusions = ["channel_add", "channel_mul"]
    block = randomised(ContextBlock(8, 2, pooling_type="avg", fusion_types=fusions))
    feature = torch.rand(2, 8, 3, 4)
    mean = feature.mean(dim=(2, 3), keepdim=True)
    wanted = feature * block.channel_mul_conv(mean).sigmoid() + block.channel_add_conv(mean)
    torch.testing.assert_close(block(feature), wanted)


@torch.no_grad()
def test_global_context_attends_where_its_mask_is_high():
    block = randomised(ContextBlock(8, 2, pooling_type="att", fusion_types=["channel_add"]))
    feature = torch.rand(1, 8, 3, 4)
    feature[..., 1, 2] = 1000 * block.conv_mask.weight[0, :, 0, 0]
    torch.testing.assert_close(block.context(feature)[..., 0, 0], feature[..., 1, 2])
