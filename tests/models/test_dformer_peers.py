"""DFormer against the published algorithm of benchmarks/dformer.py; and compiled."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from segmill.models.backbones.dformer import DFormer
from segmill.models.backbones.dformerv2 import DFormerV2
from segmill.models.encoder_decoder import EncoderDecoder
from segmill.models.families.dformer import LightHamHead

ROOT = Path(__file__).resolve().parents[2]
COMMON = {"widths": [16, 32, 32, 32], "depths": [1, 1, 1, 2], "drop_path_rate": 0.0}
HEAD = {
    "ham_channels": 16,
    "channels": 8,
    "rank": 4,
    "train_steps": 2,
    "eval_steps": 3,
    "dropout": 0.0,
    "num_classes": 5,
}
V1 = COMMON | {"heads": [1, 2, 2, 2], "mlp_ratios": [2, 2, 1, 1], "windows": [0, 7, 7, 7]}
V2 = COMMON | {
    "heads": [1, 2, 2, 2],
    "head_ranges": [4.0, 4.0, 6.0, 6.0],
    "mlp_ratios": [2.0, 2.0, 1.0, 1.0],
    "layer_scale": [None, None, 1.0, 1.0],
}


def ours(version: int):
    torch.manual_seed(0)
    backbone = DFormer(**V1) if version == 1 else DFormerV2(**V2)
    head = partial(LightHamHead, **HEAD, in_index=[1, 2, 3])
    network = EncoderDecoder(backbone=backbone, decode_head=head)
    for name, parameter in network.named_parameters():
        if "layer_scale" in name or name.endswith("Geo.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return network


def peer(version: int, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import _dformer_peer_head, _dformer_peers, _dformerv2_peers

    trunk = _dformer_peers.DFormer(**V1) if version == 1 else _dformerv2_peers.DFormerV2(**V2)
    head = _dformer_peer_head.LightHamHead(in_channels=COMMON["widths"], **HEAD)
    return _dformer_peer_head.Segmentor(trunk, head)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    label = torch.randint(0, 5, (2, 48, 64))
    label[:, :9] = 255
    return torch.randn(2, 4, 48, 64), label


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients_are_those_of_the_published_algorithm(version, training, monkeypatch):
    network, reference = ours(version), peer(version, monkeypatch)
    reference.load_state_dict(network.state_dict())
    image, label = batch()
    results = []
    for each in (network.train(training), reference.train(training)):
        torch.manual_seed(2)  # of the factorisation's bases
        (loss,) = each.losses(image, label).values()
        loss.backward()
        results.append((loss, {key: value.grad for key, value in each.named_parameters()}))
    (loss, gradients), (expected, wanted) = results
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)  # float32, another order
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[key], atol=1e-4, rtol=1e-3, msg=key)


def compile_both() -> None:
    for version in (1, 2):
        network, (image, _) = ours(version), batch()
        torch.manual_seed(2)
        expected = network(image)
        torch.manual_seed(2)
        found = torch.compile(network, backend="aot_eager", fullgraph=True)(image)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # the same operations
        found.square().sum().backward()
        torch.compiler.reset()


@pytest.mark.slow  # four compilations
def test_a_training_pass_is_one_graph_to_the_compiler():
    # A process of its own: here every function checks the shapes of what it is called with.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    compile_both()
