import pytest
import torch

from segmill.models.families import psanet
from segmill.models.families.psanet import PSAHead, Scores, shrunken, weighted_sums

SIZES = {"in_index": 0, "channels": 4, "dropout": 0.1, "num_classes": 3}
USUAL = {"compact": False, "shrink_factor": 2, "normalization_factor": 1.0, "psa_softmax": True}
# Smaller than the map, even (its centre is the upper left of the middle), larger than needed.
WINDOWS = [(3, 5), (4, 6), (66, 66)]


def head(**changes):
    settings = {"mask_size": (7, 7), "psa_type": "bi-direction", **SIZES, **USUAL}
    return PSAHead(in_channels=[6], **(settings | changes))


def naive_pairs(scores, window, direction):
    """(receiver, giver), pair by pair; `scores` is (offsets, h, w)."""
    _, height, width = scores.shape
    pairs = torch.zeros(height * width, height * width, dtype=scores.dtype)
    for own in range(height * width):
        for other in range(height * width):
            y = other // width - own // width + (window[0] - 1) // 2
            x = other % width - own % width + (window[1] - 1) // 2
            if 0 <= y < window[0] and 0 <= x < window[1]:
                score = scores[y * window[1] + x, own // width, own % width]
                place = (own, other) if direction == "collect" else (other, own)
                pairs[place] = score
    return pairs


@pytest.mark.parametrize("direction", ["collect", "distribute"])
@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_pairs_have_the_score_of_their_offset_and_zero_outside(window, direction):
    torch.manual_seed(0)
    scores, feature = Scores(4, window).eval(), torch.rand(2, 4, 4, 5)
    (pairs,) = scores.of_pairs(feature, direction)
    for ours, own_scores in zip(pairs, scores(feature), strict=True):
        torch.testing.assert_close(ours, naive_pairs(own_scores, window, direction))


@pytest.mark.parametrize("direction", ["collect", "distribute"])
@torch.no_grad()
def test_parts_of_a_large_map_give_what_the_whole_gives(monkeypatch, direction):
    scores, feature = Scores(4, (3, 5)).eval(), torch.rand(2, 4, 5, 4)
    whole = weighted_sums(feature, scores.of_pairs(feature, direction), softmax=True)
    monkeypatch.setattr(psanet, "PAIRS_AT_ONCE", 2 * 5 * 4 * 4 * 2)  # two rows of five
    parts = list(scores.of_pairs(feature, direction))
    assert [part.shape[1] for part in parts] == [8, 8, 4]
    torch.testing.assert_close(weighted_sums(feature, iter(parts), softmax=True), whole)


@pytest.mark.parametrize("direction", ["collect", "distribute"])
@pytest.mark.parametrize("window", WINDOWS[:2])
def test_gradients_of_attention_are_those_of_its_formula(window, direction):
    torch.manual_seed(0)
    scores = Scores(2, window).double().eval()
    feature = torch.rand(1, 2, 3, 4, dtype=torch.double, requires_grad=True)

    def attended(feature, _):
        return weighted_sums(feature, scores.of_pairs(feature, direction), softmax=True)

    # gradcheck moves the weight where it is.
    assert torch.autograd.gradcheck(attended, (feature, scores[1].weight), fast_mode=True)


def test_corners_align_where_both_sides_leave_a_rest():
    assert shrunken((13, 17), 2) == ([7, 9], True)
    assert shrunken((13, 16), 2) == ([6, 8], False)
    assert shrunken((13, 17), 1) == ([13, 17], False)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (9, 8)])
def test_a_head_keeps_the_size_of_its_map(size):
    assert head()([torch.rand(2, 6, *size)]).shape == (2, 3, *size)


def test_a_head_of_one_direction_has_one_branch():
    one = head(psa_type="collect", psa_softmax=False, normalization_factor=49.0)
    assert not any("_p." in name for name, _ in one.named_parameters())
    assert one([torch.rand(2, 6, 8, 8)]).shape == (2, 3, 8, 8)


@torch.no_grad()
def test_a_compact_head_scores_absolute_positions():
    both = head(compact=True, mask_size=(4, 3)).eval()
    feature = torch.rand(1, 4, 4, 3)
    scores = both.attention(feature).flatten(2)  # (position, predictor)
    collected = feature.flatten(2) @ scores.softmax(dim=1)
    ours = both.attended("collect", feature, both.attention)
    torch.testing.assert_close(ours.flatten(2), collected)
    given = feature.flatten(2) @ scores.transpose(1, 2).softmax(dim=1)
    ours = both.attended("distribute", feature, both.attention)
    torch.testing.assert_close(ours.flatten(2), given)


def test_a_compact_head_of_one_direction_exchanges_them_as_the_original():
    ((direction, *_),) = head(compact=True, psa_type="collect").branches()
    assert direction == "distribute"
