import torch
import torch.nn.functional as F

from segmill.models.families.setr import MLANeck, SETRMLAHead, SETRUPHead


def up_head(**changes):
    settings = {
        "in_channels": (6, 4),
        "in_index": 1,
        "channels": 8,
        "num_convs": 2,
        "kernel": 3,
        "up_scale": 2,
        "norm_eps": 1e-6,
        "dropout": 0.0,
        "num_classes": 3,
    }
    return SETRUPHead(**(settings | changes)).eval()


@torch.no_grad()
def test_every_convolution_is_followed_by_upsampling():
    features = [torch.rand(1, 6, 3, 5), torch.rand(1, 4, 3, 5)]
    assert up_head()(features).shape == (1, 3, 12, 20)
    assert up_head(num_convs=1, up_scale=4, kernel=1)(features).shape == (1, 3, 12, 20)


@torch.no_grad()
def test_the_scale_of_a_pixel_does_not_matter_to_the_up_head():
    # Channels apart, so that no pixel has next to no variance, where eps would count.
    apart = torch.rand(1, 4, 3, 5) + torch.arange(4.0).view(1, 4, 1, 1)
    head, features = up_head(), [torch.rand(1, 6, 3, 5), apart]
    scaled = [features[0], 7 * features[1] - 2]
    torch.testing.assert_close(head(scaled), head(features), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_neck_sums_from_the_last_map_to_the_first():
    neck = MLANeck(in_channels=(4, 4, 4), channels=5, norm_eps=1e-6).eval()
    features = [torch.rand(1, 4, 6, 6) for _ in range(3)]
    before = neck(features)
    after = neck([torch.rand(1, 4, 6, 6), *features[1:]])
    torch.testing.assert_close(after[:2], before[:2])
    assert not torch.allclose(after[2], before[2])
    assert neck.channels == (5, 5, 5)


@torch.no_grad()
def test_the_mla_head_puts_its_branches_side_by_side():
    head = SETRMLAHead(in_channels=(5, 5), channels=4, up_scale=4, dropout=0.0, num_classes=3)
    features = [torch.rand(1, 5, 3, 4), torch.rand(1, 5, 3, 4)]
    hidden = head.eval().hidden(features)
    assert hidden.shape == (1, 8, 12, 16)
    second = head.up_convs[1][:2](features[1])
    upsampled = F.interpolate(second, (12, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(hidden[:, 4:], upsampled)
