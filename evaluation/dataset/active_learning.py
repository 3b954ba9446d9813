"""Which unlabelled images to label next, and what that is worth compared with choosing at random.

* ``entropy``, ``margin``, ``confidence``: where the model is least sure (Settles, Active Learning Literature Survey,
  2009, section 3.1); of multi-label tasks the entropy of all labels together, or the least sure label.
* ``variance``: of regression tasks, where the model expects the largest error.
* ``coreset``: images such that any other one is near to a labelled one (k-centre greedy, Sener & Savarese, ICLR 2018);
  needs vectors only, and does not ask for ten views of one object.

Learning curves hide known labels and give them out step by step: a linear model is trained on those it has, a strategy
chooses the next ones, and the main score of the task's kind (``evaluation.statistics.scores.MAIN``) is measured on
validation and test. All strategies of a seed begin with the same random images, so their differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.dataset.features import Reduction, fitted, fitted_labels, fitted_numbers, probabilities
from evaluation.report.figures import blank_figure, plain
from evaluation.statistics.scores import HEADINGS, LOWER_IS_BETTER, MAIN, precision_statistic
from vitrail.errors import UserError
from vitrail.types import CLASS_KINDS, UNKNOWN, TaskKind

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STRATEGIES = ("entropy", "margin", "confidence", "coreset")
"""Of tasks with classes or labels; of regression tasks ``variance`` and ``coreset``."""

VARIANCE = "variance"
RANDOM = "random"


class Ranked(NamedTuple):
    """What to label, the most wanted first.

    Attributes:
        rows: int64 ``(n,)``.
        scores: float64 ``(n,)``, higher is more wanted: how unsure the model is, or for ``coreset`` the distance to the
            nearest image that is labelled or ranked before.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]


def uncertainty(probability: NDArray[np.float64], by: str, kind: TaskKind = "single_label") -> NDArray[np.float64]:
    """Return how unsure a model is of each sample.

    Args:
        probability: float64 ``(N, C)``; each row sums to 1, of multi-label tasks each entry stands for itself.
        by: ``entropy`` in nats (0 to ln C; of C labels 0 to C ln 2), ``margin`` as 1 less the lead of the best class
            over the next, or of the less over the more probable state of the least sure label (0 to 1), or
            ``confidence`` as 1 less the probability of the best class or of that label's state.
        kind: of the task.

    Returns:
        float64 ``(N,)``, higher is less sure.
    """
    from scipy.special import entr

    if kind == "multi_label":
        states = np.stack([probability, 1 - probability], axis=2)  # each label applies or not
        if by == "entropy":
            return np.asarray(entr(states).sum(axis=(1, 2)))
        best = states.max(axis=2).min(axis=1)
        return np.asarray(1 - best if by == "confidence" else 2 * (1 - best))
    if by == "entropy":
        return np.asarray(entr(probability).sum(axis=1))
    ordered = np.sort(probability, axis=1)
    if by == "confidence":
        return 1 - ordered[:, -1]
    second = ordered[:, -2] if probability.shape[1] > 1 else 0.0
    return 1 - (ordered[:, -1] - second)


def most_uncertain(scores: NDArray[np.float64], n: int) -> Ranked:
    """Return the n samples of the highest uncertainty; of equal ones the earlier first."""
    rows = np.argsort(-scores, kind="stable")[:n]
    return Ranked(rows.astype(np.int64), scores[rows])


