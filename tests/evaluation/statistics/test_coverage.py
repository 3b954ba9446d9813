"""How often the 95 % intervals hold the truth, and how often the tests call equal models different, by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ndtr

from evaluation.retrieval import RankedAnswers, report_rows
from evaluation.statistics.base_to_novel import base_to_novel
from evaluation.statistics.calibration import calibration_error
from evaluation.statistics.intervals import (
    THIN_GROUPS,
    f1_statistic,
    group_interval,
    share_interval,
    small_classes,
)
from evaluation.statistics.paired import ALPHA, compare_joined, holm, sign_flip_p
from evaluation.statistics.pooled import paired_share_interval
from evaluation.statistics.scores import few_large_errors, scores_of
from evaluation.statistics.slices import permutation_p
from vitrail.predictions import Predictions
from vitrail.types import LABEL_TASK, TaskKind

Sizes = Literal["single", "equal", "unequal"]
Sample = Callable[[np.random.Generator], tuple[float, float]]


def group_sizes(kind: Sizes, num_groups: int) -> NDArray[np.int64]:
    """One image a group, six, or very unequal: a tenth of the groups hold half of the images."""
    sizes = np.full(num_groups, {"single": 1, "equal": 6, "unequal": 5}[kind])
    if kind == "unequal":
        large = max(1, num_groups // 10)
        sizes[:large] = round(5 * (num_groups - large) / large)
    return sizes


def groups_of(kind: Sizes, num_groups: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(num_groups), group_sizes(kind, num_groups))


def coverage(interval: Callable[[np.random.Generator], tuple[float, float]], truth: float, trials: int) -> float:
    rng = np.random.default_rng(0)
    found = [interval(rng) for _ in range(trials)]
    return float(np.mean([low - 1e-12 <= truth <= high + 1e-12 for low, high in found]))


def right(rng: np.random.Generator, groups: NDArray[np.int64], share: float, correlation: float) -> NDArray[np.float64]:
    """Right or wrong for each image; the objects' own shares are beta distributed."""
    if correlation == 0:
        return (rng.random(len(groups)) < share).astype(np.float64)
    spread = (1 - correlation) / correlation
    own = rng.beta(share * spread, (1 - share) * spread, groups.max() + 1)
    scores: NDArray[np.float64] = (rng.random(len(groups)) < own[groups]).astype(np.float64)
    return scores


def accuracy_coverage(kind: Sizes, num_groups: int, share: float, correlation: float, trials: int) -> float:
    groups = groups_of(kind, num_groups)
    return coverage(lambda rng: share_interval(right(rng, groups, share, correlation), groups), share, trials)


# The cases in which resampling groups covers .63 to .79.
@pytest.mark.parametrize(("num_groups", "share"), [(100, 0.93), (100, 0.98), (500, 0.98)])
def test_accuracy_with_rare_mistakes_in_groups_of_unequal_size(num_groups: int, share: float) -> None:
    assert accuracy_coverage("unequal", num_groups, share, 0.5, 300) >= 0.88


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.93, 0.98])
@pytest.mark.parametrize("num_groups", [11, 20, 100, 500])
@pytest.mark.parametrize("kind", ["single", "equal", "unequal"])
def test_accuracy(kind: Sizes, num_groups: int, share: float, correlation: float) -> None:
    assert accuracy_coverage(kind, num_groups, share, correlation, 500) >= 0.89


def gains(
    rng: np.random.Generator, groups: NDArray[np.int64], shares: tuple[float, float], correlation: float
) -> NDArray[np.float64]:
    """1 where only the first model is right, -1 where only the second is, otherwise 0; alike within groups."""
    own = rng.random(groups.max() + 1)[groups]
    place = np.where(rng.random(len(groups)) < math.sqrt(correlation), own, rng.random(len(groups)))
    return np.where(place < shares[0], 1.0, np.where(place < sum(shares), -1.0, 0.0))


