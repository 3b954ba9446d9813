from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from evaluation.statistics import intervals as statistics
from evaluation.statistics.pooled import join_runs, repetitions
from tests.evaluation.predictions_fixture import make_predictions
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.types import UNKNOWN


def another_seed(predictions: Predictions, seed: int) -> Predictions:
    rng = np.random.default_rng(seed)
    logits = {task: values + rng.normal(size=values.shape) for task, values in predictions.logits.items()}
    return replace(predictions, logits={task: values.astype(np.float32) for task, values in logits.items()})


def accuracy(predictions: Predictions, task: str = "class") -> float:
    known = predictions.targets[task] != UNKNOWN
    return float(metrics.accuracy_score(predictions.targets[task][known], predictions.predicted(task)[known]))


@pytest.fixture
def runs() -> list[Predictions]:
    return [another_seed(make_predictions(60), seed) for seed in (1, 2, 3)]


def test_seeds_have_mean_spread_and_students_interval(runs: list[Predictions]) -> None:
    # Another order of the samples is the same test set.
    runs[1] = runs[1].take(np.random.default_rng(0).permutation(60))
    joined = join_runs(runs, "class", ["a", "b", "c"])
    values = [accuracy(run) for run in runs]
    assert (joined.kind, joined.runs) == ("seeds", ("a", "b", "c"))
    assert joined.accuracy.values == pytest.approx(values)
    assert joined.accuracy.mean == pytest.approx(np.mean(values))
    assert joined.accuracy.std == pytest.approx(np.std(values, ddof=1))
    expected = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    assert joined.accuracy.interval == pytest.approx((max(0, expected[0]), min(1, expected[1])))
    assert joined.accuracy.pooled.value == pytest.approx(np.mean(values))
    assert joined.n == int((runs[0].targets["class"] != UNKNOWN).sum())
    assert joined.groups == 15


def test_interval_by_group_resamples_all_seeds_alike(runs: list[Predictions]) -> None:
    joined = join_runs(runs, "class", n_resamples=500)
    rows = statistics.known(runs[0].targets["class"])
    shares = np.mean([run.predicted("class")[rows] == run.targets["class"][rows] for run in runs], axis=0)
    expected = statistics.group_bootstrap(statistics.share_statistic(shares), runs[0].groups[rows], 500)
    assert joined.accuracy.pooled.interval == pytest.approx(expected)


def test_folds_are_pooled(runs: list[Predictions]) -> None:
    whole = runs[0]
    folds = [whole.take(np.arange(start, start + 20)) for start in (40, 0, 20)]
    joined = join_runs(folds, "class")
    assert (joined.kind, joined.n, joined.groups) == ("folds", int((whole.targets["class"] != UNKNOWN).sum()), 15)
    assert joined.accuracy.values == pytest.approx([accuracy(fold) for fold in folds])
    assert joined.accuracy.pooled.value == pytest.approx(accuracy(whole))
    known = whole.targets["class"] != UNKNOWN
    f1 = metrics.f1_score(whole.targets["class"][known], whole.predicted("class")[known], average="macro")
    assert joined.f1_macro.pooled.value == pytest.approx(f1)
    assert joined.f1_macro.mean != pytest.approx(f1)  # F1 of parts is no part of F1


def test_folds_with_several_seeds(runs: list[Predictions]) -> None:
    parts = np.arange(0, 30), np.arange(30, 60)
    mixed = [run.take(part) for run in runs for part in parts]
    joined = join_runs(mixed, "class")
    assert joined.kind == "seeds and folds"
    assert joined.accuracy.pooled.interval == pytest.approx(join_runs(runs, "class").accuracy.pooled.interval)
    whole = repetitions(mixed, "class", [str(index) for index in range(6)])
    assert [accuracy(run) for run in whole] == pytest.approx([accuracy(run) for run in runs])


