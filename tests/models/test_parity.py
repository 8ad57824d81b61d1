"""Families against the golden values of MMSegmentation 1.2.2. One row of VARIANTS per family."""

from typing import Any

import gate
import pytest

from golden import ModelGolden

# Golden name -> (variant, eps of its LayerNorms).
VARIANTS: dict[str, tuple[str, float | None]] = {
    "fcn": ("fcn_r50-d8", None),
    "pspnet": ("pspnet_r50-d8", None),
    "deeplabv3plus": ("deeplabv3plus_r50-d8", None),
    "upernet": ("upernet_r50", None),
    "swin": ("swin-tiny-patch4-window7-in1k-pre_upernet", 1e-5),
    "segformer": ("segformer_mit-b0", 1e-6),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def golden(request) -> ModelGolden:
    return ModelGolden(request.param)


@pytest.fixture(scope="module")
def network(golden) -> Any:
    """With the golden weights: that nothing is missing or left over is part of loading."""
    return gate.load_golden(gate.build(VARIANTS[golden.meta["name"]][0]), golden)


def test_it_has_the_published_size_and_eps(golden, network):
    gate.check_number_of_parameters(golden, network)
    gate.check_eps(network, layer_norm=VARIANTS[golden.meta["name"]][1])


def test_logits_are_the_originals(golden, network):
    gate.check_logits(golden, network)


def test_classes_are_the_originals(golden, network):
    gate.check_argmax(golden, network)


def test_sliding_windows_give_the_originals_classes(golden, network):
    gate.check_sliding_window(golden, network)


def test_losses_are_the_originals(golden, network):
    gate.check_losses(golden, network)


def test_a_training_step_is_the_originals(golden, network):
    gate.check_training_step(golden, network)
