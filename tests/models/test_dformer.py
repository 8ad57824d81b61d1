"""DFormer and DFormerv2 as whole networks, against the official code's golden values."""

import argparse
import copy
import json
import re
from functools import cache
from typing import Any

import gate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from golden import FOLDER, DFormerGolden, dformer_bases, dformer_normal
from segmill.checkpoint.load import load_arrays, load_weights
from segmill.checkpoint.read import CheckpointError
from segmill.configuration import compose
from segmill.errors import SegmillError
from segmill.models.backbones import dformer, dformerv2

VARIANTS = {
    "DFormer-Tiny": "dformer-tiny",
    "DFormer-Small": "dformer-small",
    "DFormerv2-S": "dformerv2-s",
    "DFormerv2-B": "dformerv2-b",
}
# The official table: parameters in thousands, whole and of the trunk, and keys of the state dict.
PUBLISHED = {
    "dformer-tiny": (6_004, 4_964, 692),
    "dformer-small": (18_747, 17_478, 552),
    "dformer-base": (29_525, 28_256, 1028),
    "dformer-large": (39_030, 37_679, 1028),
    "dformerv2-s": (26_686, 25_417, 802),
    "dformerv2-b": (53_923, 52_605, 1268),
    "dformerv2-l": (95_550, 93_784, 1268),
}
OFFICIAL = {
    "dformer-large": "DFormer-Large",
    "dformerv2-s": "DFormerv2-S",
    "dformerv2-l": "DFormerv2-L",
}
NEVER_UPDATED = {"dformer": dformer.NEVER_UPDATED, "dformerv2": dformerv2.NEVER_UPDATED}
ATOL = 1e-4  # float32; the official run itself is as far as 3.4e-5 from float64 in a stage
TINY = {
    "dformer-tiny": [
        "model.network.backbone.widths=[8,16,32,32]",
        "model.network.backbone.depths=[1,1,1,2]",
        "model.network.backbone.heads=[1,2,2,2]",
        "model.network.backbone.mlp_ratios=[2,2,1,1]",
    ],
    "dformerv2-b": [
        "model.network.backbone.widths=[8,16,32,32]",
        "model.network.backbone.depths=[1,1,2,1]",
        "model.network.backbone.heads=[2,2,4,4]",
        "model.network.backbone.layer_scale=[null,null,1.0e-6,1.0e-6]",
    ],
}
SMALL_HEAD = [
    "model.network.decode_head.ham_channels=16",
    "model.network.decode_head.channels=8",
    "model.network.decode_head.rank=4",
]


def never_updated() -> dict[str, Any]:
    """{model: what is in no parameter group of the official recipe, and how many are in which}."""
    return json.loads((FOLDER / "dformer" / "never_updated.json").read_text())


def unresolved(variant: str) -> Any:
    """The YAML and its parent, as they are written."""
    return OmegaConf.to_container(compose("load", [f"model={variant}"]).model, resolve=False)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def official(name: str) -> Any:
    """The variant with the golden weights."""
    network = gate.build(VARIANTS[name], num_classes=40, channels=4)
    load_arrays(network, DFormerGolden(name).state(), may_miss=[r".+\.(angle|decay)", ".+tracked"])
    return network


def tiny(variant: str) -> Any:
    """With the structure of the variant and few channels."""
    return copy.deepcopy(built(variant))


@cache
def built(variant: str) -> Any:
    torch.manual_seed(0)
    return gate.build(variant, *TINY[variant], *SMALL_HEAD, num_classes=5, channels=4).eval()


def golden_image() -> Tensor:
    """The normalised RGB and depth of the golden run."""
    rgb, depth = dformer_normal("rgb", 1, 3, 128, 160), dformer_normal("depth", 1, 1, 128, 160)
    return torch.from_numpy(np.concatenate([rgb, depth], axis=1))


