from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray
from sklearn import metrics

from evaluation.statistics.intervals import wilson
from evaluation.statistics.paired import compare_joined, compare_pair, holm, mcnemar_p, seed_interval, sign_flip_p
from evaluation.statistics.pooled import join_runs
from evaluation.statistics.scores import scores_of
from tests.evaluation.predictions_fixture import make_predictions, make_predictions_of_every_kind
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.types import UNKNOWN

CLASSES = ["bag", "cap", "mug"]


def predictions_of(targets: NDArray[np.int64], predicted: NDArray[np.int64], groups: NDArray[np.int64]) -> Predictions:
    return Predictions(
        sample_id=np.arange(len(targets)),
        names=np.array([f"photo {index}" for index in range(len(targets))], dtype=object),
        groups=np.array([f"object {index}" for index in groups], dtype=object),
        tasks={"class": CLASSES},
        targets={"class": targets},
        logits={"class": np.eye(3, dtype=np.float32)[predicted]},
    )


def two_models(
    rng: np.random.Generator, num_groups: int, shares: tuple[float, float], correlation: float = 0.3
) -> tuple[Predictions, Predictions]:
    """Two models on 3 to 7 images of each object; what is hard for one is often hard for the other."""
    groups = np.repeat(np.arange(num_groups), rng.integers(3, 8, num_groups))
    targets = rng.integers(3, size=len(groups))
    spread = (1 - correlation) / correlation
    own = [rng.beta(share * spread, (1 - share) * spread, num_groups) for share in shares]
    own[1] = np.where(rng.random(num_groups) < 0.5, np.clip(own[0] + shares[1] - shares[0], 0, 1), own[1])
    right = [rng.random(len(groups)) < chance[groups] for chance in own]
    first, second = (predictions_of(targets, np.where(hit, targets, (targets + 1) % 3), groups) for hit in right)
    return first, second


def test_differences_equal_those_of_scikit_learn() -> None:
    first, second = two_models(np.random.default_rng(0), 12, (0.8, 0.5))
    found = compare_pair(first, second, "class", n_resamples=300)
    targets = first.targets["class"]
    for name, score in (
        ("accuracy", metrics.accuracy_score),
        ("f1_macro", lambda y, p: metrics.f1_score(y, p, average="macro")),
    ):
        values = [score(targets, model.predicted("class")) for model in (first, second)]
        assert getattr(found, name) == pytest.approx(values)
        estimate = getattr(found, f"{name}_difference")
        assert estimate.value == pytest.approx(values[0] - values[1])
        assert estimate.interval.low < estimate.value < estimate.interval.high
    right = [model.predicted("class") == targets for model in (first, second)]
    assert (found.only_first_right, found.only_second_right) == (
        int((right[0] & ~right[1]).sum()),
        int((right[1] & ~right[0]).sum()),
    )
    assert (found.n, found.groups) == (len(first), 12)


def test_exchanged_models_change_the_sign_alone() -> None:
    first, second = two_models(np.random.default_rng(1), 12, (0.8, 0.5))
    there, back = compare_pair(first, second, "class"), compare_pair(second, first, "class")
    assert there.p_value == pytest.approx(back.p_value)
    assert there.mcnemar_p == pytest.approx(back.mcnemar_p)
    low, high = back.accuracy_difference.interval
    assert there.accuracy_difference.value == pytest.approx(-back.accuracy_difference.value)
    assert there.accuracy_difference.interval == pytest.approx((-high, -low), abs=0.01)  # resamples are discrete


def test_order_of_the_samples_means_nothing() -> None:
    first, second = two_models(np.random.default_rng(2), 12, (0.8, 0.5))
    shuffled = second.take(np.random.default_rng(0).permutation(len(second)))
    assert compare_pair(first, shuffled, "class") == compare_pair(first, second, "class")


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 1), (7, 2), (12, 30), (5, 5)])
def test_mcnemar_is_the_binomial_test(only_first: int, only_second: int) -> None:
    assert mcnemar_p(0, 0) == 1.0
    expected = scipy.stats.binomtest(min(only_first, only_second), only_first + only_second).pvalue
    assert mcnemar_p(only_first, only_second) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_sign_flips_equal_all_enumerated(seed: int) -> None:
    differences = np.random.default_rng(seed).integers(-4, 6, size=11)
    sums = [abs(int(np.dot(signs, differences))) for signs in itertools.product((-1, 1), repeat=11)]
    assert sign_flip_p(differences) == pytest.approx(np.mean(np.array(sums) >= abs(int(differences.sum()))))


