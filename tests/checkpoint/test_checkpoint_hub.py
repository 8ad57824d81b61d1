"""Weights from the hub: the cache is respected; without a network the error says what to copy."""

import socket
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from torch import nn

from segmill.checkpoint import pretrained
from segmill.checkpoint.load import load_weights, save_safetensors
from segmill.checkpoint.read import CheckpointError
from segmill.models.backbones.timm_backbone import TimmBackbone

HUB_ID = "nvidia/segformer-b5-finetuned-ade-640-640"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache on a machine without network."""

    def unknown(*_arguments: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(pretrained.urllib.request, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache: Path, repository: str, state: dict[str, torch.Tensor]) -> None:
    """A file as the hub's client leaves it in its cache."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_safetensors(folder / "snapshots" / ("0" * 40) / "model.safetensors", state, {})


def test_without_a_network_the_error_says_what_to_copy(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as error:
        load_weights(nn.Linear(2, 2), HUB_ID)
    assert "cannot be reached" in str(error.value)
    assert str(cache / "models--nvidia--segformer-b5-finetuned-ade-640-640") in str(error.value)


def test_a_cached_file_needs_no_network(cache: Path) -> None:
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    put(cache, HUB_ID, dict(net.state_dict()))
    load_weights(other, HUB_ID)
    assert torch.equal(other.weight, net.weight)


class Net(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = TimmBackbone(
            name="resnet18",
            in_channels=channels,
            out_indices=(1, 2, 3, 4),
            output_stride=32,
            options={},
        )
        self.decode_head = nn.Conv2d(512, 2, 1)
        self.key_rules = self.backbone.key_rules


@pytest.mark.parametrize("channels", [3, 4])
def test_timm_loads_the_backbone_alone(cache: Path, channels: int) -> None:
    torch.manual_seed(0)
    source = timm.create_model("resnet18")
    config = timm.get_pretrained_cfg("resnet18")
    assert config is not None
    put(cache, str(config.hf_hub_id), dict(source.state_dict()))
    net = Net(channels)
    head = net.decode_head.weight.detach().clone()
    report = load_weights(net, "timm")
    assert report.problems == 0
    assert {name.partition(".")[0] for name in report.loaded} == {"backbone"}
    assert torch.equal(net.decode_head.weight, head)
    ours, theirs = net.state_dict(), source.state_dict()
    assert torch.equal(ours["backbone.trunk.layer4.1.bn2.bias"], theirs["layer4.1.bn2.bias"])
    first = ours["backbone.trunk.conv1.weight"].numpy()
    if channels == 3:
        np.testing.assert_array_equal(first, theirs["conv1.weight"].numpy())
    else:  # timm's rule: repeated, and scaled so that the sum stays alike
        np.testing.assert_allclose(first[:, :3], 0.75 * theirs["conv1.weight"].numpy(), rtol=1e-6)


def test_timm_without_a_network_says_what_to_copy(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"timm/resnet18\..*cannot be reached"):
        load_weights(Net(3), "timm")


def test_timm_is_for_timm_backbones(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="whose backbone is a model of timm"):
        load_weights(nn.Linear(1, 1), "timm")
