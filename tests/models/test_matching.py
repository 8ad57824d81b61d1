"""Matching and mask losses, each against its definition on small random masks."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import one_hot

from segmill.errors import SegmillError
from segmill.models import matching
from segmill.models.mask_losses import (
    DenseMaskLosses,
    LossWeights,
    PointMaskLosses,
    Prediction,
    read_classes,
    read_maps,
)
from segmill.models.matching import MaskLabel, match

WEIGHTS = LossWeights(classes=1.0, masks=2.0, dice=3.0, no_object=0.1)
CRITERIA = {
    "dense": DenseMaskLosses(weights=WEIGHTS, alpha=0.25, gamma=2.0),
    "points": PointMaskLosses(weights=WEIGHTS, num_points=256, oversample=3.0, importance=0.75),
}
EMPTY = torch.full((1, 32, 32), 255)


@pytest.fixture(params=CRITERIA)
def criterion(request):
    torch.manual_seed(0)
    return CRITERIA[request.param]


def predictions(batch: int, layers: int = 2) -> list[Prediction]:
    return [
        Prediction(
            torch.randn(batch, 5, 4, requires_grad=True),
            torch.randn(batch, 5, 8, 8, requires_grad=True),
        )
        for _ in range(layers)
    ]


def test_pairs_are_the_cheapest_and_sorted_by_query():
    cost = torch.tensor([[1.0, 9.0, 2.0], [2.0, 9.0, 9.0], [3.0, 0.0, 8.0]])[None, None]
    (pairs,) = match(cost, torch.tensor([[True, False, True]]))
    assert pairs.query.tolist() == [0, 1]
    assert pairs.label.tolist() == [2, 0]  # the middle class is cheap, but not in the label


def test_images_and_layers_are_matched_apart():
    cost = torch.zeros(2, 2, 2, 1)
    cost[0, 0, 0], cost[0, 1, 1], cost[1, 0, 1], cost[1, 1, 0] = 1.0, 1.0, 1.0, 1.0
    layers = match(cost, torch.ones(2, 1, dtype=torch.bool))
    assert [pairs.image.tolist() for pairs in layers] == [[0, 1], [0, 1]]
    assert [pairs.query.tolist() for pairs in layers] == [[1, 0], [0, 1]]


def test_a_cost_that_is_no_number_is_refused():
    with pytest.raises(SegmillError, match="diverged"):
        match(torch.full((1, 1, 2, 2), torch.nan), torch.ones(1, 2, dtype=torch.bool))


def test_costs_are_the_losses_of_each_pair():
    logits, target = torch.randn(1, 3, 50), torch.rand(1, 4, 50)
    cost = matching.cross_entropy_cost(logits, target)
    pair = F.binary_cross_entropy_with_logits(logits[0, 2], target[0, 1])
    torch.testing.assert_close(cost[0, 2, 1], pair)
    cost = matching.focal_cost(logits, target, alpha=0.5, gamma=0.0)
    torch.testing.assert_close(cost[0, 2, 1], 0.5 * pair)


def test_ignored_pixels_are_in_no_mask():
    label = torch.tensor([[[0, 2], [255, 255]], [[255, 255], [255, 255]]])
    masks = MaskLabel(label, 3)
    assert masks.present.tolist() == [[True, False, True], [False, False, False]]
    assert masks.counts() == [2, 0]


def test_classes_are_read_as_their_masks_would_be():
    label, points = torch.randint(0, 4, (2, 9, 7)), torch.rand(2, 40, 2)
    masks = one_hot(label, 4).permute(0, 3, 1, 2).float()
    classes = torch.arange(4).expand(2, -1)
    read = read_classes(label, points, classes)
    torch.testing.assert_close(read, read_maps(masks, points))


def test_an_image_without_any_class_only_says_no_object(criterion):
    made = predictions(1)
    terms = criterion(made, MaskLabel(EMPTY, 3))
    target = torch.full((5,), 3)
    expected = F.cross_entropy(made[1].classes[0], target)
    torch.testing.assert_close(terms["loss_cls"], expected)
    assert terms["loss_mask"] == terms["loss_dice"] == 0.0
    sum(terms.values()).backward()
    assert made[0].masks.grad is not None  # every parameter has a gradient on every process


def test_an_empty_image_counts_as_one_mask(criterion):
    made = predictions(2)
    label = torch.zeros(1, 32, 32, dtype=torch.long)
    both = criterion(made, MaskLabel(torch.cat([label, EMPTY]), 3))
    alone = [Prediction(each.classes[:1], each.masks[:1]) for each in made]
    dice = criterion(alone, MaskLabel(label, 3))["loss_dice"]
    # Other random points, hence the tolerance.
    torch.testing.assert_close(both["loss_dice"], dice / 2, rtol=0.05, atol=0.0)


def test_more_classes_than_queries(criterion):
    label = torch.randint(0, 8, (1, 32, 32))
    made = [Prediction(torch.randn(1, 3, 9), torch.randn(1, 3, 8, 8))]
    terms = criterion(made, MaskLabel(label, 8))
    assert terms.keys() == {"loss_cls", "loss_mask", "loss_dice"}
    assert all(term.isfinite() for term in terms.values())


def test_perfect_masks_lose_less_than_inverted_ones(criterion):
    label = torch.zeros(1, 32, 32, dtype=torch.long)
    label[:, 16:] = 2
    label[:, :, :16] = 1
    sharp = 50 * (2 * one_hot(label, 3).permute(0, 3, 1, 2).float() - 1)
    classes = 50 * torch.eye(4)[None, :3]
    terms = criterion([Prediction(classes, sharp)], MaskLabel(label, 3))
    wrong = criterion([Prediction(classes, -sharp)], MaskLabel(label, 3))
    assert terms["loss_cls"] < 1e-6
    # Random points near the border read a soft target.
    assert terms["loss_dice"] < 0.5 * wrong["loss_dice"]
