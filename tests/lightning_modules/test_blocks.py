from __future__ import annotations

import pytest
import timm
from torch import nn
from transformers import DistilBertConfig, DistilBertModel

from lightning_modules.optim import blocks, layer_depths, layer_scales
from vitrail.errors import UserError


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [("vit_tiny_patch16_224", 12, "Block"), ("resnet18", 2, "BasicBlock"), ("regnetx_002", 7, "Bottleneck")],
)
def test_blocks_are_those_that_a_network_is_mainly_made_of(name: str, count: int, kind: str) -> None:
    found = blocks(timm.create_model(name), name)
    assert [type(block).__name__ for block in found] == [kind] * count


def test_depths_rise_from_the_embedding_to_what_follows_the_blocks() -> None:
    config = DistilBertConfig(dim=8, n_layers=3, n_heads=2, hidden_dim=16, vocab_size=20, max_position_embeddings=10)
    network = nn.Sequential()
    network.add_module("model", DistilBertModel(config))
    network.add_module("norm", nn.LayerNorm(8))
    depths = layer_depths(network, "the network")
    assert depths["model.embeddings.word_embeddings.weight"] == 0
    assert depths["model.transformer.layer.0.attention.q_lin.weight"] == 1
    assert depths["model.transformer.layer.2.ffn.lin1.bias"] == 3
    assert depths["norm.weight"] == 4
    scales = layer_scales(network, "the network", 0.5)
    assert scales["norm.weight"] == 1.0
    assert scales["model.embeddings.word_embeddings.weight"] == 0.5**4


def test_a_network_without_blocks_says_so() -> None:
    with pytest.raises(UserError, match="the text tower has no blocks"):
        blocks(nn.Linear(2, 2), "the text tower")