def paired(
    kind: Sizes, num_groups: int, shares: tuple[float, float], correlation: float, trials: int
) -> tuple[float, float]:
    """Coverage of the interval of the difference, and how often interval and test call the models different."""
    rng, groups = np.random.default_rng(0), groups_of(kind, num_groups)
    covered, differing = 0, 0
    for _ in range(trials):
        differences = gains(rng, groups, shares, correlation)
        low, high = paired_share_interval(differences, groups)
        p_value = sign_flip_p(np.bincount(groups, weights=differences).astype(np.int64))
        covered += low <= shares[0] - shares[1] <= high
        differing += (low > 0 or high < 0) and p_value < ALPHA
    return covered / trials, differing / trials


def test_difference_of_two_models() -> None:
    covered, differing = paired("unequal", 100, (0.06, 0.02), 0.5, 100)
    assert covered >= 0.9
    covered, differing = paired("unequal", 100, (0.1, 0.1), 0.5, 100)
    assert covered >= 0.9
    assert differing <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.02, 0.02), (0.06, 0.02), (0.2, 0.1)])
@pytest.mark.parametrize("num_groups", [11, 20, 100, 500])
@pytest.mark.parametrize("kind", ["single", "equal", "unequal"])
def test_difference(kind: Sizes, num_groups: int, shares: tuple[float, float], correlation: float) -> None:
    covered, differing = paired(kind, num_groups, shares, correlation, 200)
    assert covered >= 0.9
    if shares[0] == shares[1]:
        assert differing <= 0.08  # 200 draws: two standard errors are .03


