"""SegNeXt's parts and the Hamburger. The original's numbers are in test_parity.py."""

from functools import partial

import gate
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segmill.checkpoint.load import choose_rules, load_arrays
from segmill.models.backbones.mscan import MSCAN
from segmill.models.encoder_decoder import EncoderDecoder
from segmill.models.families.segnext import LightHamHead
from segmill.models.hamburger import NMF, factorised, merged_at_finest

# Millions of parameters as the paper gives them.
MILLIONS = {"t": 4.3, "s": 13.9, "b": 27.6, "l": 48.9}
TRUNK = {"channels": [4, 8, 12, 16], "depths": [1, 1, 2, 1], "mlp_ratios": [2, 2, 1, 1]}
HEAD = {"channels": 12, "ham_channels": 8, "groups": 4, "rank": 3}


@pytest.fixture
def network() -> EncoderDecoder:
    torch.manual_seed(0)
    steps = {"train_steps": 2, "eval_steps": 3}
    head = partial(LightHamHead, in_index=[1, 2, 3], dropout=0.1, num_classes=5, **HEAD, **steps)
    return EncoderDecoder(
        backbone=MSCAN(in_channels=3, drop_path_rate=0.1, **TRUNK), decode_head=head
    )


@pytest.mark.parametrize("size", MILLIONS)
def test_sizes_are_the_published_ones(size):
    with torch.device("meta"):
        network = gate.build(f"segnext_mscan-{size}")
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert round(count, 1) == MILLIONS[size]


def test_a_convolution_before_resizing_equals_one_after():
    maps = [torch.randn(2, width, *size) for width, size in ((3, (9, 7)), (5, (5, 4)), (2, (3, 2)))]
    weight = torch.randn(6, 10, 1, 1)
    upsampled = [F.interpolate(each, (9, 7), mode="bilinear", align_corners=False) for each in maps]
    expected = F.conv2d(torch.cat(upsampled, dim=1), weight)
    torch.testing.assert_close(merged_at_finest(maps, weight), expected, atol=1e-5, rtol=1e-5)


def test_bases_are_drawn_anew_in_every_pass(network):
    network.eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = network(image), network(image)
        torch.manual_seed(1)
        again = network(image)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_updates_never_fit_worse():
    torch.manual_seed(0)
    pixels, bases = torch.rand(1, 6, 40), F.normalize(torch.rand(1, 6, 2), dim=1)
    errors = [(factorised(pixels, bases, steps=n) - pixels).norm().item() for n in range(8)]
    assert np.all(np.diff(errors) < 0)


def test_the_product_has_the_rank_of_the_factors():
    low_rank = NMF(rank=3, train_steps=1, eval_steps=2)(torch.rand(1, 8, 5, 6))
    assert torch.linalg.matrix_rank(low_rank.flatten(2)).item() == 3


def test_the_factorisation_is_float32_under_autocast():
    """In bfloat16 the sums over pixels would be off by percents."""
    nmf, feature = NMF(rank=3, train_steps=2, eval_steps=2), torch.rand(1, 8, 16, 16)
    torch.manual_seed(0)
    expected = nmf(feature)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(nmf(feature), expected)


def test_the_meta_device_which_knows_no_autocast_will_do():
    nmf = NMF(rank=3, train_steps=1, eval_steps=1)
    assert nmf(torch.empty(1, 8, 4, 5, device="meta")).shape == (1, 8, 4, 5)


def test_logits_have_the_size_of_the_first_map_chosen_whatever_the_image(network):
    with torch.no_grad():
        assert network.eval()(torch.randn(1, 3, 50, 71)).shape == (1, 5, 7, 9)


def test_files_of_the_authors_load(network):
    theirs = {
        name.replace(".mlp.dwconv.", ".mlp.dwconv.dwconv."): value.numpy()
        for name, value in network.state_dict().items()
    }
    _, rules = choose_rules(network, theirs)
    assert len(load_arrays(network, theirs, rules=rules).loaded) == len(network.state_dict())


def test_a_trunk_trained_on_imagenet_loads_without_prefix_and_classifier(network):
    trunk = {name: value.numpy() for name, value in network.backbone.state_dict().items()}
    _, rules = choose_rules(network, trunk | {"head.weight": np.zeros((1000, 16), np.float32)})
    report = load_arrays(network, trunk, rules=rules, may_miss=[r"decode_head\..+"])
    assert len(report.loaded) == len(trunk)
