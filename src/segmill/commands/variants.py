"""Networks of variants without memory, by name."""

import torch
from torch import nn

from segmill.configuration import build, compose


def meta_network(name: str, num_classes: int) -> nn.Module:
    """The variant's network on torch's meta device, with as many channels as it has means."""
    keys = [f"model={name}", f"data.num_classes={num_classes}"]
    channels = len(compose("load", [*keys, "data.channels=3"]).model.mean)
    with torch.device("meta"):
        return build(compose("load", [*keys, f"data.channels={channels}"]).model.network)