def world_of_classes(rng: np.random.Generator, prior: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Probability of each prediction for each class, ``(C, C)``, and the macro F1 of endless samples."""
    num_classes = len(prior)
    recall = np.clip(rng.beta(8, 1.5, num_classes), 0.2, 1)
    mistaken_for = rng.dirichlet(np.full(num_classes, 0.05), num_classes)
    np.fill_diagonal(mistaken_for, 0)
    mistaken_for /= mistaken_for.sum(axis=1, keepdims=True)
    chances = np.diag(recall) + (1 - recall)[:, None] * mistaken_for
    joint = prior[:, None] * chances
    return chances, float((2 * np.diag(joint) / (joint.sum(axis=0) + joint.sum(axis=1))).mean())


def macro_f1_coverage(num_classes: int, objects: int, views: int, *, tail: bool, trials: int) -> tuple[float, float]:
    """Coverage, and the mean share of classes that are reported as having few groups."""
    rng = np.random.default_rng(0)
    prior = 1 / (np.arange(num_classes) + 1.0) if tail else np.ones(num_classes)
    prior /= prior.sum()
    covered, small = 0, 0.0
    for trial in range(trials):
        if trial % 10 == 0:
            chances, truth = world_of_classes(rng, prior)
            edges = chances.cumsum(axis=1)
        own = rng.choice(num_classes, objects, p=prior) if tail else np.arange(objects) % num_classes
        groups = np.repeat(np.arange(objects), views)
        targets = own[groups]
        of_object = (rng.random(objects)[:, None] > edges[own]).sum(axis=1)[groups]
        of_image = (rng.random(len(groups))[:, None] > edges[targets]).sum(axis=1)
        alike = rng.random(len(groups)) < (0.5 if views > 1 else 0)
        predicted = np.minimum(np.where(alike, of_object, of_image), num_classes - 1)
        low, high = group_interval(f1_statistic(targets, predicted), groups, 400)
        covered += low <= truth <= high
        few, occurring = small_classes(targets, groups)
        small += few / occurring
    return covered / trials, small / trials


def test_macro_f1_of_many_small_classes() -> None:
    # Percentiles of the bootstrap cover .79 to .94 here.
    covered, small = macro_f1_coverage(102, 510, 2, tail=False, trials=40)
    assert covered >= 0.87
    assert small == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_classes", "objects", "views"), [(102, 1_020, 1), (102, 510, 2), (102, 510, 1), (10, 200, 1), (10, 2_000, 1)]
)
def test_macro_f1(num_classes: int, objects: int, views: int) -> None:
    covered, small = macro_f1_coverage(num_classes, objects, views, tail=False, trials=150)
    assert covered >= 0.9
    assert small == 0


@pytest.mark.slow
@pytest.mark.parametrize(("objects", "views"), [(1_000, 1), (2_000, 1), (1_000, 5)])
def test_macro_f1_of_a_long_tail_is_reported_as_too_narrow(objects: int, views: int) -> None:
    covered, small = macro_f1_coverage(102, objects, views, tail=True, trials=60)
    assert covered <= 0.93
    assert small > 0.2


def in_groups(rng: np.random.Generator, groups: NDArray[np.int64], correlation: float) -> NDArray[np.float64]:
    """Standard normal numbers, alike within groups."""
    shared, own = rng.normal(size=groups.max() + 1)[groups], rng.normal(size=len(groups))
    found: NDArray[np.float64] = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    return found


def sample_of(kind: TaskKind, rng: np.random.Generator, groups: NDArray[np.int64], correlation: float) -> Predictions:
    """Targets and outputs of one task; the errors of a group's samples are alike."""
    n, objects = len(groups), groups.max() + 1
    task = {"multi_label": ["a", "b", "c"], "ordinal": ["1", "2", "3", "4"]}.get(kind, [])
    targets: NDArray[Any]
    if kind == "regression":
        targets = rng.normal(size=objects)[groups]
        logits = (targets + 0.6 * in_groups(rng, groups, correlation))[:, None]
    elif kind == "ordinal":
        targets = rng.integers(0, 4, objects)[groups]
        logits = -(((targets + 0.7 * in_groups(rng, groups, correlation))[:, None] - np.arange(4)) ** 2)
    else:
        targets = (rng.random((objects, 3)) < (0.5, 0.3, 0.2)).astype(np.int8)[groups]
        logits = np.stack([1.5 * column + in_groups(rng, groups, correlation) - 1 for column in targets.T], axis=1)
    names, its = np.arange(n).astype(str).astype(object), logits.astype(np.float32)
    return Predictions(
        np.arange(n), names, groups.astype(object), {"it": task}, {"it": targets}, {"it": its}, {"it": kind}
    )


def score_coverage(kind: TaskKind, sizes: Sizes, num_groups: int, correlation: float, trials: int) -> dict[str, float]:
    """Coverage of the interval of each score of a kind of task."""
    groups, rng = groups_of(sizes, num_groups), np.random.default_rng(0)
    endless = sample_of(kind, np.random.default_rng(1), np.arange(100_000), correlation)
    one = np.ones((1, len(endless)))
    truth = {name: float(score.statistic(one)[0]) for name, score in scores_of(endless, "it").items()}
    covered = dict.fromkeys(truth, 0)
    for _ in range(trials):
        for name, score in scores_of(sample_of(kind, rng, groups, correlation), "it").items():
            low, high = score.estimate(groups, 300).interval
            covered[name] += low <= truth[name] <= high
    return {name: count / trials for name, count in covered.items()}


@pytest.mark.parametrize("kind", ["multi_label", "ordinal", "regression"])
def test_scores_of_other_kinds_in_groups_of_unequal_size(kind: TaskKind) -> None:
    for name, covered in score_coverage(kind, "unequal", 40, 0.5, 40).items():
        assert covered >= 0.85, name


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("num_groups", [20, 100])
@pytest.mark.parametrize("sizes", ["single", "equal", "unequal"])
@pytest.mark.parametrize("kind", ["multi_label", "ordinal", "regression"])
def test_scores_of_other_kinds(kind: TaskKind, sizes: Sizes, num_groups: int, correlation: float) -> None:
    for name, covered in score_coverage(kind, sizes, num_groups, correlation, 200).items():
        assert covered >= 0.88, name


@pytest.mark.slow
def test_rmse_of_a_few_large_errors_is_reported_as_too_narrow() -> None:
    rng, trials, n = np.random.default_rng(0), 200, 100
    truth = math.sqrt(math.e**2 - 2 * math.e**0.5 + 1)
    covered, reported = 0, 0
    for _ in range(trials):
        targets, errors = rng.normal(size=n), np.exp(rng.normal(size=n)) - 1
        names = np.arange(n).astype(str).astype(object)
        logits = {"it": (targets + errors)[:, None].astype(np.float32)}
        found = Predictions(np.arange(n), names, names, {"it": []}, {"it": targets}, logits, {"it": "regression"})
        low, high = scores_of(found, "it")["rmse"].estimate(names, 300).interval
        covered += low <= truth <= high
        reported += few_large_errors(errors, names) > 0
    assert covered / trials < 0.9
    assert reported / trials > 0.2


def calibration_coverage(kind: Sizes, num_groups: int, correlation: float, shift: float, trials: int) -> float:
    """Coverage of the calibration error of a model whose confidences are ``shift`` too high."""
    groups = groups_of(kind, num_groups)

    def confidences(rng: np.random.Generator, groups: NDArray[np.int64]) -> NDArray[np.float64]:
        own = rng.beta(4, 1.2, groups.max() + 1)
        found: NDArray[np.float64] = np.clip(own[groups] + rng.normal(0, 0.05, len(groups)), 0.2, 0.999)
        return found

    endless = confidences(np.random.default_rng(1), np.arange(100_000))
    gap = np.clip(endless - shift, 0, 1) - endless
    place = np.clip(np.ceil(endless * 15).astype(int) - 1, 0, 14)
    truth = np.abs(np.bincount(place, weights=gap)).sum() / len(endless)

    def interval(rng: np.random.Generator) -> tuple[float, float]:
        confidence = confidences(rng, groups)
        shared, own = rng.normal(size=num_groups)[groups], rng.normal(size=len(groups))
        chance = ndtr(math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own)
        return calibration_error(confidence, chance < confidence - shift, groups, n_resamples=300).interval

    return coverage(interval, float(truth), trials)


# Chance that ignores groups leaves out 0 in a fifth to a half of these samples.
@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_perfect_calibration_in_groups(kind: Sizes) -> None:
    assert calibration_coverage(kind, 100, 0.5, 0.0, 60) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.05, 0.15])
