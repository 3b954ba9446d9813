from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from lightning_modules.optim import TrainingPhase, adamw, parameter_groups


def vit() -> Any:
    return timm.create_model("test_vit", num_classes=0)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_every_parameter_is_in_exactly_one_group(layer_decay: float) -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    groups = parameter_groups(
        nn.Sequential(backbone, heads), {"backbone": backbone}, weight_decay=0.1, layer_decay=layer_decay
    )
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for module in (backbone, heads) for p in module.parameters())
    assert len({group["name"] for group in groups}) == len(groups)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_biases_norms_and_position_embeddings_are_not_decayed(layer_decay: float) -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    groups = parameter_groups(
        nn.Sequential(backbone, heads), {"backbone": backbone}, weight_decay=0.1, layer_decay=layer_decay
    )
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in (*backbone.named_parameters(), *heads.named_parameters()):
        exempt = parameter.ndim < 2 or name in {"pos_embed", "cls_token", "reg_token"}
        assert decay[id(parameter)] == (0.0 if exempt else 0.1), name


def test_layer_decay_slows_the_lower_layers_of_the_backbone_only() -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    groups = parameter_groups(nn.Sequential(backbone, heads), {"backbone": backbone}, weight_decay=0.1, layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    blocks = [scale[id(block.attn.qkv.weight)] for block in backbone.blocks]
    assert blocks == [blocks[-1] * 0.5**depth for depth in reversed(range(len(blocks)))]
    assert scale[id(backbone.patch_embed.proj.weight)] == blocks[0] / 2
    assert scale[id(backbone.norm.weight)] == 1
    assert scale[id(heads.weight)] == 1
    phase = TrainingPhase(first_epoch=0, lr={"backbone": 1e-4, "head": 1e-3})
    optimizer = adamw(groups, phase, {"betas": [0.8, 0.9], "eps": 1e-6})
    lr = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert lr[id(backbone.blocks[-1].attn.qkv.weight)] == pytest.approx(1e-4 * blocks[-1])
    assert lr[id(heads.weight)] == 1e-3
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-6


def test_what_is_frozen_for_now_has_a_group_and_what_is_fixed_has_none() -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    fixed, frozen = backbone.pos_embed, list(backbone.blocks.parameters())
    for parameter in (fixed, *frozen):
        parameter.requires_grad_(False)
    groups = parameter_groups(nn.Sequential(backbone, heads), {"backbone": backbone}, weight_decay=0.1, frozen=frozen)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    assert {id(parameter) for parameter in frozen} <= grouped
    assert id(fixed) not in grouped
    assert not any(parameter.requires_grad for parameter in frozen)


def test_a_parameter_without_gradient_stands_still() -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    groups = parameter_groups(
        nn.Sequential(backbone, heads), {"backbone": backbone}, weight_decay=0.1, frozen=list(backbone.parameters())
    )
    optimizer = adamw(groups, TrainingPhase(first_epoch=0, lr={"backbone": 1.0, "head": 1.0}), {})
    before = [parameter.clone() for parameter in backbone.parameters()]
    heads(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.parameters(), strict=True))


def test_several_backbones_and_a_temperature_have_groups_of_their_own() -> None:
    model = nn.ModuleDict({"image": nn.Linear(4, 3), "text": nn.Linear(5, 3), "head": nn.Linear(3, 3)})
    scale = nn.Parameter(torch.tensor(2.6))
    model.register_parameter("scale", scale)
    backbones: dict[str, nn.Module] = {"image_backbone": model["image"], "text_backbone": model["text"]}
    groups = parameter_groups(model, backbones, weight_decay=0.1, temperature=[scale], temperature_lr=1e-2)
    names = {group["name"]: group for group in groups}
    assert {"image_backbone_decay", "text_backbone_no_decay", "head_decay", "temperature"} <= names.keys()
    assert names["temperature"]["weight_decay"] == 0.0
    optimizer = adamw(groups, TrainingPhase(first_epoch=0, lr={"backbone": 1e-5, "head": 1e-3}), {})
    lr = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert (lr["image_backbone_decay"], lr["head_decay"], lr["temperature"]) == (1e-5, 1e-3, 1e-2)


def test_layer_decay_of_a_transformers_model_slows_its_lower_layers() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=30)
    backbone: Any = BertModel(config, add_pooling_layer=False)
    groups = parameter_groups(backbone, {"text": backbone}, weight_decay=0.1, layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    layers = [scale[id(layer.attention.self.query.weight)] for layer in backbone.encoder.layer]
    assert layers == [0.125, 0.25, 0.5]
    assert scale[id(backbone.embeddings.word_embeddings.weight)] == 0.0625
    assert len(scale) == len(list(backbone.parameters()))