def k_centre_greedy(vectors: NDArray[Any], n: int, covered: NDArray[Any] | None = None) -> Ranked:
    """Take repeatedly the sample that is farthest from all that are labelled or taken.

    The largest distance that is left is at most twice the smallest possible one (Gonzalez, 1985).

    Args:
        vectors: ``(N, D)``, finite.
        n: number of samples at most.
        covered: ``(M, D)``, samples that are labelled; without any the first one taken is the one nearest to the mean,
            and its score is infinite.
    """
    from sklearn.metrics import pairwise_distances_argmin_min

    points = np.asarray(vectors, np.float64)
    count = min(n, len(points))
    squares = (points**2).sum(axis=1)
    nearest = np.full(len(points), np.inf)
    if covered is not None and len(covered) and len(points):
        nearest = pairwise_distances_argmin_min(points, np.asarray(covered, np.float64))[1] ** 2
    taken, scores = np.zeros(count, np.int64), np.zeros(count)
    for place in range(count):
        if np.isinf(nearest).all():
            row = int(((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin())
        else:
            row = int(nearest.argmax())
        taken[place], scores[place] = row, np.sqrt(nearest[row])
        np.minimum(nearest, np.maximum(squares - 2 * points @ points[row] + squares[row], 0), out=nearest)
        nearest[taken[: place + 1]] = -1  # taken once, even where all others lie on the same spot
    return Ranked(taken, scores)


def checked_probabilities(logits: NDArray[Any], name: str, kind: TaskKind = "single_label") -> NDArray[np.float64]:
    """Return the softmax of logits, or of multi-label tasks the logistic function, float64 ``(N, C)``.

    Raises:
        UserError: for logits that are not finite, and for a single class, of which every model is sure.
    """
    from scipy.special import expit, softmax

    values = np.asarray(logits, np.float64)
    if values.shape[1] < 2 and kind != "multi_label":
        raise UserError(f"{name}: has one class only, so it is never unsure; rank by coreset")
    if bad := int((~np.isfinite(values).all(axis=1)).sum()):
        raise UserError(f"{name}: logits of {bad} of {len(values)} images are not finite; has it diverged?")
    return np.asarray(expit(values) if kind == "multi_label" else softmax(values, axis=1))


@dataclass(frozen=True)
class Pool:
    """N images that may be labelled.

    Attributes:
        names: object ``(N,)`` of strings.
        paths: object ``(N,)`` of strings, empty where an image is no file.
        vectors: ``(N, D)``, of unit length.
        probability: float64 ``(N, C)``; None of numbers, and where a gallery kept only the best class's.
        predicted: object ``(N,)`` of strings; None where the model predicts nothing.
        confidence: float64 ``(N,)``, probability of the predicted class; None likewise, and of numbers.
        covered: ``(M, D)``, vectors of labelled images.
        kind: of the task.
        deviation: float64 ``(N,)``, predicted standard deviations of numbers; None where the model predicts none.
    """

    names: NDArray[np.object_]
    paths: NDArray[np.object_]
    vectors: NDArray[np.float32]
    probability: NDArray[np.float64] | None
    predicted: NDArray[np.object_] | None
    confidence: NDArray[np.float64] | None
    covered: NDArray[np.float32]
    kind: TaskKind = "single_label"
    deviation: NDArray[np.float64] | None = None


def check_strategy(by: str, kind: TaskKind) -> None:
    """Refuse a strategy that tasks of a kind do not have."""
    if by != "coreset" and (by == VARIANCE) != (kind == "regression"):
        fits = VARIANCE if kind == "regression" else ", ".join(STRATEGIES[:-1])
        raise UserError(f"--by {by}: does not go with a {kind} task; use {fits} or coreset")


def ranking(pool: Pool, by: str, n: int) -> Ranked:
    """Rank the images to label, the most wanted first.

    Raises:
        UserError: where the pool does not have what the strategy needs.
    """
    if by == "coreset":
        return k_centre_greedy(pool.vectors, n, pool.covered)
    check_strategy(by, pool.kind)
    if by == VARIANCE:
        if pool.deviation is None:
            raise UserError(
                f"--by {by}: the model predicts no variance; train it with loss_options: {{regression: gaussian_nll}}, "
                "give an ensemble of such runs, or use coreset"
            )
        return most_uncertain(pool.deviation**2, n)
    if by == "confidence" and pool.confidence is not None and pool.kind != "multi_label":
        return most_uncertain(1 - pool.confidence, n)
    if pool.probability is None:
        has, instead = "no probabilities", ""
        if pool.confidence is not None:
            has, instead = "the best class's probability only", "confidence or "
        elif pool.predicted is not None and pool.kind == "multi_label":
            has = "those of the predicted labels only"
        raise UserError(
            f"--by {by}: needs the probability of every {'label' if pool.kind == 'multi_label' else 'class'}, and this "
            f"pool has {has}; name the images themselves as --pool, or use {instead}coreset"
        )
    return most_uncertain(uncertainty(pool.probability, by, pool.kind), n)


def to_label(pool: Pool, ranked: Ranked, task: str) -> pd.DataFrame:
    """Return rank, name, path, score, prediction and its confidence or deviation, and an empty column to fill in."""
    import pandas as pd

    rows = ranked.rows
    columns: dict[str, Any] = {
        "rank": np.arange(1, len(rows) + 1),
        "name": pool.names[rows],
        "path": pool.paths[rows],
        "score": ranked.scores.round(6),
    }
    if pool.predicted is not None:
        columns["predicted"] = pool.predicted[rows]
    if pool.confidence is not None:
        columns["confidence"] = pool.confidence[rows].round(4)
    if pool.deviation is not None:
        columns["deviation"] = pool.deviation[rows]
    return pd.DataFrame({**columns, task: ""})


class Labelled(NamedTuple):
    """Features and known targets of N images.

    Attributes:
        features: ``(N, D)``.
        labels: int64 ``(N,)``; of multi-label tasks int8 ``(N, C)``, ``UNKNOWN`` for entries that are not known; of
            regression tasks float ``(N,)``.
        kind: of the task.
    """

    features: NDArray[Any]
    labels: NDArray[Any]
    kind: TaskKind = "single_label"


class Schedule(NamedTuple):
    """How labels are given out.

    Attributes:
        start: random ones to begin with.
        step: at a time.
        rounds: number of steps.
    """

    start: int = 20
    step: int = 20
    rounds: int = 8


def learning_curves(
    pool: Labelled, test: Labelled, strategies: Sequence[str], seeds: Iterable[int], schedule: Schedule
) -> pd.DataFrame:
    """Measure the main score of the task's kind by number of labels, of random choice and each strategy.

    Args:
        pool: to choose from.
        test: to measure on, of other objects where the data name them.
        strategies: compared with random choice.
        seeds: one curve of each strategy for each.
        schedule: how labels are given out; it ends early where the pool is used up.

    Returns:
        Columns ``strategy``, ``seed``, ``labels``, and the score: ``accuracy``, ``mAP`` or ``mae``.

    Raises:
        UserError: for a pool of one class or smaller than the start, test images that give no score, or a strategy
            that the kind does not have.
    """
    import pandas as pd

    for strategy in strategies:
        check_strategy(strategy, pool.kind)
    different = {"multi_label": "a label that applies to some images only", "regression": "two different numbers"}
    if not (_varies(pool) and (_varies(test) if pool.kind == "multi_label" else len(test.labels))):
        raise UserError(
            f"learning curve: needs a pool of at least {different.get(pool.kind, 'two classes')} and other images to "
            "measure on"
        )
    if min(schedule) < 1 or not 2 <= schedule.start < len(pool.labels):
        raise UserError(
            f"learning curve: starts with {schedule.start} labels in steps of {schedule.step}, {schedule.rounds} "
            f"rounds; all must be at least 1, and the start from 2 to less than the pool's {len(pool.labels)} images"
        )
    reduction = Reduction(pool.features)
    reduced = [each._replace(features=reduction(each.features)) for each in (pool, test)]
    rows = [
        {"strategy": choice, "seed": seed, "labels": labels, MAIN[pool.kind]: score}
        for seed in seeds
        for choice in dict.fromkeys((RANDOM, *strategies))
        for labels, score in _curve(reduced[0], reduced[1], choice, seed, schedule)
    ]
    return pd.DataFrame(rows)


def _varies(labelled: Labelled) -> bool:
    """Whether there are two classes, two different numbers, or a label that applies to some and not to others."""
    if labelled.kind == "multi_label":
        return bool(((labelled.labels == 1).any(axis=0) & (labelled.labels == 0).any(axis=0)).any())
    return len(np.unique(labelled.labels)) > 1


def summarised(curves: pd.DataFrame) -> pd.DataFrame:
    """Compare each strategy with random choice, over seeds.

    Returns:
        One row a strategy: the score of the curves (its mean over all steps after the start and all seeds), ``last``
        (the same of the last step), ``ahead`` (mean difference to random choice of the same seed), ``low`` and
        ``high`` (95 % Student interval over seeds; NaN for one seed, or equal differences), ``verdict``.
    """
    import pandas as pd

    metric = _metric(curves)
    after = curves[curves["labels"] > curves["labels"].min()]
    area = after.pivot_table(metric, index="seed", columns="strategy", aggfunc="mean")
    last = curves[curves["labels"] == curves["labels"].max()].groupby("strategy")[metric].mean()
    rows = []
    for strategy in [name for name in curves["strategy"].unique() if name in area]:
        ahead = (area[strategy] - area[RANDOM]).to_numpy(np.float64)
        row = {"strategy": strategy, metric: area[strategy].mean(), "last": last[strategy], "ahead": ahead.mean()}
        low, high = row["low"], row["high"] = _student(ahead)
        better = (-high, -low) if metric in LOWER_IS_BETTER else (low, high)
        rows.append({**row, "verdict": _verdict(strategy, *better, several=len(ahead) > 1)})
    return pd.DataFrame(rows)


def _metric(curves: pd.DataFrame) -> str:
    """Name of the score that curves are of."""
    return next(name for name in curves.columns if name in MAIN.values())


def curve_figure(curves: pd.DataFrame, title: str) -> Figure:
    """Mean score by number of labels, with a band from the lowest to the highest seed."""
    metric = _metric(curves)
    figure = blank_figure(7.2, 4.4)
    axes = figure.subplots()
    for place, (strategy, of_strategy) in enumerate(curves.groupby("strategy", sort=False)):
        by_labels = of_strategy.groupby("labels")[metric]
        mean = by_labels.mean()
        is_random = strategy == RANDOM
        colour, style = ("0.35", "--") if is_random else (f"C{place - 1}", "-")
        axes.plot(mean.index, mean, style, color=colour, marker="o", markersize=3.5, label=plain(str(strategy)))
        axes.fill_between(mean.index, by_labels.min(), by_labels.max(), color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("labelled images")
    axes.set_ylabel(f"{HEADINGS[metric]} on validation and test")
    axes.set_title(plain(title), fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def _curve(pool: Labelled, test: Labelled, choice: str, seed: int, schedule: Schedule) -> Iterable[tuple[int, float]]:
    """Pairs of number of labels and score."""
    from sklearn.preprocessing import normalize

    order = _shuffled(pool, seed, schedule.start)
    chosen = order[: schedule.start]
    for number in range(schedule.rounds + 1):
        predict = _trained(pool, test, chosen)
        yield len(chosen), _score(test.labels, predict(test.features)[0], test.kind)
        rest = order[~np.isin(order, chosen)]  # in random order
        if number == schedule.rounds or not len(rest):
            return
        if choice == RANDOM:
            added = rest[: schedule.step]
        elif choice == "coreset":
            # Directions, as vectors of a gallery are: by length alone the odd ones would be far from everything.
            directions = normalize(pool.features)
            added = rest[k_centre_greedy(directions[rest], schedule.step, directions[chosen]).rows]
        else:
            values, variances = predict(pool.features[rest])
            unsure = uncertainty(values, choice, pool.kind) if variances is None else variances
            added = rest[most_uncertain(unsure, schedule.step).rows]
        chosen = np.concatenate([chosen, added])


def _trained(
    pool: Labelled, test: Labelled, chosen: NDArray[np.int64]
) -> Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64] | None]]:
    """Train on chosen rows; the model returns probabilities ``(N, C)``, or numbers ``(N,)`` and their variances."""
    features, labels = pool.features[chosen], pool.labels[chosen]
    if pool.kind == "regression":
        numbers = fitted_numbers(features, labels)

        def predicted(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            values, deviations = numbers.predict(rows, return_std=True)
            return values, deviations**2

        return predicted
    if pool.kind == "multi_label":
        of_labels = fitted_labels(features, labels)
        return lambda rows: (of_labels(rows), None)
    classifier, num_classes = fitted(features, labels), int(max(pool.labels.max(), test.labels.max())) + 1
    return lambda rows: (probabilities(classifier, rows, num_classes), None)


def _score(targets: NDArray[Any], predicted: NDArray[np.float64], kind: TaskKind) -> float:
    """The main score of a kind: mAP of probabilities ``(N, C)``, accuracy of them, or MAE of numbers ``(N,)``."""
    if kind == "multi_label":
        return float(precision_statistic(targets == 1, predicted, targets != UNKNOWN)(np.ones((1, len(targets))))[0])
    if kind == "regression":
        return float(np.abs(predicted - targets).mean())
    return float((predicted.argmax(axis=1) == targets).mean())


def _shuffled(pool: Labelled, seed: int, start: int) -> NDArray[np.int64]:
    """All rows in random order; of classes two at least among the first ``start``, which a classifier needs."""
    labels = pool.labels
    order = np.random.default_rng(seed).permutation(len(labels))
    if pool.kind in CLASS_KINDS and len(np.unique(labels[order[:start]])) < 2:
        other = int(np.flatnonzero(labels[order] != labels[order[0]])[0])
        order[[start - 1, other]] = order[[other, start - 1]]
    return order


def _student(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the mean; NaN for a single value, and for equal ones, whose spread is not known."""
    from scipy.stats import ttest_1samp

    if len(values) < 2 or np.ptp(values) < 1e-12:
        return float("nan"), float("nan")
    low, high = ttest_1samp(values, 0).confidence_interval()
    return float(low), float(high)


def _verdict(strategy: str, low: float, high: float, *, several: bool) -> str:
    if strategy == RANDOM:
        return "the comparison"
    if np.isnan(low):
        return f"{'equal in all seeds, which' if several else 'one seed'} shows nothing about chance"
    if low > 0:
        return "ahead of random choice"
    return "behind random choice" if high < 0 else "not distinguishable from random choice"
