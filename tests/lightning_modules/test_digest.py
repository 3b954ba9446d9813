from __future__ import annotations

import torch
from torch import nn

from lightning_modules.base import weights_digest


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_same_weights_have_the_same_name() -> None:
    first, second = network(), network(1)
    assert weights_digest(first) == weights_digest(network())
    assert weights_digest(first) != weights_digest(second)
    second.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(second)
    assert len(weights_digest(first)) == 64


def test_one_bit_a_type_a_shape_and_a_buffer_count() -> None:
    digests = {weights_digest(network()), weights_digest(network().half())}
    nudged = network()
    with torch.no_grad():
        weight = next(nudged.parameters())
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    digests.add(weights_digest(nudged))
    counted = network()
    dict(counted.named_buffers())["1.running_mean"].add_(1)
    digests.add(weights_digest(counted))
    flat = nn.Module()
    flat.register_buffer("x", torch.zeros(4))
    square = nn.Module()
    square.register_buffer("x", torch.zeros(2, 2))
    digests |= {weights_digest(flat), weights_digest(square)}
    assert len(digests) == 6
