from __future__ import annotations

import math
from typing import Any, cast

import pytest
import timm
import torch
from torch import nn

from datamodules.schema import UserError
from lightning_modules.optim import (
    TrainingPhase,
    adamw,
    checked_options,
    current_phase,
    learning_rate,
    parameter_groups,
    single_phase,
    step_seed,
)


def two_phases() -> list[TrainingPhase]:
    return [
        TrainingPhase(first_epoch=0, lr={"backbone": 0.0, "head": 3e-4}, min_lr=1e-6),
        TrainingPhase(first_epoch=8, lr={"backbone": 1e-5, "head": 2e-4}, min_lr=1e-6, warmup_epochs=0.5),
    ]


def vit() -> Any:
    return timm.create_model("test_vit", num_classes=0)


def test_each_phase_has_its_own_cosine() -> None:
    def lr(part: str, step: int) -> float:
        return learning_rate(two_phases(), cast("Any", part), step, 10, 280)

    assert lr("head", 0) == pytest.approx(3e-4)
    assert lr("head", 40) == pytest.approx((3e-4 + 1e-6) / 2)
    assert lr("head", 79) < 1e-6 + 3e-4 * 0.001
    assert lr("backbone", 79) == 0
    assert lr("backbone", 80) == pytest.approx(1e-5 / 6)
    assert lr("head", 80) == pytest.approx(2e-4 / 6)
    assert lr("head", 85) == pytest.approx(2e-4)
    assert lr("backbone", 280) == pytest.approx(1e-6)


def test_a_single_phase_reads_the_options() -> None:
    phase = single_phase(1e-3, "step", {"backbone_lr": 1e-4, "step_size": 5, "gamma": 0.5})
    assert phase.lr == {"backbone": 1e-4, "head": 1e-3}
    assert learning_rate([phase], "backbone", 50, 10, 100) == pytest.approx(5e-5)


def test_a_schedule_that_needs_an_end_says_so() -> None:
    with pytest.raises(UserError, match="max_epochs"):
        learning_rate(two_phases(), "head", 100, 10, math.inf)
    phase = single_phase(1e-3, "constant", {})
    assert learning_rate([phase], "head", 10**9, 10, math.inf) == 1e-3


@pytest.mark.parametrize("firsts", [[], [1], [0, 0], [0, 8, 4]])
def test_phases_out_of_order_are_refused(firsts: list[int]) -> None:
    phases = [TrainingPhase(first_epoch=first, lr={"backbone": 1, "head": 1}) for first in firsts]
    with pytest.raises(UserError, match="epoch 0"):
        current_phase(phases, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "linear"},
        {"lr": {"head": 1e-3}},
        {"lr": {"backbone": -1.0, "head": 1e-3}},
        {"lr": {"backbone": math.nan, "head": 1e-3}},
        {"warmup_epochs": -1},
        {"step_size": 0},
        {"gamma": 2.0},
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"first_epoch": 0, "lr": {"backbone": 1e-3, "head": 1e-3}}
    with pytest.raises(UserError):
        TrainingPhase(**{**arguments, **changes})


@pytest.mark.parametrize("options", [{"learning_rate": 1}, {"layer_decay": 0.0}, {"betas": [0.9]}, {"betas": [0.9, 1]}])
def test_options_that_are_unknown_or_out_of_range_are_refused(options: Any) -> None:
    with pytest.raises(UserError, match="optim_options"):
        checked_options(options)


def test_dropout_seeds_differ_from_place_to_place_and_run_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    places = [(epoch, batch, rank) for epoch in range(3) for batch in range(3) for rank in range(3)]
    seeds = [step_seed(*place) for place in places]
    assert seeds == [step_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert not set(seeds) & {step_seed(*place) for place in places}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_every_parameter_is_in_exactly_one_group(layer_decay: float) -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    groups = parameter_groups(nn.Sequential(backbone, heads), backbone, weight_decay=0.1, layer_decay=layer_decay)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for module in (backbone, heads) for p in module.parameters())
    assert len({group["name"] for group in groups}) == len(groups)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_biases_norms_and_position_embeddings_are_not_decayed(layer_decay: float) -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    groups = parameter_groups(nn.Sequential(backbone, heads), backbone, weight_decay=0.1, layer_decay=layer_decay)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in (*backbone.named_parameters(), *heads.named_parameters()):
        exempt = parameter.ndim < 2 or name in {"pos_embed", "cls_token", "reg_token"}
        assert decay[id(parameter)] == (0.0 if exempt else 0.1), name


def test_layer_decay_slows_the_lower_layers_of_the_backbone_only() -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    groups = parameter_groups(nn.Sequential(backbone, heads), backbone, weight_decay=0.1, layer_decay=0.5)
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
    groups = parameter_groups(nn.Sequential(backbone, heads), backbone, weight_decay=0.1, frozen=frozen)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    assert {id(parameter) for parameter in frozen} <= grouped
    assert id(fixed) not in grouped
    assert not any(parameter.requires_grad for parameter in frozen)


def test_a_parameter_without_gradient_stands_still() -> None:
    backbone, heads = vit(), nn.Linear(64, 3)
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    groups = parameter_groups(
        nn.Sequential(backbone, heads), backbone, weight_decay=0.1, frozen=list(backbone.parameters())
    )
    optimizer = adamw(groups, TrainingPhase(first_epoch=0, lr={"backbone": 1.0, "head": 1.0}), {})
    before = [parameter.clone() for parameter in backbone.parameters()]
    heads(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.parameters(), strict=True))