def test_sign_flips_equal_scipys_permutation_test() -> None:
    differences = np.random.default_rng(9).integers(-3, 5, size=8)
    expected = scipy.stats.permutation_test(
        (differences, np.zeros(8, dtype=int)),
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_sign_flips_of_single_samples_are_mcnemars_test() -> None:
    for only_first, only_second in ((7, 2), (40, 61), (900, 820)):
        differences = np.array([1] * only_first + [-1] * only_second + [0] * 50)
        assert sign_flip_p(differences) == pytest.approx(mcnemar_p(only_first, only_second), abs=1e-9)


def test_five_objects_are_never_enough() -> None:
    targets, groups = np.zeros(50, dtype=np.int64), np.arange(50) // 10
    all_right, all_wrong = (predictions_of(targets, targets + number, groups) for number in (0, 1))
    found = compare_pair(all_right, all_wrong, "class", ("A", "B"))
    assert found.accuracy_difference.value == 1.0
    assert found.mcnemar_p < 1e-9
    assert found.p_value == pytest.approx(2 / 2**5)
    assert not found.differs()
    assert found.verdict().startswith("A and B do not differ clearly on 'class' (difference +1.000 [")


def test_clear_differences_are_reported() -> None:
    first, second = two_models(np.random.default_rng(3), 60, (0.9, 0.5))
    found = compare_pair(second, first, "class", ("old", "new"))
    assert found.differs()
    assert found.verdict().startswith("new is a better model than old on 'class' (difference -0.")
    assert found.verdict().endswith("of 60 groups); whether its method is better, runs with other seeds would show.")
    assert "do not differ clearly" in found.verdict(p_value=0.2)  # corrected for others


def test_equal_models_do_not_differ_and_have_an_interval() -> None:
    first, _ = two_models(np.random.default_rng(4), 11, (0.7, 0.7))
    found = compare_pair(first, first, "class")
    assert (found.p_value, found.mcnemar_p) == (1.0, 1.0)
    most = wilson(0.0, 11).high
    assert found.accuracy_difference == (0.0, (-most, most))
    assert found.f1_macro_difference == (0.0, (-most, most))
    assert "do not differ clearly" in found.verdict()


def test_unknown_targets_are_left_out() -> None:
    first, second = two_models(np.random.default_rng(5), 12, (0.8, 0.5))
    targets = first.targets["class"].copy()
    hidden = np.arange(len(targets)) % 3 == 0
    targets[hidden] = UNKNOWN
    first, second = (replace(model, targets={"class": targets}) for model in (first, second))
    kept = np.flatnonzero(~hidden)
    assert compare_pair(first, second, "class") == compare_pair(first.take(kept), second.take(kept), "class")


def test_nothing_known_gives_no_number() -> None:
    first = predictions_of(np.full(6, UNKNOWN), np.zeros(6, dtype=np.int64), np.arange(6))
    found = compare_pair(first, first, "class")
    assert math.isnan(found.p_value)
    assert math.isnan(found.accuracy_difference.interval.low)
    assert not found.differs()
    assert "no sample has a known target" in found.verdict()


def test_one_class_and_one_sample_are_no_problem() -> None:
    first = predictions_of(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    second = predictions_of(np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    found = compare_pair(first, second, "class")
    assert (found.n, found.groups, found.p_value) == (1, 1, 1.0)
    assert not found.differs()


def test_other_test_sets_are_refused_in_one_line() -> None:
    first = make_predictions(20)
    with pytest.raises(UserError, match=r"^predictions in B and in A: the samples differ: 4 only in A .*same data$"):
        compare_pair(first, first.take(np.arange(16)), "class", ("A", "B"))
    with pytest.raises(UserError, match="A: has no task 'size'; it has class, colour"):
        compare_pair(first, first, "size", ("A", "B"))
    with pytest.raises(UserError, match="A: there are no runs"):
        compare_joined([], [first], "class", ("A", "B"))


def test_folds_are_put_together() -> None:
    first, second = two_models(np.random.default_rng(6), 12, (0.8, 0.5))
    parts = np.array_split(np.random.default_rng(0).permutation(len(first)), 4)
    folds = [[model.take(part) for part in parts] for model in (first, second)]
    joined, whole = compare_joined(folds[0], folds[1], "class"), compare_pair(first, second, "class")
    assert joined.accuracy == pytest.approx(whole.accuracy)
    assert joined.p_value == pytest.approx(whole.p_value)
    assert joined.mcnemar_p == pytest.approx(whole.mcnemar_p)
    assert joined.accuracy_difference.value == pytest.approx(whole.accuracy_difference.value)


def test_seeds_are_averaged() -> None:
    rng = np.random.default_rng(7)
    first, second = two_models(rng, 12, (0.8, 0.5))
    third = predictions_of(first.targets["class"], rng.integers(3, size=len(first)), np.arange(len(first)) // 5)
    found = compare_joined([first, third], [second], "class", n_resamples=300)
    targets = first.targets["class"]
    accuracy = [float((model.predicted("class") == targets).mean()) for model in (first, third, second)]
    assert found.accuracy == pytest.approx((np.mean(accuracy[:2]), accuracy[2]))
    assert found.only_first_right is None
    assert math.isnan(found.mcnemar_p)
    # The same run twice is the same run.
    twice = compare_joined([first, first], [second], "class", n_resamples=300)
    once = compare_pair(first, second, "class", n_resamples=300)
    assert twice.p_value == pytest.approx(once.p_value)
    assert twice.accuracy_difference.interval == pytest.approx(once.accuracy_difference.interval)


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04: times 4, 3, 2, 1 is .04 .06 .06 .04, never falling.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.3, 0.9]) == pytest.approx([0.6, 0.9])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_does_not_count_what_could_not_be_compared() -> None:
    corrected = holm([0.01, math.nan, 0.04])
    assert [corrected[0], corrected[2]] == pytest.approx([0.02, 0.04])
    assert math.isnan(corrected[1])


def coverage(num_groups: int, shares: tuple[float, float], trials: int = 150) -> tuple[float, float]:
    """How often the interval holds the true difference, and how often the models differ clearly."""
    rng = np.random.default_rng(1)
    covered = differing = 0
    for _ in range(trials):
        found = compare_pair(*two_models(rng, num_groups, shares), "class", n_resamples=300)
        low, high = found.accuracy_difference.interval
        covered += low <= shares[0] - shares[1] <= high
        differing += found.differs()
    return covered / trials, differing / trials


@pytest.mark.slow
@pytest.mark.parametrize("num_groups", [6, 11, 40])
def test_equal_models_hardly_ever_differ(num_groups: int) -> None:
    covered, differing = coverage(num_groups, (0.6, 0.6))
    assert covered >= 0.9  # 150 trials: two standard errors are .036
    assert differing <= 0.05


@pytest.mark.slow
def test_interval_of_a_true_difference_covers_it_and_enough_objects_show_it() -> None:
    covered, differing = coverage(80, (0.75, 0.5))
    assert 0.9 <= covered < 1
    assert differing > 0.9


# Student's t at 97.5 %, from printed tables, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 4: 2.776}


def test_single_runs_show_nothing_of_seeds() -> None:
    assert all(math.isnan(end) for end in seed_interval([0.9], [0.5]))


def test_equal_spreads_are_students_interval() -> None:
    """Where both sides have as many runs and the same spread, Welch's degrees of freedom are n + m - 2."""
    first, second = [0.50, 0.52, 0.54], [0.40, 0.42, 0.44]
    half = T[4] * 0.02 * math.sqrt(2 / 3)
    assert seed_interval(first, second) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-5)


def test_a_single_run_is_as_uncertain_as_the_others() -> None:
    half = T[2] * 0.02 * math.sqrt(1 + 1 / 3)
    assert seed_interval([0.7], [0.50, 0.52, 0.54]) == pytest.approx((0.18 - half, 0.18 + half), abs=1e-5)
    half = T[1] * float(np.std([0.5, 0.6], ddof=1)) * math.sqrt(1 + 1 / 2)
    assert seed_interval([0.5, 0.6], [0.5]) == pytest.approx((0.05 - half, 0.05 + half), abs=1e-4)


def test_seeds_that_change_nothing_leave_the_difference() -> None:
    assert seed_interval([0.75, 0.75], [0.5]) == (0.25, 0.25)


def test_equal_scores_of_other_predictions_are_no_interval_of_width_zero() -> None:
    targets, groups = np.zeros(8, np.int64), np.arange(8)
    answers = [np.array([1, 0, 0, 0, 0, 0, 0, 0]), np.array([0, 1, 0, 0, 0, 0, 0, 0])]
    seeds = [predictions_of(targets, answer, groups) for answer in answers]
    other = predictions_of(targets, np.ones(8, np.int64), groups)
    assert all(math.isnan(end) for end in compare_joined(seeds, [other], "class", n_resamples=10).over_seeds)
    assert compare_joined(seeds[:1] * 2, [other], "class", n_resamples=10).over_seeds == (7 / 8, 7 / 8)
    assert all(math.isnan(end) for end in join_runs(seeds, "class", n_resamples=10).accuracy.interval)
    assert join_runs(seeds[:1] * 2, "class", n_resamples=10).accuracy.interval == (7 / 8, 7 / 8)


def seeds_of(
    rng: np.random.Generator, targets: NDArray[np.int64], mean: float, spread: float, k: int
) -> list[Predictions]:
    """Runs whose accuracy differs from seed to seed."""
    runs = []
    for chance in np.clip(rng.normal(mean, spread, k), 0, 1):
        right = rng.random(len(targets)) < chance
        runs.append(predictions_of(targets, np.where(right, targets, (targets + 1) % 3), np.arange(len(targets))))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("means", "spread", "is_clear"), [((0.6, 0.6), 0.03, False), ((0.7, 0.6), 0.01, True)])
