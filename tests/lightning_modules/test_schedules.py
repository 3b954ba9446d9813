from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from lightning_modules.optim import ScheduleName, lr_factor, steps_of_training
from vitrail.errors import UserError

TOTAL = 40
LR = 0.02


def lrs_of_torch(scheduler: LRScheduler, optimizer: torch.optim.Optimizer, steps: int = TOTAL) -> list[float]:
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)


def after_warmup(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, warmup: int) -> LRScheduler:
    if warmup == 0:
        return scheduler
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, scheduler], milestones=[warmup])


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_schedules_are_those_of_torch_behind_a_linear_warmup(schedule: ScheduleName, warmup: int) -> None:
    optimizer = sgd()
    peer: LRScheduler
    if schedule == "constant":
        peer = ConstantLR(optimizer, factor=1.0)
    elif schedule == "cosine":
        peer = CosineAnnealingLR(optimizer, T_max=TOTAL - warmup, eta_min=LR / 50)
    else:
        peer = StepLR(optimizer, step_size=9, gamma=0.3)
    expected = lrs_of_torch(after_warmup(optimizer, peer, warmup), optimizer)
    options = {"warmup_steps": warmup, "min_factor": 1 / 50, "drop_steps": 9, "gamma": 0.3}
    found = [LR * lr_factor(schedule, step, TOTAL, **options) for step in range(TOTAL)]  # type: ignore[arg-type]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("warmup", [0, 4, 20])
def test_onecycle_is_that_of_torch(warmup: int) -> None:
    optimizer = sgd()
    rise = warmup / TOTAL if warmup else 0.3
    peer = OneCycleLR(optimizer, max_lr=LR, total_steps=TOTAL, pct_start=rise, cycle_momentum=False)
    expected = [*lrs_of_torch(peer, optimizer, TOTAL - 1), optimizer.param_groups[0]["lr"]]
    found = [LR * lr_factor("onecycle", step, TOTAL, warmup_steps=warmup) for step in range(TOTAL)]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "onecycle"])
@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_trainings_of_a_few_steps_are_no_special_case(schedule: ScheduleName, total: int, warmup: int) -> None:
    factors = [lr_factor(schedule, step, total, warmup_steps=warmup) for step in range(total + 2)]
    assert all(0 <= factor <= 1 for factor in factors)


def test_beyond_the_end_the_learning_rate_stays_where_it_ended() -> None:
    assert lr_factor("cosine", TOTAL + 5, TOTAL, min_factor=0.1) == pytest.approx(0.1)
    assert lr_factor("onecycle", TOTAL + 5, TOTAL) == pytest.approx(1 / 25e4)


def test_schedules_without_an_end_need_none() -> None:
    assert lr_factor("constant", 10**6, math.inf) == 1
    assert lr_factor("step", 25, math.inf, drop_steps=10) == pytest.approx(0.01)


def test_steps_of_a_training() -> None:
    assert steps_of_training(10, 1, 3, -1) == (10, 30)
    assert steps_of_training(10, 4, 3, -1) == (3, 9)
    assert steps_of_training(10, 1, 3, 25) == (10, 25)
    assert steps_of_training(10, 1, None, 25) == (10, 25)
    assert steps_of_training(10, 1, -1, -1) == (10, math.inf)
    with pytest.raises(UserError, match="limit_train_batches"):
        steps_of_training(math.inf, 1, 3, -1)
