"""Affine parameters of the discriminative model's normalisation layers, chosen by type."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from segmill.errors import SegmillError
from segmill.models.combined import DISCRIMINATIVE, CombinedModel, norm_parameters


def norm_layers(model: CombinedModel) -> list[list[str]]:
    """The names of each layer's parameters; the layers in the order in which they were built.

    That is from the image to the logits, as a trunk is built before its head.
    """
    norms = norm_parameters(model)
    layers: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        if name in norms and name.startswith(DISCRIMINATIVE):
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    if not layers:
        network = type(model.discriminative.network).__name__
        raise SegmillError(
            f"This method adapts the weights of normalisation layers, and {network} has none. "
            "Choose another model, or a method that updates all weights: tta=cotta or tta=dusa."
        )
    return list(layers.values())


def has_batchnorm(module: nn.Module) -> bool:
    """Whether any layer keeps moving averages of its input, as methods exchange them."""
    return any(isinstance(each, _BatchNorm) for each in module.modules())
