import pytest
import torch
import torch.nn.functional as F

from segmill.models.families.isanet import ISAHead


def head():
    torch.manual_seed(0)
    return ISAHead(
        in_channels=[3],
        in_index=0,
        channels=4,
        isa_channels=2,
        down_factor=(2, 4),
        dropout=0.1,
        num_classes=3,
    ).eval()


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1)])
def test_any_size_is_kept(size):
    assert head()([torch.rand(2, 3, *size)]).shape == (2, 3, *size)


@torch.no_grad()
def test_a_map_that_blocks_do_not_divide_is_padded_on_both_sides():
    feature, isa = torch.rand(1, 4, 5, 9), head()
    # 5 -> 6 rows: the odd one goes below; 9 -> 12 columns: one to the left, two to the right.
    padded = isa.related(F.pad(feature, (1, 2, 0, 1)))
    torch.testing.assert_close(isa.related(feature), padded[..., :5, 1:10])


def test_both_attentions_together_connect_every_pair_of_positions():
    feature = torch.rand(1, 4, 6, 8, requires_grad=True)
    head().related(feature)[0, :, 3, 5].sum().backward()
    assert (feature.grad.abs().sum(dim=1) > 0).all()


@torch.no_grad()
def test_blocks_of_one_position_and_of_the_whole_map_leave_dense_attention():
    isa, feature = head(), torch.rand(1, 4, 4, 6)
    isa.down_factor = (1, 1)
    single = isa.global_relation(feature)
    wanted = isa.local_relation(single.permute(0, 2, 3, 1).reshape(24, 4, 1, 1))
    wanted = wanted.reshape(1, 4, 6, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(isa.related(feature), wanted)
