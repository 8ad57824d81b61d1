"""Classifiers of a few hundred weights and batches of four images, for methods under test."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from segmill.tta.batch_statistics import BatchStatistics
from segmill.tta.method import Views
from tiny_methods import BatchNormNet, LayerNormNet, TorchUpdater, optimizer_of

SIZE = 24
# float32; sums and their gradients in another order.
CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 0.0}


class BatchNormClassifier(BatchNormNet):
    """One pixel of logits an image."""

    SHARPNESS = 3.0

    def forward(self, image):
        return super().forward(image).mean(dim=(2, 3), keepdim=True)


class LayerNormClassifier(LayerNormNet):
    """One pixel of logits an image."""

    SHARPNESS = 9.0

    def forward(self, image):
        return super().forward(image).mean(dim=(2, 3), keepdim=True)


CLASSIFIERS = [BatchNormClassifier, LayerNormClassifier]


def batch_of_views(seed: int, *, count: int = 4, size: int = SIZE) -> Views:
    """Patches of colour, other ones in every image."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(count, 3, 3, 3, generator=generator)
    image = (255 * F.interpolate(patches, (size, size), mode="nearest")).to(torch.uint8)
    return Views(image=image, original=image)


BATCHES = [batch_of_views(seed) for seed in range(4)]


def adapt_to_batches(
    method: Any, *, lr: float = 0.05, seed: int = 0, batch_statistics: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor], TorchUpdater]:
    """Logits and losses of all batches, and the updater."""
    parameters = method.parameters_to_update()
    for name, parameter in method.model.named_parameters():
        parameter.requires_grad_(name in parameters)
    updater = TorchUpdater(optimizer_of(parameters, lr=lr))
    generator = torch.Generator().manual_seed(seed)
    statistics = BatchStatistics(method.model.discriminative)
    if batch_statistics:
        statistics.apply()
    results = [method.adapt(views, updater, generator) for views in BATCHES]
    statistics.undo()
    return [logits for logits, _ in results], [loss for _, loss in results], updater


def momentum_step(
    weights: Sequence[torch.Tensor], gradients: Any, velocity: Any, lr: float
) -> None:
    """What SGD with momentum 0.9 does, for references."""
    for weight, gradient, speed in zip(weights, gradients, velocity, strict=True):
        speed.mul_(0.9).add_(gradient)
        weight.data.sub_(lr * speed)


def norm_weights(network: BatchNormNet | LayerNormNet) -> list[torch.Tensor]:
    """Scales and shifts of the normalisation layers."""
    return [
        each
        for name, each in network.named_parameters()
        if name.rpartition(".")[0] in network.LAYERS
    ]


def batch_statistics_on(network: BatchNormNet | LayerNormNet) -> None:
    """For references: BatchNorm in train mode, all else in eval mode."""
    for name in ("first", "second", "pooled"):
        if isinstance(network, BatchNormNet):
            getattr(network, name).train()


def check_same_weights(network: Any, expected: Any, before: dict[str, torch.Tensor]) -> None:
    """Equal to rounding, and moved by far more where the reference has moved."""
    found, wanted = dict(network.named_parameters()), dict(expected.named_parameters())
    moved = 0
    for name, each in found.items():
        torch.testing.assert_close(each, wanted[name], **CLOSE)
        moved += bool((wanted[name] - before[name]).abs().max() > 1e-3)
    assert moved > 0
