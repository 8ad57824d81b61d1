"""Every family against the golden values of MMSegmentation 1.2.2: the gate, row by row.

The default suite checks the logits of one golden per family; `make parity` everything.
"""

from typing import Any, NamedTuple

import gate
import pytest
import torch

from golden import ModelGolden


class Row(NamedTuple):
    """A golden's variant, the eps of its LayerNorms, and whether the default suite has it."""

    variant: str
    layer_norm: frozenset[float] = frozenset()
    default: bool = True


VIT, LATER = frozenset({1e-6}), False
ROWS: dict[str, Row] = {
    "fcn": Row("fcn_r50-d8"),
    "pspnet": Row("pspnet_r50-d8"),
    "deeplabv3plus": Row("deeplabv3plus_r50-d8"),
    "upernet": Row("upernet_r50"),
    "ocrnet": Row("ocrnet_hr18"),
    "gcnet": Row("gcnet_r50-d8", frozenset({1e-5})),
    "isanet": Row("isanet_r50-d8"),
    "nonlocal": Row("nonlocal_r50-d8"),
    "dnlnet": Row("dnl_r50-d8"),
    "psanet": Row("psanet_r50-d8"),
    "segformer": Row("segformer_mit-b0", VIT),
    "segmenter": Row("segmenter_vit-t_mask", frozenset({1e-6, 1e-5})),
    "segnext": Row("segnext_mscan-t", frozenset({1e-5})),
    "setr_naive": Row("setr_vit-l_naive", VIT, LATER),
    "setr_pup": Row("setr_vit-l_pup", VIT, LATER),
    "setr_mla": Row("setr_vit-l-mla", VIT),
    "vit_deit": Row("vit_deit-s16_upernet", VIT),
    "mask2former": Row("mask2former_r50", frozenset({1e-5})),
    "maskformer": Row("maskformer_r50-d32", frozenset({1e-5})),
    "pointrend": Row("pointrend_r50"),
    "knet": Row("knet-s3_r50-d8_fcn", frozenset({1e-5})),
    "mobilenetv2": Row("mobilenet-v2-d8_fcn"),
    "poolformer": Row("fpn_poolformer_s12"),
    "fastfcn": Row("fastfcn_r50-d32_jpu_psp"),
    "resnest": Row("resnest_s101-d8_fcn"),
    "sem_fpn": Row("fpn_r50"),
    "stdc": Row("stdc1"),
    "twins": Row("twins_pcpvt-s_fpn_fpnhead", frozenset({1e-5})),
    "swin": Row("swin-tiny-patch4-window7-in1k-pre_upernet", frozenset({1e-5})),
    "hrnet": Row("fcn_hr18"),
}


def _parameter(name: str) -> Any:
    # One process builds a network once for all its tests.
    return pytest.param(name, marks=pytest.mark.xdist_group(name))


DEFAULT = [_parameter(name) for name, row in ROWS.items() if row.default]
ALL = [_parameter(name) for name in ROWS]


@pytest.fixture(scope="module")
def golden(request) -> ModelGolden:
    return ModelGolden(request.param)


@pytest.fixture(scope="module")
def network(golden) -> Any:
    """With the golden weights: that nothing is missing or left over is part of loading."""
    num_classes = golden.meta["num_classes"]
    network = gate.build(ROWS[golden.meta["name"]].variant, num_classes=num_classes)
    return gate.load_golden(network, golden)


@pytest.fixture(autouse=True)
def one_thread():
    """As the golden run: where BatchNorm sees two values, the order of a sum shows in gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("golden", DEFAULT, indirect=True)
def test_logits_are_the_originals(golden, network):
    gate.check_number_of_parameters(golden, network)
    gate.check_eps(network, layer_norm=ROWS[golden.meta["name"]].layer_norm)
    gate.check_logits(golden, network)


@pytest.mark.slow
@pytest.mark.parametrize("golden", ALL, indirect=True)
class TestGate:
    def test_logits_are_the_originals(self, golden, network):
        gate.check_number_of_parameters(golden, network)
        gate.check_logits(golden, network)

    def test_classes_are_the_originals(self, golden, network):
        gate.check_argmax(golden, network)

    def test_sliding_windows_give_the_originals_classes(self, golden, network):
        gate.check_sliding_window(golden, network)

    def test_losses_are_the_originals(self, golden, network):
        if "loss_eval" not in golden.meta:
            pytest.skip("the original has no loss in eval mode: its head returns the last stage")
        gate.check_losses(golden, network)

    def test_a_training_step_is_the_originals(self, golden, network):
        gate.check_training_step(golden, network)
