"""What choosing pictures by a strategy is worth beside choosing them at random, on data whose labels are known.

Labels are hidden and given out step by step: a linear classifier learns from those it has, a strategy chooses the next
ones, and accuracy is measured on validation and test. All strategies of a seed begin with the same random pictures, so
their differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from evaluation.active_learning import Strategy, Uncertainty, k_centre_greedy, most_uncertain, unit
from evaluation.figures import plain
from evaluation.linear_classifier import Reduction, fitted, probabilities
from vitrail.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RANDOM = "random"
Choice = Literal["random", "entropy", "margin", "confidence", "coreset"]


class Labelled(NamedTuple):
    """Features ``(N, D)`` and known labels int64 ``(N,)``."""

    features: NDArray[Any]
    labels: NDArray[np.int64]


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
    pool: Labelled, test: Labelled, strategies: Sequence[Strategy], seeds: Iterable[int], schedule: Schedule
) -> pd.DataFrame:
    """Accuracy by number of labels, of random choice and each strategy.

    Args:
        pool: to choose from.
        test: to measure on, of other objects where the data name them.
        strategies: beside random choice.
        seeds: one curve of each strategy for each.
        schedule: how labels are given out; it ends early where the pool is used up.

    Returns:
        Columns ``strategy``, ``seed``, ``labels``, ``accuracy``.

    Raises:
        UserError: for a pool of one class or smaller than the start, or an empty test set.
    """
    import pandas as pd

    if len(np.unique(pool.labels)) < 2 or not len(test.labels):
        raise UserError("learning curve: needs a pool of at least two classes and other pictures to measure on")
    if min(schedule) < 1 or not 2 <= schedule.start < len(pool.labels):
        raise UserError(
            f"learning curve: starts with {schedule.start} labels in steps of {schedule.step}, {schedule.rounds} "
            f"rounds; all must be at least 1, and the start from 2 to less than the pool's {len(pool.labels)} pictures"
        )
    reduction = Reduction(pool.features)
    reduced = Labelled(reduction(pool.features), pool.labels), Labelled(reduction(test.features), test.labels)
    rows = [
        {"strategy": choice, "seed": seed, "labels": labels, "accuracy": accuracy}
        for seed in seeds
        for choice in dict.fromkeys((RANDOM, *strategies))
        for labels, accuracy in _curve(*reduced, cast("Choice", choice), seed, schedule)
    ]
    return pd.DataFrame(rows)


def summarised(curves: pd.DataFrame) -> pd.DataFrame:
    """How far each strategy is ahead of random choice, over seeds.

    Returns:
        One row a strategy: ``accuracy`` (mean over all steps after the start and all seeds, 0 to 1, higher is better),
        ``last`` (the same of the last step), ``ahead`` (mean difference to random choice of the same seed), ``low`` and
        ``high`` (95 % Student interval over seeds; NaN for one seed, or equal differences), ``verdict``.
    """
    import pandas as pd

    after = curves[curves["labels"] > curves["labels"].min()]
    area = after.pivot_table("accuracy", index="seed", columns="strategy", aggfunc="mean")
    last = curves[curves["labels"] == curves["labels"].max()].groupby("strategy")["accuracy"].mean()
    rows = []
    for strategy in [name for name in curves["strategy"].unique() if name in area]:
        ahead = (area[strategy] - area[RANDOM]).to_numpy(np.float64)
        low, high = _student(ahead)
        row = {"strategy": strategy, "accuracy": area[strategy].mean(), "last": last[strategy]}
        rows.append(
            {
                **row,
                "ahead": ahead.mean(),
                "low": low,
                "high": high,
                "verdict": _verdict(strategy, low, high, several=len(ahead) > 1),
            }
        )
    return pd.DataFrame(rows)


def curve_figure(curves: pd.DataFrame, title: str) -> Figure:
    """Mean accuracy by number of labels, with a band from the lowest to the highest seed."""
    from evaluation.exploration_figures import blank_figure

    figure = blank_figure(7.2, 4.4)
    axes = figure.subplots()
    for place, (strategy, of_strategy) in enumerate(curves.groupby("strategy", sort=False)):
        by_labels = of_strategy.groupby("labels")["accuracy"]
        mean = by_labels.mean()
        is_random = strategy == RANDOM
        colour, style = ("0.35", "--") if is_random else (f"C{place - 1}", "-")
        axes.plot(mean.index, mean, style, color=colour, marker="o", markersize=3.5, label=plain(str(strategy)))
        axes.fill_between(mean.index, by_labels.min(), by_labels.max(), color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("labelled pictures")
    axes.set_ylabel("accuracy on validation and test")
    axes.set_title(plain(title), fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def _curve(
    pool: Labelled, test: Labelled, choice: Choice, seed: int, schedule: Schedule
) -> Iterable[tuple[int, float]]:
    """Pairs of number of labels and accuracy."""
    order = _shuffled(pool.labels, seed, schedule.start)
    chosen, num_classes = order[: schedule.start], int(max(pool.labels.max(), test.labels.max())) + 1
    for _ in range(schedule.rounds):
        classifier = fitted(pool.features[chosen], pool.labels[chosen])
        yield len(chosen), float((classifier.predict(test.features) == test.labels).mean())
        rest = order[~np.isin(order, chosen)]
        if not len(rest):
            return
        chosen = np.concatenate([chosen, _next(pool, chosen, rest, choice, classifier, num_classes, schedule.step)])
    classifier = fitted(pool.features[chosen], pool.labels[chosen])
    yield len(chosen), float((classifier.predict(test.features) == test.labels).mean())


def _shuffled(labels: NDArray[np.int64], seed: int, start: int) -> NDArray[np.int64]:
    """All rows in random order, with two classes at least among the first ``start``: a classifier needs them."""
    order = np.random.default_rng(seed).permutation(len(labels))
    if len(np.unique(labels[order[:start]])) < 2:
        other = int(np.flatnonzero(labels[order] != labels[order[0]])[0])
        order[[start - 1, other]] = order[[other, start - 1]]
    return order


def _next(
    pool: Labelled,
    chosen: NDArray[np.int64],
    rest: NDArray[np.int64],
    choice: Choice,
    classifier: Any,
    num_classes: int,
    step: int,
) -> NDArray[np.int64]:
    """The rows that are labelled next, of those that are left, which stand in random order."""
    if choice == RANDOM:
        return rest[:step]
    if choice == "coreset":
        # Directions, as vectors of a gallery are: by length alone the odd ones would be far from everything.
        return rest[k_centre_greedy(unit(pool.features[rest]), step, unit(pool.features[chosen])).rows]
    said = probabilities(classifier, pool.features[rest], num_classes)
    return rest[most_uncertain(said, cast("Uncertainty", choice), step).rows]


def _student(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the mean; NaN for a single value, and for equal ones, which say nothing of their spread."""
    from scipy.stats import t

    if len(values) < 2 or np.ptp(values) < 1e-12:
        return float("nan"), float("nan")
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def _verdict(strategy: str, low: float, high: float, *, several: bool) -> str:
    if strategy == RANDOM:
        return "the comparison"
    if np.isnan(low):
        return "equal in all seeds, which says nothing of chance" if several else "one seed says nothing of chance"
    if low > 0:
        return "ahead of random choice"
    return "behind random choice" if high < 0 else "cannot be told from random choice"