@pytest.mark.parametrize("correlation", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("num_groups", [20, 100, 500])
@pytest.mark.parametrize("kind", ["single", "equal", "unequal"])
def test_calibration(kind: Sizes, num_groups: int, correlation: float, shift: float) -> None:
    assert calibration_coverage(kind, num_groups, correlation, shift, 100) >= 0.84


FURTHER = (
    *("balanced_accuracy", "mcc", "kappa", "auroc", "average_precision", "brier", "nll", "aurc", "excess_aurc"),
    *("accuracy@0.8", "coverage@0.1"),
)


def classified(
    rng: np.random.Generator, groups: NDArray[np.int64], correlation: float, prior: tuple[float, ...], margin: float
) -> Predictions:
    """Each object has a class; calibrated logits with noise that is alike within groups."""
    num_classes, n = len(prior), len(groups)
    targets = rng.choice(num_classes, groups.max() + 1, p=prior)[groups]
    noise = np.stack([in_groups(rng, groups, correlation) for _ in range(num_classes)], axis=1)
    logits = (margin * (noise + margin * np.eye(num_classes)[targets])).astype(np.float32)
    names = np.arange(n).astype(str).astype(object)
    tasks = {LABEL_TASK: [str(label) for label in range(num_classes)]}
    return Predictions(np.arange(n), names, groups.astype(object), tasks, {LABEL_TASK: targets}, {LABEL_TASK: logits})


TWO, RARE, TEN = (0.5, 0.5), (0.9, 0.1), (0.1,) * 10


def further_coverage(
    prior: tuple[float, ...],
    margin: float,
    groups: NDArray[np.int64],
    correlation: float,
    trials: int,
    names: tuple[str, ...] = FURTHER,
) -> dict[str, float]:
    """How often the interval of each score holds the truth, or is reported as perhaps too narrow."""
    rng = np.random.default_rng(0)
    endless = classified(np.random.default_rng(1), np.arange(40_000), 0.0, prior, margin)
    one = np.ones((1, len(endless)))
    truth = {name: float(score.statistic(one)[0]) for name, score in scores_of(endless, LABEL_TASK, names).items()}
    covered = dict.fromkeys(truth, 0)
    made = 0
    while made < trials:
        found = classified(rng, groups, correlation, prior, margin)
        if len(np.unique(found.targets[LABEL_TASK])) < 2:
            continue
        made += 1
        scores = scores_of(found, LABEL_TASK, names)
        small = small_classes(found.targets[LABEL_TASK], groups)[0] > 0
        thin = len(prior) < 10 and small_classes(found.targets[LABEL_TASK], groups, THIN_GROUPS)[0] > 0
        for name, score in scores.items():
            low, high = score.estimate(groups, 300).interval
            noted = small and name in ("auroc", "average_precision", "balanced_accuracy")
            noted |= thin and name == "balanced_accuracy"
            if name in ("brier", "nll"):
                losses = score.statistic.scores  # type: ignore[attr-defined]
                noted = few_large_errors(np.sqrt(losses), groups) > 0
            covered[name] += low - 1e-9 <= truth[name] <= high + 1e-9 or noted
    return {name: count / trials for name, count in covered.items()}


def test_further_scores_near_one_in_groups_of_unequal_size() -> None:
    # Student's interval of a bootstrap covers .70 to .85 of these.
    for name, covered in further_coverage(TWO, 3.5, groups_of("unequal", 100), 0.5, 30, FURTHER[:-1]).items():
        assert covered >= 0.9, name


def test_coverage_at_a_risk_in_few_groups() -> None:
    # Percentiles of a bootstrap cover .77 to .84 of such.
    assert further_coverage(TWO, 1.5, groups_of("unequal", 20), 0.5, 20, FURTHER[-1:])["coverage@0.1"] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("num_groups", [20, 100])
@pytest.mark.parametrize("kind", ["single", "equal", "unequal"])
@pytest.mark.parametrize("margin", [1.5, 3.5])
@pytest.mark.parametrize("prior", [TWO, RARE, TEN])
def test_further_scores(
    prior: tuple[float, ...], margin: float, kind: Sizes, num_groups: int, correlation: float
) -> None:
    groups = groups_of(kind, num_groups)
    for name, covered in further_coverage(prior, margin, groups, correlation, 100).items():
        assert covered >= 0.85, name  # 100 draws: two standard errors are .04


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "equal", "unequal"])
def test_differences_of_further_scores(kind: Sizes) -> None:
    """Two equally good models: intervals hold 0, and losses are called different in 5 % of the cases."""
    rng, groups, trials = np.random.default_rng(0), groups_of(kind, 60), 100
    names = (
        "auroc",
        "average_precision",
        "brier",
        "nll",
        "mcc",
        "aurc",
        "balanced_accuracy",
        "accuracy@0.8",
        "coverage@0.1",
    )
    covered, differing = dict.fromkeys(names, 0), dict.fromkeys(("brier", "nll"), 0)
    for _ in range(trials):
        first = classified(rng, groups, 0.5, TWO, 1.5)
        noise = np.stack([in_groups(rng, groups, 0.5) for _ in range(2)], axis=1)
        logits = 1.5 * (noise + 1.5 * np.eye(2)[first.targets[LABEL_TASK]])
        second = replace(first, logits={LABEL_TASK: logits.astype(np.float32)})
        found = compare_joined([first], [second], LABEL_TASK, n_resamples=200, metrics=names)
        for name in names:
            low, high = found.scores[name].difference.interval
            covered[name] += low <= 0 <= high
        for name in differing:
            differing[name] += found.scores[name].p_value < ALPHA
    for name, count in covered.items():
        assert count / trials >= 0.89, name
    for name, count in differing.items():
        assert count / trials <= 0.1, name


