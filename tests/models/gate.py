"""The parity gate: a network built from its YAML against the golden values of MMSegmentation.

A tolerance and its reason stand together. Rounding in another order moves logits by about 1e-6 of
their scale; the golden run measured that noise per model.
"""

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden import ModelGolden, golden_image
from segmill import configuration
from segmill.checkpoint.load import load_arrays
from segmill.configuration import compose
from segmill.inference import slide_logits

SIZES = ((128, 128), (96, 160))
# What rounding grows to more than 1e-5 of a training loss, in the original as here: three stages of
# K-Net each feed on the masks of the one before; 33 blocks of ResNeSt normalise two values each.
AMPLIFIES = ("knet", "resnest")


def build(variant: str, *overrides: str, num_classes: int = 150, channels: int = 3) -> Any:
    """The network of configs/model/discriminative/VARIANT.yaml, without its normalisation."""
    sizes = [f"data.num_classes={num_classes}", f"data.channels={channels}"]
    return configuration.build(
        compose("load", [f"model={variant}", *sizes, *overrides]).model.network
    )


def load_golden(network: Any, golden: ModelGolden) -> nn.Module:
    """Load the original's weights through the network's own rules; anything left over raises."""
    load_arrays(network, golden.state(), rules=network.key_rules()["mmseg"])
    return network.eval()


def check_number_of_parameters(golden: ModelGolden, network: nn.Module) -> None:
    ours = sum(parameter.numel() for parameter in network.parameters())
    assert ours == golden.meta["num_params"]


def check_eps(network: nn.Module, *, layer_norm: frozenset[float]) -> None:
    """A wrong eps hides below the tolerance of the logits, so it is compared by itself."""
    eps = {(type(module), module.eps) for module in network.modules() if hasattr(module, "eps")}
    batch = {value for kind, value in eps if issubclass(kind, nn.BatchNorm2d)}
    layer = {value for kind, value in eps if issubclass(kind, nn.LayerNorm)}
    assert batch <= {1e-5}
    assert layer == layer_norm


@torch.no_grad()
def check_logits(golden: ModelGolden, network: nn.Module) -> None:
    """Logits at 128 x 128, upsampled to the input size, central 16 x 16."""
    meta = golden.meta["outputs"]["128x128"]
    top, left = meta["logits_crop_origin"]
    theirs = golden.data["128x128/logits_crop16_f32"]
    ours = logits_at_input_size(network, *SIZES[0])[..., top : top + 16, left : left + 16].numpy()
    tolerance = max(3e-6 * np.abs(theirs).max(), 3 * meta["noise_mkldnn_maxabs"])
    assert np.abs(ours - theirs).max() <= tolerance


@torch.no_grad()
def check_argmax(golden: ModelGolden, network: nn.Module) -> None:
    for height, width in SIZES:
        pred = logits_at_input_size(network, height, width).argmax(1)[0]
        assert_same_classes(pred, golden.data[f"{height}x{width}/argmax"])


@torch.no_grad()
def check_sliding_window(golden: ModelGolden, network: nn.Module) -> None:
    """Windows of 64 at steps of 48; logits are averaged at the input's size."""
    image = torch.from_numpy(golden_image(96, 160))
    torch.manual_seed(0)
    # One at a time, as the original: a family may draw numbers in every forward pass.
    logits = slide_logits(network, image, window=(64, 64), stride=(48, 48), batch=1)
    assert_same_classes(logits.argmax(1)[0], golden.data["96x160/slide64_48.argmax"])


@torch.no_grad()
def check_losses(golden: ModelGolden, network: Any) -> None:
    torch.manual_seed(0)
    losses = network.losses(*training_batch(golden))
    assert_same_losses(losses, golden.meta["loss_eval"])


def check_training_step(golden: ModelGolden, network: Any) -> None:
    """Losses, BatchNorm statistics and gradients of one step without dropout."""
    network = copy.deepcopy(network).train()
    without_dropout(network)
    before = copy.deepcopy(network)
    torch.manual_seed(0)
    losses = network.losses(*training_batch(golden))
    noise = rounding(before, losses, golden) if golden.meta["name"] in AMPLIFIES else {}
    assert_same_losses(losses, golden.meta["loss_train_nodrop"], noise)
    for name, theirs in golden.meta["bn_after_one_step_abs_sum"].items():
        if name != "n":
            sums = [b.double().abs().sum() for key, b in network.named_buffers() if name in key]
            np.testing.assert_allclose(float(sum(sums)), theirs, rtol=1e-5)
    norms = gradient_norms(network, losses)
    total = np.linalg.norm(norms)
    if golden.meta["name"] == "resnest":
        # Its gradients have no digits to compare: the same batch in the other order shows it.
        image, label = training_batch(golden)
        swapped = gradient_norms(before, before.losses(image.flip(0), label.flip(0)))
        assert abs(np.linalg.norm(swapped) / total - 1) > 1e-2
        return
    np.testing.assert_allclose(total, golden.meta["total_grad_norm"], rtol=1e-3)
    # Names differ, so norms are matched by rank; gradients that are zero in exact arithmetic
    # (biases before a softmax) are all noise: hence the median.
    theirs = golden.data["train/grad_norm"]
    theirs = np.sort(theirs[~np.isnan(theirs)])  # nan: a parameter without gradient
    # A class token that no block sees has a gradient of exactly zero (SETR's MLA).
    relative = np.abs(np.sort(norms) - theirs) / np.maximum(theirs, np.finfo(np.float64).tiny)
    assert np.median(relative) <= 1e-3


def gradient_norms(network: nn.Module, losses: dict[str, Tensor]) -> np.ndarray:
    """Of every parameter that gets a gradient."""
    sum(losses.values()).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return np.array([float(gradient.double().norm()) for gradient in gradients])


def without_dropout(network: nn.Module) -> None:
    """Set the rate of every dropout and drop path to 0, as the golden run did."""
    for module in network.modules():
        for attribute in ("p", "rate", "drop_prob", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)


def training_batch(golden: ModelGolden) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(golden_image(128, 128, 2)), torch.from_numpy(golden.label())


def logits_at_input_size(network: nn.Module, height: int, width: int) -> Tensor:
    torch.manual_seed(0)
    logits = network(torch.from_numpy(golden_image(height, width)))
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)


def rounding(network: Any, losses: dict[str, Tensor], golden: ModelGolden) -> dict[str, float]:
    """How far float32 is from float64, relative, for every term: the network's own noise."""
    image, label = training_batch(golden)
    with torch.no_grad():
        exact = copy.deepcopy(network).double().losses(image.double(), label)
    return {name: abs(1 - loss.item() / exact[name].item()) for name, loss in losses.items()}


def assert_same_losses(
    ours: dict[str, Tensor], theirs: dict[str, float], noise: dict[str, float] | None = None
) -> None:
    """Every term by name within 1e-5 (a mean of 16384 float32 pixels in another order).

    Where `noise` is larger, within three times as much: what the logits are allowed too.
    """
    wanted = {name: value for name, value in theirs.items() if "loss" in name}
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        rtol = max(1e-5, 3 * (noise or {}).get(name, 0.0))
        np.testing.assert_allclose(ours[name].item(), value, rtol=rtol)


def assert_same_classes(pred: Tensor, theirs: np.ndarray) -> None:
    """At most one pixel in 10000: ties between two classes fall either way."""
    assert (pred.numpy() != theirs).mean() <= 1e-4