def test_what_only_the_seeds_made_is_no_clear_difference(
    means: tuple[float, float], spread: float, is_clear: bool
) -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(3, size=1500)
    differing = by_samples = 0.0
    for _ in range(100):
        first, second = (seeds_of(rng, targets, mean, spread, 3) for mean in means)
        found = compare_joined(first, second, "class", n_resamples=100)
        differing += found.differs() / 100
        by_samples += (found.p_value < 0.05) / 100
    # 100 trials of a 5 % test: its standard error is .022; the samples alone would have claimed more.
    assert differing > 0.9 if is_clear else differing <= 0.08 and by_samples > 0.3


def test_the_verdict_has_the_interval_over_seeds() -> None:
    rng = np.random.default_rng(1)
    targets = rng.integers(3, size=1500)
    first, second = (seeds_of(rng, targets, mean, 0.05, 2) for mean in (0.7, 0.6))
    found = compare_joined(first, second, "class", ("A", "B"), n_resamples=100)
    low, high = found.over_seeds
    assert low < found.accuracy_difference.value < high
    assert f"over seeds [{low:+.3f}, {high:+.3f}], p = " in found.verdict()
    single = compare_joined(first[:1], second[:1], "class", ("A", "B"), n_resamples=100)
    assert "over seeds" not in single.verdict()


