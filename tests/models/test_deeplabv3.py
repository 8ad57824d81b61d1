import torch

from segmill.models.families.deeplabv3 import ASPPHead

SIZES = {"in_index": 0, "channels": 6, "dropout": 0.1, "num_classes": 3}


def test_the_logits_are_the_classified_hidden_map():
    head = ASPPHead(in_channels=[4], dilations=[1, 2], **SIZES).eval()
    feature = torch.rand(2, 4, 5, 7)
    hidden = head.hidden([feature])
    assert hidden.shape == (2, 6, 5, 7)
    torch.testing.assert_close(head([feature]), head.conv_seg(hidden))


def test_a_branch_without_dilation_sees_one_pixel_the_others_their_neighbours():
    head = ASPPHead(in_channels=[4], dilations=[1, 3], **SIZES)
    kernels = [branch.conv.kernel_size for branch in head.aspp_modules]
    assert kernels == [(1, 1), (3, 3)]
    assert head.aspp_modules[1].conv.dilation == (3, 3)


def test_the_image_pool_gives_every_pixel_the_average():
    head = ASPPHead(in_channels=[4], dilations=[1], **SIZES).eval()
    head.bottleneck.conv.weight.data[:, 6:] = 0.0  # only the pool
    hidden = head.hidden([torch.rand(1, 4, 9, 9)])
    inside = hidden[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inside, inside[:, :, :1, :1].expand_as(inside))
