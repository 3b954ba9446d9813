from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from evaluation.statistics import intervals as statistics
from evaluation.statistics.intervals import share_statistic, variance_of_mean, wilson
from evaluation.statistics.pooled import in_order_of, join_runs, paired_difference, paired_share_interval, repetitions
from tests.evaluation.predictions_fixture import make_predictions, make_predictions_of_every_kind
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
    expected = statistics.group_interval(statistics.share_statistic(shares), runs[0].groups[rows], 500)
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


def test_rows_are_paired_by_name() -> None:
    after = make_predictions(20)
    # Another numbering and other groups, as a data set with other options may have.
    other = replace(after, sample_id=after.sample_id + 7, groups=after.names)
    paired = in_order_of(after, other.take(np.random.default_rng(0).permutation(20)), "class")
    np.testing.assert_array_equal(paired.names, after.names)
    np.testing.assert_array_equal(paired.logits["class"], after.logits["class"])
    np.testing.assert_array_equal(paired.groups, after.groups)


def test_what_differs_is_named() -> None:
    after = make_predictions(20)
    first = r"^predictions before and after: "
    with pytest.raises(UserError, match=first + r"the samples differ: 2 only after \(first 'photo 0'\); test both"):
        in_order_of(after, after.take(np.arange(2, 20)), "class")
    with pytest.raises(UserError, match=r"3 only after \(first 'photo 0'\), 3 only before \(first 'photo 20'\)"):
        in_order_of(after, make_predictions(20, first_id=3), "class")
    targets = {
        **after.targets,
        "class": np.where(np.arange(20) == 5, 2 - after.targets["class"], after.targets["class"]),
    }
    with pytest.raises(UserError, match=r"1 of 20 samples have another target of 'class', first 'photo 5'"):
        in_order_of(after, replace(after, targets=targets), "class")
    with pytest.raises(UserError, match="several samples have the same name"):
        in_order_of(after, replace(after, names=np.array(["photo"] * 20, dtype=object)), "class")


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["bag", "hat", "mug"], "number 1 is 'cap' after and 'hat' before"),
        (["bag", "cap"], "3 after, 2 before"),
        ([], "3 after, 0 before"),
    ],
)
def test_classes_must_agree(classes: list[str], said: str) -> None:
    after = make_predictions(8)
    with pytest.raises(UserError, match=f"the classes of 'class' differ: {said}"):
        in_order_of(after, replace(after, tasks={"class": classes}), "class")


def test_paired_difference_equals_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    first, second = ((rng.random(200) < share).astype(float) for share in (0.8, 0.6))
    expected = scipy.stats.bootstrap(
        (first, second),
        lambda x, y, axis: (x - y).mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    statistics = share_statistic(first), share_statistic(second)
    found = paired_difference(*statistics, np.arange(200), False, 10_000)
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.interval == pytest.approx((expected.low, expected.high), abs=0.012)  # in steps of 1/200


@pytest.mark.parametrize(("gains", "losses"), [(12, 3), (1, 0), (7, 7), (40, 2)])
def test_paired_interval_ends_where_the_score_test_rejects(gains: int, losses: int) -> None:
    """Tango's interval: the score of the difference at its maximum-likelihood estimate under each end."""
    n = 60
    differences = np.array([1.0] * gains + [-1.0] * losses + [0.0] * (n - gains - losses))
    interval = paired_share_interval(differences, np.arange(n))
    pairs = n * differences.var() / n / variance_of_mean(differences, np.arange(n))
    for end, sign in zip(interval, (1, -1), strict=True):

        def negative_likelihood(only_second: float, end: float = end) -> float:
            chances = np.clip([only_second + end, only_second, 1 - 2 * only_second - end], 1e-12, 1)
            return float(-np.array([gains, losses, n - gains - losses]) @ np.log(chances))

        bounds = (max(0.0, -end), (1 - end) / 2)
        only_second = scipy.optimize.minimize_scalar(
            negative_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}
        ).x
        score = (differences.mean() - end) / np.sqrt((2 * only_second + end - end**2) / pairs)
        assert score == pytest.approx(sign * scipy.stats.t.ppf(0.975, n - 1), rel=1e-3)


def test_models_that_agree_could_differ_in_a_group_not_seen() -> None:
    statistic = share_statistic(np.arange(30) % 2)
    found = paired_difference(statistic, statistic, np.arange(30) // 3, True)
    most = wilson(0.0, 10).high
    assert found == (0.0, (-most, most))


@pytest.mark.parametrize("task", ["grade", "tags", "price"])
def test_seeds_and_folds_of_every_kind(task: str) -> None:
    seeds = [make_predictions_of_every_kind(), another_seed(make_predictions_of_every_kind(), 1)]
    joined = join_runs(seeds, task, n_resamples=50)
    score = joined.main_score
    assert (joined.kind, joined.n) == ("seeds", len(seeds[0].known(task)))
    assert score.values[0] != score.values[1]
    assert score.pooled.value == pytest.approx(score.mean)
    whole = make_predictions_of_every_kind()
    folds = [whole.take(np.arange(30)), whole.take(np.arange(30, 60))]
    joined, alone = (join_runs(runs, task, n_resamples=50) for runs in (folds, [whole]))
    assert joined.kind == "folds"
    assert joined.main_score.pooled.value == pytest.approx(alone.main_score.pooled.value)
    assert len(set(joined.main_score.values)) == 2


def test_labels_of_folds_keep_their_thresholds_and_places() -> None:
    whole = make_predictions_of_every_kind()
    first, second = (whole.take(np.arange(start, start + 30)) for start in (0, 30))
    # The second fold lacks a label, and has thresholds of its own.
    second = replace(
        second,
        tasks={**second.tasks, "tags": ["lid", "red"]},
        targets={**second.targets, "tags": second.targets["tags"][:, 1:]},
        logits={**second.logits, "tags": second.logits["tags"][:, 1:]},
        thresholds={"tags": [0.9, 0.1]},
    )
    [joined] = repetitions([first, second], "tags", ["a", "b"])
    assert joined.tasks["tags"] == ["dots", "lid", "red"]
    np.testing.assert_array_equal(joined.predicted_labels("tags")[:30], first.predicted_labels("tags"))
    np.testing.assert_array_equal(joined.predicted_labels("tags")[30:, 1:], second.predicted_labels("tags"))
    assert (joined.targets["tags"][30:, 0] == UNKNOWN).all()
    assert not joined.predicted_labels("tags")[30:, 0].any()


def test_ordered_classes_must_be_the_same_in_all_folds() -> None:
    whole = make_predictions_of_every_kind()
    first, second = whole.take(np.arange(30)), whole.take(np.arange(30, 60))
    second = replace(second, tasks={**second.tasks, "grade": ["bad", "good", "fair", "new"]})
    with pytest.raises(UserError, match="ordered classes of 'grade' are not the same"):
        join_runs([first, second], "grade")
    second = replace(second, tasks=first.tasks, kinds={**first.kinds, "grade": "single_label"})
    with pytest.raises(UserError, match="'grade' is ordinal in run 1 and not in run 2"):
        join_runs([first, second], "grade")