@pytest.mark.parametrize("task", ["grade", "tags", "price"])
def test_each_kind_of_task_is_compared_by_its_main_score(task: str) -> None:
    better, worse = (make_predictions_of_every_kind(noise=noise) for noise in (0.5, 1.5))
    shuffled = worse.take(np.random.default_rng(0).permutation(len(worse)))
    found = compare_pair(better, shuffled, task, ("a", "b"), n_resamples=300)
    own = {name: score.statistic for name, score in scores_of(better, task).items()}
    assert list(found.scores) == list(own)
    for name, (values, difference, _) in found.scores.items():
        assert values[0] == pytest.approx(own[name](np.ones((1, found.n)))[0])
        assert difference.value == pytest.approx(values[0] - values[1])
        assert difference.interval.low < difference.value < difference.interval.high
    assert found.differs()
    assert found.first_is_better
    assert found.verdict().startswith("a is a better model than b")
    assert not compare_pair(worse, better, task, n_resamples=300).first_is_better
    assert math.isnan(found.p_value) == (task == "tags")
    assert ("no test, by the interval alone" in found.verdict()) == (task == "tags")
    assert (found.mcnemar_p > 0) == (task == "grade")
    # With another p-value, of an interval without a test nothing follows from it.
    assert not replace(found, p_value=0.5).differs()


def test_a_model_does_not_differ_from_itself() -> None:
    predictions = make_predictions_of_every_kind()
    for task in predictions.tasks:
        found = compare_pair(predictions, predictions, task, n_resamples=50)
        assert not found.differs()
        assert found.difference.value == 0


def test_other_targets_of_labels_and_numbers_are_refused() -> None:
    predictions = make_predictions_of_every_kind()
    for task in ("tags", "price"):
        targets = predictions.targets[task].copy()
        targets[5] = 1 - np.abs(targets[5])
        other = replace(predictions, targets={**predictions.targets, task: targets})
        with pytest.raises(UserError, match=f"1 of 60 samples have another target of '{task}', first 'photo 5'"):
            compare_pair(predictions, other, task)
    other = replace(predictions, kinds={**predictions.kinds, "grade": "single_label"})
    with pytest.raises(UserError, match="task 'grade' is ordinal in the first and single_label in the second"):
        compare_pair(predictions, other, "grade")


@pytest.mark.parametrize("groups", [12, 40])
def test_sign_flips_of_errors_equal_scipy(groups: int) -> None:
    differences = np.random.default_rng(groups).normal(0.3, 1.0, groups)
    found = scipy.stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0)
    )
    assert sign_flip_p(differences) == pytest.approx(found.pvalue, abs=1e-9 if groups == 12 else 0.01)
    assert sign_flip_p(np.zeros(4)) == 1.0
    # Whole numbers may be given either way.
    whole = np.array([3, -1, 2, 2, 0, 5])
    assert sign_flip_p(whole) == pytest.approx(sign_flip_p(whole.astype(np.float64)))
