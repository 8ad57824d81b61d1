"""Counts with answers known by hand: 2 operations per multiply-accumulate, biases not counted."""

import torch
from torch import nn

from segmill.cost import count_flops, count_parameters


class _Mean(nn.Module):
    """Mean over the pixels, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.linear(image.mean(dim=(2, 3)))


class _Queries(nn.Module):
    """Hands a parameter of its own to another module."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(5, 3))
        self.linear = nn.Linear(3, 7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.linear(self.queries)


def test_learned_queries_are_counted():
    assert count_flops(_Queries(), channels=3, height=4, width=4) == 2 * 5 * 3 * 7


def test_a_convolution_costs_two_operations_per_kernel_value_and_output_pixel():
    # 3 x 3 kernel, 3 -> 8 channels, stride 2 and padding 1: the output of 10 x 12 is 5 x 6.
    network = nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1)
    assert count_flops(network, channels=3, height=10, width=12) == 2 * (3 * 3 * 3) * 8 * (5 * 6)


def test_a_grouped_convolution_costs_its_own_group_only():
    network = nn.Conv2d(4, 4, kernel_size=3, padding=1, groups=4, bias=False)
    assert count_flops(network, channels=4, height=6, width=6) == 2 * (3 * 3 * 1) * 4 * (6 * 6)


def test_a_linear_layer_costs_two_operations_per_weight():
    assert count_flops(_Mean(), channels=3, height=4, width=4) == 2 * 3 * 7


def test_parameters_include_frozen_ones_and_no_buffers():
    network = nn.Sequential(nn.Conv2d(3, 8, kernel_size=3), nn.BatchNorm2d(8)).requires_grad_(False)
    assert count_parameters(network) == (3 * 3 * 3 * 8 + 8) + (8 + 8)


def test_counting_leaves_the_network_where_it_was():
    network = nn.Conv2d(3, 8, kernel_size=3).train()
    count_flops(network, channels=3, height=8, width=8)
    assert network.training
    assert network.weight.device.type == "cpu"