def test_a_fold_may_not_know_a_class(runs: list[Predictions]) -> None:
    whole = runs[0]
    folds = [whole.take(np.arange(30)), whole.take(np.arange(30, 60))]
    # The second fold's train split has no cap: its model answers bag or mug, and where a cap is, the target is unknown.
    targets = np.array([{-1: -1, 0: 1, 1: -1, 2: 0}[target] for target in folds[1].targets["class"].tolist()])
    lesser = replace(
        folds[1],
        tasks={"class": ["mug", "bag"], "colour": ["red"]},
        targets={"class": targets},
        logits={"class": folds[1].logits["class"][:, [2, 0]]},
    )
    joined = join_runs([folds[0], lesser], "class", n_resamples=200)
    answers: list[str] = []
    truth: list[str] = []
    for fold in (folds[0], lesser):
        known = fold.targets["class"] != UNKNOWN
        for values, parts in ((fold.predicted("class"), answers), (fold.targets["class"], truth)):
            parts += [fold.tasks["class"][index] for index in values[known].tolist()]
    assert joined.n == len(truth)
    assert joined.accuracy.pooled.value == pytest.approx(metrics.accuracy_score(truth, answers))
    assert joined.f1_macro.pooled.value == pytest.approx(metrics.f1_score(truth, answers, average="macro"))
    whole_again = repetitions([folds[0], lesser], "class", ["a", "b"])[0]
    assert whole_again.probabilities("class")[30:, 1].max() == 0
    turned = repetitions([lesser, folds[0]], "class", ["b", "a"])[0]
    assert turned.tasks == whole_again.tasks


def test_one_run_has_no_spread(runs: list[Predictions]) -> None:
    joined = join_runs(runs[:1], "class")
    assert joined.kind == "one run"
    assert math.isnan(joined.accuracy.std)
    assert math.isnan(joined.accuracy.interval.low)
    assert joined.accuracy.pooled.value == pytest.approx(accuracy(runs[0]))


def test_a_fold_without_known_targets_has_no_value(runs: list[Predictions]) -> None:
    folds = [runs[0].take(np.arange(30)), runs[0].take(np.arange(30, 60))]
    folds[1].targets["class"][:] = UNKNOWN
    joined = join_runs(folds, "class")
    assert math.isnan(joined.accuracy.values[1])
    assert joined.accuracy.mean == pytest.approx(accuracy(folds[0]))
    folds[0].targets["class"][:] = UNKNOWN
    nothing = join_runs(folds, "class")
    assert nothing.n == 0
    assert math.isnan(nothing.accuracy.mean)
    assert math.isnan(nothing.f1_macro.pooled.interval.high)


def test_what_does_not_belong_together_is_refused(runs: list[Predictions]) -> None:
    whole = runs[0]
    with pytest.raises(UserError, match=r"b and a share 30 test samples \(first 'photo 0'\) but not all"):
        join_runs([whole, whole.take(np.arange(30))], "class", ["a", "b"])
    halves = [whole.take(np.arange(30)), whole.take(np.arange(30, 60))]
    with pytest.raises(UserError, match="test set of a was run 2 times and that of b 1 times"):
        join_runs([halves[0], halves[1], halves[0]], "class", ["a", "b", "c"])
    with pytest.raises(UserError, match="b and a have no class of 'class' in common"):
        join_runs([halves[0], replace(halves[1], tasks={"class": ["pen", "hat", "cup"]})], "class", ["a", "b"])
    with pytest.raises(UserError, match="the classes of 'class' differ"):
        join_runs([whole, replace(whole, tasks={**whole.tasks, "class": ["bag", "hat", "mug"]})], "class")
    with pytest.raises(UserError, match="run 1: has no task 'size'"):
        join_runs(runs, "size")
    with pytest.raises(UserError, match="a: several samples have the same name"):
        join_runs([whole.take(np.zeros(2, dtype=np.int64))], "class", ["a"])
    targets = {**whole.targets, "class": (whole.targets["class"] + 1) % 3}
    with pytest.raises(UserError, match=r"predictions in b and in a: .* samples have another target of 'class'"):
        join_runs([whole, replace(whole, targets=targets)], "class", ["a", "b"])
