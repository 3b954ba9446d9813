from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss, top_k_accuracy_score
from torchmetrics import Metric

from lightning_modules.heads.single_label import masked_cross_entropy
from lightning_modules.metrics import (
    MeanLoss,
    MeanOverSamples,
    SplitMetrics,
    TaskScores,
    epoch_sums,
    predicted_classes,
    restore_epoch_sums,
)
from vitrail.types import UNKNOWN

# "type" is a method of torch's modules, and a dot separates their names: neither may matter.
TASKS = {"class": list("abcdefg"), "type": list("xyz"), "sleeve.length": list("pq")}
WEIGHTS = {"class": 1.0, "type": 0.5, "sleeve.length": 2.0}

Samples = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def samples(count: int, seed: int = 0) -> Samples:
    """Logits that lean to the target; class 4 never occurs, class 5 only among the predictions."""
    generator = torch.Generator().manual_seed(seed)
    logits, targets = {}, {}
    for task, names in TASKS.items():
        target = torch.randint(0, len(names), (count,), generator=generator)
        logits[task] = torch.randn(count, len(names), generator=generator)
        logits[task][torch.arange(count), target] += 0.7
        target[torch.rand(count, generator=generator) < 0.2] = UNKNOWN
        targets[task] = target
    targets["class"][(targets["class"] == 4) | (targets["class"] == 5)] = 1
    logits["class"][:, 4] = -9
    return logits, targets


def feed(metrics: SplitMetrics, data: Samples, sizes: list[int]) -> None:
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        logits = {task: values[rows] for task, values in data[0].items()}
        targets = {task: values[rows] for task, values in data[1].items()}
        metrics.update_losses({task: masked_cross_entropy(logits[task], targets[task]) for task in logits})
        metrics.update_scores(logits, targets)
        start += size


def by_scikit_learn(data: Samples) -> dict[str, float]:
    values, total = {}, 0.0
    for task, names in TASKS.items():
        known = (data[1][task] != UNKNOWN).numpy()
        target, logits = data[1][task].numpy()[known], data[0][task].numpy()[known]
        labels, predicted = list(range(len(names))), logits.argmax(1)
        probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
        values[f"{task}/loss"] = log_loss(target, probabilities, labels=labels)
        values[f"{task}/accuracy"] = accuracy_score(target, predicted)
        values[f"{task}/f1_macro"] = f1_score(target, predicted, average="macro")
        values[f"{task}/f1_weighted"] = f1_score(target, predicted, average="weighted")
        values[f"{task}/mean_per_class"] = balanced_accuracy_score(target, predicted)
        for k in (3, 5):
            if k < len(names):
                values[f"{task}/top{k}"] = top_k_accuracy_score(target, logits, k=k, labels=labels)
        total += WEIGHTS[task] * values[f"{task}/loss"]
    return {"loss": total, **values}