@pytest.mark.slow
def test_difference_of_coverage_at_a_risk_of_models_that_differ() -> None:
    """Percentiles of common resamples cover .84 of these."""
    rng, groups, trials, margins = np.random.default_rng(7), groups_of("unequal", 20), 60, (1.5, 2.0)
    truths, one = [], np.ones((1, 40_000))
    for margin in margins:
        endless = classified(np.random.default_rng(1), np.arange(40_000), 0.0, TWO, margin)
        truths.append(float(scores_of(endless, LABEL_TASK, ("coverage@0.1",))["coverage@0.1"].statistic(one)[0]))
    covered = 0
    for _ in range(trials):
        first = classified(rng, groups, 0.5, TWO, margins[0])
        noise = np.stack([in_groups(rng, groups, 0.5) for _ in range(2)], axis=1)
        logits = margins[1] * (noise + margins[1] * np.eye(2)[first.targets[LABEL_TASK]])
        second = replace(first, logits={LABEL_TASK: logits.astype(np.float32)})
        found = compare_joined([first], [second], LABEL_TASK, n_resamples=50, metrics=("coverage@0.1",))
        low, high = found.scores["coverage@0.1"].difference.interval
        covered += low - 1e-9 <= truths[0] - truths[1] <= high + 1e-9
    assert covered / trials >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.7, 0.97])
