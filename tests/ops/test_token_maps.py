"""Maps of tokens as kernels read them."""

import torch

from segmill.ops.token_maps import readable


def test_maps_whose_pixels_lie_at_one_distance_are_read_where_they_are():
    wide = torch.randn(2, 3, 4, 10)
    for tokens in (wide, wide[..., 2:7], torch.randn(2, 5, 3, 4).permute(0, 2, 3, 1).contiguous()):
        assert readable(tokens) is tokens


def test_other_maps_are_copied():
    wide = torch.randn(2, 3, 4, 10)
    channels_first = torch.randn(2, 10, 3, 4).permute(0, 2, 3, 1)
    for tokens in (wide[:, :2], wide[:, :, 1:], wide[..., ::2], channels_first):
        found = readable(tokens)
        assert found.is_contiguous()
        assert torch.equal(found, tokens)
