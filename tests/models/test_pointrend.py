from functools import partial

import torch

from segmill.models.families.pointrend import PointHead, PointRend, sample, uncertainty
from segmill.models.families.sem_fpn import FPN, FPNHead

SIZES = {
    "in_index": [0],
    "channels": 8,
    "num_layers": 3,
    "training_points": 16,
    "oversampling": 3,
    "uncertain_share": 0.75,
    "subdivisions": 2,
    "subdivision_points": 20,
    "dropout": 0.0,
    "num_classes": 3,
}


class Backbone(torch.nn.Module):
    channels, strides = (3, 6), (4, 8)

    def forward(self, image):
        return [image[..., ::4, ::4], image[..., ::8, ::8].repeat(1, 2, 1, 1)]

    def key_rules(self):
        return {"mmseg": ()}


def pointrend():
    return PointRend(
        backbone=Backbone(),
        neck=partial(FPN, channels=8),
        coarse_head=partial(FPNHead, channels=8, dropout=0.0, num_classes=3),
        decode_head=partial(PointHead, **SIZES),
        class_weight=None,
    )


def test_a_point_at_a_pixels_centre_has_its_value():
    feature = torch.rand(1, 2, 4, 8)
    points = torch.tensor([[[(5 + 0.5) / 8, (2 + 0.5) / 4]]])
    torch.testing.assert_close(sample(feature, points)[0, :, 0], feature[0, :, 2, 5])


def test_a_tie_is_least_certain():
    logits = torch.tensor([[5.0, 1.0, 0.0], [5.0, 0.0, 4.0], [0.0, 0.0, 9.0]]).T[None]
    assert uncertainty(logits).tolist() == [[-4.0, -1.0, -9.0]]


def test_only_uncertain_pixels_get_new_logits():
    torch.manual_seed(0)
    head = PointHead(in_channels=[4], **(SIZES | {"subdivisions": 1})).eval()
    coarse, features = torch.rand(1, 3, 5, 6), [torch.rand(1, 4, 10, 12)]
    coarse[:, 0, :, :3] += 9  # the left half is certain
    with torch.no_grad():
        refined = head.refine(features, coarse)
    plain = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")
    changed = (refined != plain).any(1)[0]
    assert changed.sum() == 20
    assert not changed[:, :4].any()


def test_a_small_map_is_classified_anew_everywhere():
    torch.manual_seed(0)
    head = PointHead(in_channels=[4], **(SIZES | {"subdivision_points": 10_000})).eval()
    coarse, features = torch.rand(1, 3, 3, 5), [torch.rand(1, 4, 12, 20)]
    with torch.no_grad():
        refined = head.refine(features, coarse)
        rows, columns = torch.arange(12) + 0.5, torch.arange(20) + 0.5
        x, y = columns.repeat(12) / 20, rows.repeat_interleave(20) / 12
        wanted = head(features, coarse, torch.stack([x, y], dim=1)[None])
    torch.testing.assert_close(refined.flatten(2), wanted)


def test_training_points_are_those_of_the_seed_and_mostly_uncertain():
    head, coarse = PointHead(in_channels=[4], **SIZES), torch.rand(2, 3, 6, 6)
    coarse[:, 0, :, :3] += 9
    torch.manual_seed(1)
    points = head.draw_points(coarse)
    torch.manual_seed(1)
    candidates, random = torch.rand(2, 48, 2), torch.rand(2, 4, 2)
    torch.testing.assert_close(points[:, 12:], random)
    assert (points[:, :12, 0] > 0.45).all()
    assert torch.isin(points[:, :12], candidates).all()


def test_logits_are_as_fine_as_the_image_and_losses_as_the_original_names_them():
    torch.manual_seed(0)
    network = pointrend()
    image, label = torch.rand(2, 3, 64, 48), torch.randint(0, 3, (2, 64, 48))
    assert network(image).shape == (2, 3, 64, 48)
    terms = network.losses(image, label)
    assert list(terms) == ["decode_0.loss_ce", "decode_1.pointloss_ce"]
    sum(terms.values()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_points_on_ignored_pixels_cost_nothing():
    network = pointrend().eval()
    ignored = torch.full((1, 32, 32), 255)
    with torch.no_grad():
        terms = network.losses(torch.rand(1, 3, 32, 32), ignored)
    assert terms["decode_1.pointloss_ce"] == 0
