"""What a network costs: parameters and floating-point operations of one forward pass."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(network: nn.Module) -> int:
    """Values that training may change, frozen ones included; buffers are not counted."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_flops(network: nn.Module, *, channels: int, height: int, width: int) -> int:
    """Multiplications plus additions (2 per multiply-accumulate) of one image's forward pass.

    Counted by PyTorch on the meta device: matrix products, convolutions and attention; nothing is
    computed. Divide by two for the MACs that many papers print as "FLOPs".
    """
    # The counter wants the gradient of parameters that go from module to module, as queries do.
    hollow = copy.deepcopy(network).to("meta").eval().requires_grad_(False)
    image = torch.empty(1, channels, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hollow(image)
    return int(counter.get_total_flops())