@pytest.fixture
def official_bases(monkeypatch):
    """The factorisation starts from what the official code drew."""

    def rand(batch: int, width: int, rank: int, **_where: object) -> Tensor:
        return torch.from_numpy(dformer_bases(batch, width, rank))

    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.parametrize(
    "name",
    [
        "DFormer-Tiny",
        pytest.param("DFormer-Small", marks=pytest.mark.slow),
        "DFormerv2-S",
        pytest.param("DFormerv2-B", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_stages_logits_and_classes_are_the_official_ones(name, official_bases):
    golden, network = DFormerGolden(name).data, official(name).eval()
    features = network.backbone(golden_image())
    logits = network.decode_head(features)
    for stage in (2, 3):
        np.testing.assert_allclose(features[stage], golden[f"stage{stage}"], atol=ATOL, rtol=0)
    np.testing.assert_allclose(logits, golden["head_logits"], atol=ATOL, rtol=0)
    upsampled = F.interpolate(logits, (128, 160), mode="bilinear", align_corners=False)
    centre = upsampled[:, :, 56:72, 72:88]
    np.testing.assert_allclose(centre, golden["logits_centre"], atol=ATOL, rtol=0)
    assert np.array_equal(upsampled.argmax(1), golden["argmax"])


@pytest.mark.parametrize("name", VARIANTS)
def test_names_shapes_and_norms_are_the_official_ones(name):
    golden = DFormerGolden(name).meta
    with torch.device("meta"):
        network = gate.build(VARIANTS[name], num_classes=40, channels=4)
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert ours == golden["state_dict"]
    assert count(network) == golden["n_params"]
    assert count(network.backbone) == golden["n_params_backbone"]
    norms = {
        key: [module.eps, module.momentum]
        for key, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    assert norms == golden["bn_eps_momentum"]


@pytest.mark.parametrize("variant", PUBLISHED)
def test_sizes_are_the_published_ones(variant):
    with torch.device("meta"):
        network = gate.build(variant, num_classes=40, channels=4)
    ours = (round(count(network) / 1e3), round(count(network.backbone) / 1e3))
    assert (*ours, len(network.state_dict())) == PUBLISHED[variant]


@pytest.mark.parametrize("variant", OFFICIAL)
def test_what_the_official_recipe_never_updates_is_known(variant):
    golden = never_updated()[OFFICIAL[variant]]
    with torch.device("meta"):
        network = gate.build(variant, num_classes=40, channels=4)
    patterns = NEVER_UPDATED[variant.split("-")[0]]
    ours = {
        name: parameter.numel()
        for name, parameter in network.named_parameters()
        if any(re.fullmatch(pattern, name) for pattern in patterns)
    }
    assert set(ours) == set(golden["not_optimised"])
    assert sum(ours.values()) == golden["not_optimised_numel"]
    others = len(list(network.parameters())) - len(ours)
    assert others == golden["decay"] + golden["no_decay"]


@pytest.mark.parametrize(
    ("variant", "rate", "channels", "order"),
    [
        ("dformer-large", 0.2, 512, "${oc.select:data.channel_order,rgb}"),
        ("dformerv2-s", 0.1, 1024, "rgb"),
        ("dformerv2-b", 0.1, 1024, "rgb"),
        ("dformerv2-l", 0.27, 1024, "rgb"),
    ],
)
def test_variants_for_sun_differ_in_what_is_published_alone(variant, rate, channels, order):
    usual, sun = unresolved(variant), unresolved(f"{variant}_sun")
    assert usual["channel_order"] == "${oc.select:data.channel_order,rgb}"
    usual["channel_order"] = order
    usual["network"]["backbone"]["drop_path_rate"] = rate
    usual["network"]["decode_head"]["channels"] = channels
    assert usual == sun


def test_three_steps_of_training_are_the_official_ones(official_bases):
    golden, network = DFormerGolden("trainstep_DFormer-Tiny"), official("DFormer-Tiny").train()
    gate.without_dropout(network)
    image = np.concatenate(
        [dformer_normal("train_rgb", 2, 3, 96, 128), dformer_normal("train_depth", 2, 1, 96, 128)],
        axis=1,
    )
    label = torch.from_numpy(golden.data["label"]).long()
    optimizer = official_optimizer(network)
    losses = []
    for step, rate in enumerate(golden.meta["lr_used"]):
        for group in optimizer.param_groups:
            group["lr"] = rate
        (loss,) = network.losses(torch.from_numpy(image), label).values()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            check_gradients(network, golden)
            check_statistics(network, golden)
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, golden.meta["losses"], rtol=1e-5)  # means of 20000 float32
    check_updates(network, golden)


def official_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """Convolutions' and layers' weights decay, their biases and the rest do not."""
    decaying, others = [], []
    for prefix, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if any(re.fullmatch(each, f"{prefix}.{name}") for each in dformer.NEVER_UPDATED):
                continue
            layer = name == "weight" and isinstance(module, (nn.Linear, nn.Conv2d))
            (decaying if layer else others).append(parameter)
    golden = never_updated()["DFormer-Tiny"]
    assert (len(decaying), len(others)) == (golden["decay"], golden["no_decay"])
    groups = [{"params": decaying, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)


def check_statistics(network: Any, golden: DFormerGolden) -> None:
    state = network.state_dict()
    for name, theirs in golden.meta["bn"].items():
        # Sums of up to 512 float32 that went through the whole network.
        np.testing.assert_allclose(state[name].double().sum(), theirs, rtol=1e-5, atol=1e-5)


def check_updates(network: Any, golden: DFormerGolden) -> None:
    """Sums of all parameters after the steps; those in no group have not moved.

    Adam's first step is the sign of the gradient times the rate: where a gradient is almost zero
    the sign is chance. One weight in a thousand may differ, and biases before a norm are left out.
    """
    frozen, rate = never_updated()["DFormer-Tiny"]["not_optimised"], golden.meta["lr_used"][0]
    for name, parameter in network.named_parameters():
        theirs, sum_ = golden.meta["param_sum_after"][name], parameter.double().sum().item()
        differing = 0 if name in frozen else 2 + parameter.numel() / 1000
        if golden.meta["grad_norm_f64"][name] > 1e-9:
            tolerance = 1e-6 + 2 * rate * differing
            np.testing.assert_allclose(sum_, theirs, rtol=0, atol=tolerance, err_msg=name)


def check_gradients(network: Any, golden: DFormerGolden) -> None:
    """Norms against float64 within 5e-3 (a ReLU near zero flips), three gradients in full."""
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    theirs = golden.meta["grad_norm_f64"]
    assert gradients.keys() == theirs.keys()
    norms = {name: gradient.double().norm().item() for name, gradient in gradients.items()}
    for name, norm in theirs.items():
        # Biases before a norm have none in exact arithmetic.
        np.testing.assert_allclose(norms[name], norm, rtol=5e-3, atol=1e-6, err_msg=name)
    for name in (each for each in golden.data if each.startswith("grad:")):
        ours, full = gradients[name.removeprefix("grad:")].numpy(), golden.data[name]
        assert np.linalg.norm(ours - full) <= 5e-3 * np.linalg.norm(full)


@pytest.mark.parametrize("variant", TINY)
def test_only_channel_three_is_depth(variant):
    backbone, image = tiny(variant).backbone, torch.randn(1, 6, 64, 64)
    with torch.no_grad():
        whole, four = backbone(image), backbone(image[:, :4])
        image[:, 3] += 1 + torch.randn(64, 64)
        other = backbone(image)
    for stage in range(4):
        assert torch.equal(whole[stage], four[stage])
    assert not torch.allclose(whole[3], other[3])


@pytest.mark.parametrize("variant", TINY)
def test_an_image_without_depth_names_the_remedy(variant):
    with pytest.raises(SegmillError, match=r"data\.channels=4"):
        tiny(variant).backbone(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("variant", TINY)
@pytest.mark.parametrize("size", [(1, 1), (33, 70), (96, 31), (130, 257)])
def test_images_of_any_size_will_do(variant, size):
    network, image = tiny(variant), torch.randn(2, 4, *size)
    with torch.no_grad():
        features, logits = network.backbone(image), network(image)
    for stride, feature in zip(network.backbone.strides, features, strict=True):
        assert feature.shape[2:] == tuple(-(-length // stride) for length in size)
    assert logits.shape[2:] == features[1].shape[2:]
    assert logits.isfinite().all()


@pytest.mark.parametrize("variant", TINY)
def test_it_runs_on_the_meta_device_and_in_bfloat16(variant):
    network = tiny(variant)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert network(torch.randn(1, 4, 64, 96)).isfinite().all()
    counted = network.to("meta")(torch.empty(2, 4, 64, 96, device="meta"))
    assert counted.shape == (2, 5, 8, 12)


@pytest.mark.parametrize("variant", TINY)
def test_the_loss_is_the_mean_over_the_labelled_pixels_of_the_batch(variant):
    network, image = tiny(variant), torch.randn(2, 4, 64, 64)
    label = torch.randint(0, 5, (2, 64, 64))
    label[0, :, 3:] = 255
    torch.manual_seed(1)
    terms = network.losses(image, label)
    torch.manual_seed(1)
    logits = F.interpolate(network(image), (64, 64), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(logits, label, ignore_index=255)
    torch.testing.assert_close(terms["decode.loss_ce"], expected)


@pytest.mark.parametrize("variant", TINY)
def test_training_moves_the_statistics_of_every_batch_norm(variant):
    network = tiny(variant).train()
    network(torch.randn(2, 4, 64, 64))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.training and norm.num_batches_tracked == 1 for norm in norms)


@pytest.mark.parametrize("variant", TINY)
def test_trained_files_load(variant, tmp_path):
    network = tiny(variant)
    state = network.state_dict()
    unused = {"backbone.norm0.weight": torch.ones(8), "backbone.norm3.bias": torch.ones(32)}
    files = {
        "official": {"model": state | unused, "optimizer": {"state": {}}, "epoch": 3},
        "nested": {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        "bare": state,
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        report = load_weights(tiny(variant), tmp_path / f"{name}.pth")
        assert len(report.loaded) == len(state)


@pytest.mark.parametrize("variant", TINY)
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.backbone."])
def test_pretraining_files_load_into_the_trunk(variant, prefix, tmp_path):
    network = tiny(variant)
    trunk = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    # The norms of the outputs are made for segmentation.
    theirs = {name: value for name, value in trunk.items() if "extra_norms" not in name}
    classifier = {"norm0.weight": torch.ones(8), "norm.bias": torch.ones(32)}
    classifier |= {"head.weight": torch.ones(10, 32), "pred.bias": torch.ones(10)}
    both = {f"{prefix}{name}": value for name, value in (theirs | classifier).items()}
    averaged = {name: 3 * value for name, value in both.items()}
    content = {"epoch": 1, "arch": "x", "state_dict": both, "args": argparse.Namespace(lr=1.0)}
    torch.save(content | {"state_dict_ema": averaged}, tmp_path / "trunk.pth.tar")
    may_miss = [r"decode_head\..+", r"backbone\.extra_norms\..+"]
    report = load_weights(network, tmp_path / "trunk.pth.tar", may_miss=may_miss)
    assert len(report.loaded) == len(theirs)
    for name, value in theirs.items():
        assert torch.equal(network.backbone.state_dict()[name], 3 * value)


def test_a_file_of_another_network_is_refused(tmp_path):
    weights = {f"backbone.layer{stage}.0.conv1.weight": torch.ones(4) for stage in (1, 2, 3)}
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"backbone\.layer1"):
        load_weights(tiny("dformer-tiny"), tmp_path / "other.pth")


def test_other_windows_than_the_official_are_refused():
    with pytest.raises(SegmillError, match=r"\[0, 7, 5, 7\]"):
        dformer.DFormer(
            widths=[8, 8, 8, 8],
            depths=[1, 1, 1, 1],
            heads=[1, 1, 1, 1],
            mlp_ratios=[1, 1, 1, 1],
            windows=[0, 7, 5, 7],
            drop_path_rate=0.0,
        )