@pytest.mark.parametrize("num_groups", [40, 200])
@pytest.mark.parametrize("kind", ["single", "equal", "unequal"])
def test_slices_that_differ_by_chance(kind: Sizes, num_groups: int, share: float) -> None:
    rng, groups, trials = np.random.default_rng(0), groups_of(kind, num_groups), 60
    sizes = np.repeat([0.05, 0.1, 0.2, 0.5], 5)[:, None]
    below, any_below = np.zeros(2), np.zeros(2)
    for trial in range(trials):
        scores = right(rng, groups, share, 0.5)
        whole = (rng.random((20, num_groups)) < sizes)[:, groups]
        within = rng.random((20, len(groups))) < sizes
        for place, members in enumerate((whole, within)):
            p_values = permutation_p(scores, groups.astype(object), members, seed=trial)
            below[place] += (p_values < ALPHA).mean()
            any_below[place] += min(holm(p_values.tolist())) < ALPHA
    assert (below / trials <= 0.07).all()
    assert (any_below / trials <= 0.12).all()  # 60 draws: two standard errors are .06


@pytest.mark.slow
@pytest.mark.parametrize(("images", "texts"), [(50, 1), (200, 1), (100, 5)])
def test_retrieval(images: int, texts: int) -> None:
    """Ranks of each image's texts are alike; every metric and the mean recall of both directions."""
    rng, trials = np.random.default_rng(0), 150

    def sample(count: int) -> list[RankedAnswers]:
        hardness = rng.normal(size=count)
        owner = np.repeat(np.arange(count), texts)
        answers = []
        for direction, own in (("image_to_text", np.arange(count)), ("text_to_image", owner)):
            ranks = 1 + np.floor(np.exp(1.2 * hardness[own] + 0.8 * rng.normal(size=len(own)))).astype(np.int64)
            answers.append(RankedAnswers(direction, ranks, 1.0 / ranks, own))
        return answers

    truth = {(row.direction, row.metric): row.value for row in report_rows(sample(50_000), n_resamples=2)}
    covered = dict.fromkeys(truth, 0)
    for _ in range(trials):
        for row in report_rows(sample(images), n_resamples=300):
            covered[row.direction, row.metric] += row.low <= truth[row.direction, row.metric] <= row.high
    for name, count in covered.items():
        assert count / trials >= 0.9, name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_groups"), [("single", 100), ("equal", 40), ("unequal", 100)])
def test_base_to_novel(kind: Sizes, num_groups: int) -> None:
    rng, groups, trials = np.random.default_rng(0), groups_of(kind, num_groups), 150
    endless = base_to_novel(classified(np.random.default_rng(1), np.arange(60_000), 0.0, TEN, 1.5), n_resamples=2)
    covered = dict.fromkeys(("base", "novel", "harmonic_mean"), 0)
    for _ in range(trials):
        found = base_to_novel(classified(rng, groups, 0.5, TEN, 1.5), n_resamples=300)
        for name in covered:
            low, high = getattr(found, name).interval
            covered[name] += low <= getattr(endless, name).value <= high
    for name, count in covered.items():
        assert count / trials >= 0.88, name
