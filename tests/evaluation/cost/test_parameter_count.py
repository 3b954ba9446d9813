from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from evaluation.cost.efficiency import parameter_count


def test_each_parameter_counts_once_and_frozen_ones_can_be_left_out() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    both = nn.Sequential(first, second)
    assert parameter_count(both) == 12 + 4 + 4
    assert parameter_count(both, trainable_only=True) == 12 + 4


def test_packed_weights_count_as_what_they_stand_for() -> None:
    layer = nn.Linear(8, 4, bias=False)
    layer.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = SimpleNamespace(shape=torch.Size((4, 8)))  # type: ignore[attr-defined]  # as bitsandbytes
    assert parameter_count(layer) == 32