def numbers(metrics: SplitMetrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.mark.parametrize("sizes", [[40], [16, 16, 8], [1, 39]])
def test_scores_are_those_of_scikit_learn_however_samples_are_batched(sizes: list[int]) -> None:
    metrics, data = SplitMetrics(TASKS, WEIGHTS), samples(40)
    predicted = set(data[0]["class"].argmax(1).tolist())
    assert 5 in predicted
    assert 4 not in predicted
    feed(metrics, data, sizes)
    assert numbers(metrics) == pytest.approx(by_scikit_learn(data), rel=1e-5)


def test_classes_count_in_macro_f1_if_they_occur_among_targets_or_predictions() -> None:
    metrics = SplitMetrics({"class": list("abcd")}, {"class": 1.0})
    target, predicted = torch.tensor([0, 0, 1, UNKNOWN]), torch.tensor([0, 2, 1, 3])
    metrics.update_losses({"class": masked_cross_entropy(torch.eye(4)[predicted], target)})
    metrics.update_scores({"class": torch.eye(4)[predicted]}, {"class": target})
    # a: 2/3, b: 1, c was predicted wrongly: 0, d only for an unknown target: left out.
    assert numbers(metrics)["class/f1_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def scores_of(targets: list[int], logits: torch.Tensor) -> dict[str, float]:
    scores = TaskScores(logits.shape[1])
    scores.update(logits, torch.tensor(targets))
    return {name: float(value) for name, value in scores.compute().items()}


def test_mean_per_class_does_not_depend_on_which_wrong_class_is_predicted() -> None:
    """Of six classes two have samples; both models recognise the same three of four samples."""
    targets = [0, 0, 1, 1]
    for wrong in (1, 2, 5):
        scores = scores_of(targets, torch.eye(6)[[0, wrong, 1, 1]])
        assert scores["mean_per_class"] == pytest.approx((1 / 2 + 1) / 2)
        assert scores["accuracy"] == 3 / 4


def test_equal_logits_are_no_prediction_and_never_right() -> None:
    logits = torch.tensor([[2.0, 2, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 3, 0, 0, 0, torch.nan], [1, 0, 0, 0, 0, 0]])
    assert predicted_classes(logits).tolist() == [UNKNOWN, UNKNOWN, UNKNOWN, 0]
    for targets in ([0, 0, 1, 0], [1, 5, 1, 0]):
        scores = scores_of(targets, logits)
        assert scores["accuracy"] == 1 / 4
        # The tied class of the first sample is among the first three, a class of the second is nowhere.
        assert scores["top3"] == 3 / 4
    # Two samples of class 0 have no prediction, the third is right: precision 1, recall 1/3.
    assert scores_of([0, 0, 0], logits[[0, 1, 3]])["f1_macro"] == pytest.approx(2 * (1 / 3) / (1 + 1 / 3))


def test_tasks_without_known_targets_are_left_out() -> None:
    metrics, (logits, targets) = SplitMetrics(TASKS, WEIGHTS), samples(8)
    targets["type"][:] = UNKNOWN
    feed(metrics, (logits, targets), [8])
    values = numbers(metrics)
    assert not any(name.startswith("type/") for name in values)
    assert np.isfinite(list(values.values())).all()
    assert values["loss"] == pytest.approx(values["class/loss"] + 2 * values["sleeve.length/loss"])
    metrics.reset()
    feed(metrics, (logits, {task: torch.full((8,), UNKNOWN) for task in TASKS}), [8])
    assert numbers(metrics) == {"loss": pytest.approx(np.nan, nan_ok=True)}  # 0 would be the best epoch


def test_a_nan_loss_is_reported() -> None:
    metrics, (logits, targets) = SplitMetrics(TASKS, WEIGHTS), samples(8)
    logits["type"][:] = torch.nan
    feed(metrics, (logits, targets), [8])
    assert np.isnan(numbers(metrics)["loss"])


def test_a_single_task_has_no_loss_of_its_own_and_training_has_no_scores() -> None:
    metrics = SplitMetrics({"class": list("abc")}, {"class": 1.0}, losses_only=True)
    metrics.update_losses({"class": masked_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))})
    assert numbers(metrics) == {"loss": pytest.approx(np.log(3))}


def test_reset_clears_everything_and_nothing_is_saved_with_the_model() -> None:
    metrics, data = SplitMetrics(TASKS, WEIGHTS), samples(40)
    assert not metrics.state_dict()
    feed(metrics, samples(12, seed=1), [12])
    metrics.compute()
    metrics.reset()
    feed(metrics, data, [40])
    assert numbers(metrics) == pytest.approx(by_scikit_learn(data), rel=1e-5)


def two_shares() -> tuple[Samples, Samples]:
    """29 samples and eleven; of the eleven no "type" is known."""
    logits, targets = samples(40)
    targets["type"][29:] = UNKNOWN
    first, second = (
        ({task: v[rows] for task, v in logits.items()}, {task: v[rows] for task, v in targets.items()})
        for rows in (slice(29), slice(29, 40))
    )
    return first, second


def joined(first: Samples, second: Samples) -> Samples:
    return (
        {task: torch.cat([first[0][task], second[0][task]]) for task in TASKS},
        {task: torch.cat([first[1][task], second[1][task]]) for task in TASKS},
    )


def test_unequal_shares_join_as_processes_join_them() -> None:
    first, second = SplitMetrics(TASKS, WEIGHTS), SplitMetrics(TASKS, WEIGHTS)
    shares = two_shares()
    feed(first, shares[0], [20, 9])
    feed(second, shares[1], [11])
    for mine, other in zip(first.modules(), second.modules(), strict=True):
        if isinstance(mine, Metric) and isinstance(other, Metric):
            mine.merge_state(other)
    assert numbers(first) == pytest.approx(by_scikit_learn(joined(*shares)), rel=1e-5)


def counted(values: list[float], metrics: SplitMetrics | None = None) -> SplitMetrics:
    weights = {"class": 1.0, "colour": 0.5}
    metrics = metrics or SplitMetrics({"class": ["a", "b"], "colour": ["c", "d"]}, weights, losses_only=True)
    for value in values:
        losses = {"class": torch.tensor(value), "colour": torch.tensor(2 * value)}
        metrics.update_losses({task: MeanLoss(loss, torch.tensor(3.0)) for task, loss in losses.items()})
    return metrics


def test_an_epoch_in_two_parts_has_the_averages_of_the_whole() -> None:
    first, second = [0.1, 0.7, 1 / 3], [5.5, 0.9]
    saved = epoch_sums(counted(first), lambda value: value)
    resumed = counted([9.0])
    restore_epoch_sums(resumed, saved, is_first=True)
    assert counted(second, resumed).compute() == counted(first + second).compute()


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
