from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

from lightning_modules.optim import (
    TrainingPhase,
    adamw,
    checked_options,
    current_phase,
    learning_rate,
    seed_step,
    single_phase,
    step_seed,
)
from vitrail.errors import UserError


def two_phases() -> list[TrainingPhase]:
    return [
        TrainingPhase(first_epoch=0, lr={"backbone": 0.0, "head": 3e-4}, min_lr=1e-6),
        TrainingPhase(first_epoch=8, lr={"backbone": 1e-5, "head": 2e-4}, min_lr=1e-6, warmup_epochs=0.5),
    ]


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


def test_a_step_is_seeded_as_by_torch() -> None:
    torch.manual_seed(2**62 + 5)
    expected = torch.rand(4)
    torch.manual_seed(0)
    seed_step(torch.device("cpu"), 2**62 + 5)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", False)])
def test_on_a_cpu_the_optimizer_is_fused_where_gradients_can_be_clipped(precision: str, fused: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    group = {"params": [parameter], "part": "head", "lr_scale": 1.0, "weight_decay": 0.0}
    optimizer = adamw([group], single_phase(0.1, "constant", {}), {}, precision)
    assert optimizer.defaults["fused"] is fused
