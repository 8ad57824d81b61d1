import torch
from torch import nn

from segmill.models.families.vit_upernet import MultiLevelNeck


@torch.no_grad()
def test_equal_maps_become_a_pyramid():
    neck = MultiLevelNeck(in_channels=(3, 3, 3, 3), channels=5, scales=(4.0, 2.0, 1.0, 0.5))
    levels = neck([torch.rand(1, 3, 6, 7) for _ in range(4)])
    sizes = [tuple(level.shape[1:]) for level in levels]
    assert sizes == [(5, 24, 28), (5, 12, 14), (5, 6, 7), (5, 3, 3)]


@torch.no_grad()
def test_an_odd_size_is_halved_by_pairs_of_pixels():
    neck = MultiLevelNeck(in_channels=(1,), channels=1, scales=(0.5,))
    nn.init.dirac_(neck.lateral_convs[0].conv.weight)
    nn.init.dirac_(neck.convs[0].conv.weight)
    row = torch.arange(5.0).expand(1, 1, 5, 5)
    (halved,) = neck([row])
    torch.testing.assert_close(halved, torch.tensor([0.5, 2.5]).expand(1, 1, 2, 2))
