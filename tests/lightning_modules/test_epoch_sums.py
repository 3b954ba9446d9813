from __future__ import annotations

from typing import cast

import torch

from lightning_modules.losses import MeanLoss
from lightning_modules.metrics import MeanOverSamples, SplitMetrics, epoch_sums, restore_epoch_sums


def counted(values: list[float]) -> SplitMetrics:
    metrics = SplitMetrics({"class": ["a", "b"], "colour": ["c", "d"]}, {"class": 1.0, "colour": 0.5}, losses_only=True)
    for value in values:
        losses = {
            task: MeanLoss(torch.tensor(value * (2 if task == "colour" else 1)), torch.tensor(3.0))
            for task in ("class", "colour")
        }
        metrics.update_losses(losses)
    return metrics


def test_an_epoch_in_two_parts_has_the_averages_of_the_whole() -> None:
    first, second = [0.1, 0.7, 1 / 3], [5.5, 0.9]
    saved = epoch_sums(counted(first), lambda value: value)
    resumed = counted([9.0])
    restore_epoch_sums(resumed, saved, is_first=True)
    for value in second:
        resumed.update_losses(
            {
                task: MeanLoss(torch.tensor(value * (2 if task == "colour" else 1)), torch.tensor(3.0))
                for task in ("class", "colour")
            }
        )
    assert resumed.compute() == counted(first + second).compute()


def test_what_all_processes_have_counted_goes_to_the_first() -> None:
    saved = epoch_sums(counted([1.0]), lambda value: value * 2)
    first, second = counted([]), counted([])
    restore_epoch_sums(first, saved, is_first=True)
    restore_epoch_sums(second, saved, is_first=False)
    assert first.compute()["class/loss"] == 1.0
    assert cast("MeanOverSamples", second.known[0]).compute() == 0


def test_nothing_counted_stays_nothing() -> None:
    mean = MeanOverSamples()
    saved = epoch_sums(mean, lambda value: value)
    assert saved == {}
    mean.update(torch.tensor(3.0), 2)
    restore_epoch_sums(mean, saved, is_first=True)
    assert mean.compute() is None
