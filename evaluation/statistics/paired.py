"""Paired comparison of two models on the same test samples: differences, tests, and corrections for several.

* Difference with its interval by group: Tango's for accuracy, a bootstrap with the same resamples for both models for
  macro F1 (``pooled.paired_difference``).
* Exact test by group: under the null hypothesis the models are exchangeable, so every group's difference could as well
  have the other sign (a randomisation test; Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005).
  With single samples as groups it is McNemar's exact test; with few groups it cannot reach small p-values, whatever
  the differences, which is as it should be: five objects are never enough for p < .05.
* McNemar (Psychometrika 12, 1947), exact: the cross-check, which takes samples for independent.
* Several comparisons: Holm, Scandinavian Journal of Statistics 6 (1979).
* Interval over seeds: a test set shows how sure a difference between these very models is, not what other seeds would
  have given, and that is often the larger part (Bouthillier et al., Accounting for Variance in Machine Learning
  Benchmarks, MLSys 2021). Welch's interval (Biometrika 34, 1947) where both sides have several seeds; a single run's
  spread is taken for that of the others (Student).

Two models differ clearly only where the interval leaves out 0 and the test by group has p < .05: with few groups either
alone is too bold at times. Of several seeds the interval over seeds must leave out 0 as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import Estimate, Interval, f1_statistic, known, share_statistic
from evaluation.statistics.pooled import in_order_of, mean_statistic, paired_difference, repetitions
from vitrail.errors import UserError
from vitrail.predictions import Predictions


def seed_interval(
    first: Sequence[float], second: Sequence[float], level: float = 0.95, *, same_answers: bool = True
) -> Interval:
    """Return the interval of the difference of two means over seeds.

    Args:
        first: scores of the runs of one experiment, at least one.
        second: those of the other, at least one; they are subtracted.
        level: of the interval.
        same_answers: whether the runs of either side predict every sample alike. Scores that are equal by coincidence
            show nothing of what seeds change.

    Returns:
        NaN where each side is a single run, and where scores are equal but predictions are not.
    """
    if len(first) < 2 and len(second) < 2:
        return Interval(math.nan, math.nan)
    if float(np.ptp(first)) == float(np.ptp(second)) == 0:  # no seed changes anything
        if not same_answers:
            return Interval(math.nan, math.nan)
        difference = float(np.mean(first) - np.mean(second))
        return Interval(difference, difference)
    from scipy.stats import ttest_ind

    found = ttest_ind(first, second, equal_var=min(len(first), len(second)) < 2).confidence_interval(level)
    return Interval(float(found.low), float(found.high))


ALPHA = 0.05
"""Level of the tests."""


@dataclass(frozen=True)
class PairedComparison:
    """Two models, or two sets of runs, on the same samples of one task.

    Attributes:
        names: of the first and the second.
        task: name of the task.
        n: samples with a known target.
        groups: different groups among them.
        accuracy: of each, 0 to 1; NaN for no samples.
        f1_macro: of each, 0 to 1; NaN for no samples.
        accuracy_difference: first less second, -1 to 1, with its 95 % interval by group; above 0 the first is better.
        f1_macro_difference: the same of macro F1.
        over_seeds: of the difference of accuracy, 95 % interval over the runs' seeds; NaN where both sides have one.
        p_value: of equal accuracy, exact test by group.
        only_first_right: samples that only the first answered rightly; None where a side is several runs.
        only_second_right: samples that only the second answered rightly; likewise.
        mcnemar_p: of equal accuracy, exact, as if samples were independent; NaN where a side is several runs.
    """

    names: tuple[str, str]
    task: str
    n: int
    groups: int
    accuracy: tuple[float, float]
    f1_macro: tuple[float, float]
    accuracy_difference: Estimate
    f1_macro_difference: Estimate
    over_seeds: Interval
    p_value: float
    only_first_right: int | None
    only_second_right: int | None
    mcnemar_p: float

    @property
    def single(self) -> bool:
        """Whether each side is a single run, which shows nothing of what its method gives with other seeds."""
        return self.only_first_right is not None

    def differs(self, p_value: float | None = None) -> bool:
        """Return whether the data show which has the higher accuracy: which model, of single runs, not which method.

        Args:
            p_value: corrected for several comparisons (``holm``); by default this comparison's own.
        """
        low, high = self.accuracy_difference.interval
        p_value = self.p_value if p_value is None else p_value
        may_be_the_seed = self.over_seeds.low <= 0 <= self.over_seeds.high
        return bool((low > 0 or high < 0) and p_value < ALPHA and not may_be_the_seed)

    def verdict(self, p_value: float | None = None) -> str:
        """Return a sentence: which is better, or that they do not differ clearly; ``p_value`` as in ``differs``."""
        first, second = self.names
        if not self.n:
            return f"{first} and {second} cannot be compared on '{self.task}': no sample has a known target."
        low, high = self.accuracy_difference.interval
        shown = self.p_value if p_value is None else p_value
        seeds = self.over_seeds
        over_seeds = "" if math.isnan(seeds.low) else f"over seeds [{seeds.low:+.3f}, {seeds.high:+.3f}], "
        basis = (
            f"difference {self.accuracy_difference.value:+.3f} [{low:+.3f}, {high:+.3f}], {over_seeds}p = {shown:.3g}, "
            f"n = {self.n} of {self.groups} groups"
        )
        if not self.differs(p_value):
            return f"{first} and {second} do not differ clearly on '{self.task}' ({basis})."
        better, worse = self.names if low > 0 else (second, first)
        if self.single:
            return (
                f"{better} is a better model than {worse} on '{self.task}' ({basis}); whether its method is better, "
                "runs with other seeds would show."
            )
        return f"{better} is better than {worse} on '{self.task}' ({basis})."


def compare_pair(
    first: Predictions,
    second: Predictions,
    task: str,
    names: tuple[str, str] = ("the first", "the second"),
    *,
    n_resamples: int = 5_000,
    seed: int = 0,
) -> PairedComparison:
    """Compare two models on the same samples, in any order; the groups are the first's.

    Raises:
        UserError: the samples, their targets or the classes are not the same, or there is no such task.
    """
    return compare_joined([first], [second], task, names, n_resamples=n_resamples, seed=seed)


def compare_joined(
    first: Sequence[Predictions],
    second: Sequence[Predictions],
    task: str,
    names: tuple[str, str] = ("the first", "the second"),
    *,
    n_resamples: int = 5_000,
    seed: int = 0,
) -> PairedComparison:
    """Compare two experiments of several runs each: folds are put together, scores are means over seeds.

    ``first`` and ``second`` are predictions of each experiment's runs, which together have the same test samples. The
    interval and the test by group are about these very runs on other samples, ``over_seeds`` about seeds.

    Raises:
        UserError: as ``compare_pair`` and ``join_runs``.
    """
    sides = [_whole(runs, task, name) for runs, name in zip((first, second), names, strict=True)]
    base = sides[0][0]
    sides[1] = [in_order_of(base, run, task, (f"in {names[0]}", f"in {names[1]}")) for run in sides[1]]
    rows = known(base.targets[task])
    targets, groups = base.targets[task][rows], base.groups[rows]
    if not len(rows):
        nan, unknown = math.nan, Interval(math.nan, math.nan)
        none, pair = Estimate(nan, unknown), (nan, nan)
        return PairedComparison(names, task, 0, 0, pair, pair, none, none, unknown, nan, 0, 0, nan)
    predicted = [np.stack([run.predicted(task)[rows] for run in side]) for side in sides]
    hits = [side == targets for side in predicted]
    right = [hit.mean(axis=0) for hit in hits]
    f1 = [mean_statistic([f1_statistic(targets, run) for run in side]) for side in predicted]
    plain_f1 = [float(statistic(np.ones((1, len(rows))))[0]) for statistic in f1]
    single = all(len(side) == 1 for side in sides)
    only = [int((right[0] > right[1]).sum()), int((right[1] > right[0]).sum())]
    return PairedComparison(
        names=names,
        task=task,
        n=len(rows),
        groups=len(set(groups.tolist())),
        accuracy=(float(right[0].mean()), float(right[1].mean())),
        f1_macro=(plain_f1[0], plain_f1[1]),
        accuracy_difference=paired_difference(
            share_statistic(right[0]),
            share_statistic(right[1]),
            groups,
            np.array_equal(right[0], right[1]),
            n_resamples,
            seed=seed,
        ),
        f1_macro_difference=paired_difference(
            f1[0], f1[1], groups, np.array_equal(predicted[0], predicted[1]), n_resamples, seed=seed
        ),
        over_seeds=seed_interval(
            *(hit.mean(axis=1).tolist() for hit in hits),
            same_answers=all(bool((side == side[:1]).all()) for side in predicted),
        ),
        p_value=sign_flip_p(_by_group(hits, groups)),
        only_first_right=only[0] if single else None,
        only_second_right=only[1] if single else None,
        mcnemar_p=mcnemar_p(only[0], only[1]) if single else math.nan,
    )


def mcnemar_p(only_first_right: int, only_second_right: int) -> float:
    """Return the two-sided exact p-value of McNemar's test; 1 where the models never differ in being right."""
    from scipy.stats import binomtest

    total = only_first_right + only_second_right
    return float(binomtest(only_first_right, total).pvalue) if total else 1.0


def sign_flip_p(differences: NDArray[np.int64]) -> float:
    """Return the two-sided exact p-value that differences of independent groups could as well have the other sign.

    Args:
        differences: int64 ``(G,)``, how many more right predictions the first model has in each group.
    """
    from scipy.signal import fftconvolve
    from scipy.stats import binom

    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)
    # The sum of m signs times s is s · (2 · heads − m): one binomial a size, then the sum of independent ones.
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        spaced = np.zeros(2 * size * count + 1)
        spaced[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = fftconvolve(chances, spaced)
    total = len(chances) // 2
    extreme = np.abs(np.arange(len(chances)) - total) >= abs(int(differences.sum()))
    return float(np.clip(chances[extreme].sum(), 0.0, 1.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for several comparisons, so that any error at all among them keeps its level.

    NaN (a comparison that could not be made) stays NaN and is not counted.
    """
    values = np.asarray(p_values, dtype=np.float64)
    made = np.flatnonzero(~np.isnan(values))
    order = made[np.argsort(values[made], kind="stable")]
    corrected = np.full(len(values), math.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)), 1.0)
    return [float(value) for value in corrected]


def _whole(runs: Sequence[Predictions], task: str, name: str) -> list[Predictions]:
    names = [name] if len(runs) == 1 else [f"{name}, run {number}" for number in range(1, len(runs) + 1)]
    if not runs:
        raise UserError(f"{name}: there are no runs to compare")
    return repetitions(runs, task, names)


def _by_group(hits: Sequence[NDArray[np.bool_]], groups: NDArray[np.object_]) -> NDArray[np.int64]:
    """Right predictions of the first side less those of the second in each group, int64.

    Sides of R and S runs are counted S and R times, so that both weigh the same.
    """
    _, index = np.unique(groups.astype(str), return_inverse=True)
    first, second = (hit.sum(axis=0) * weight for hit, weight in zip(hits, (len(hits[1]), len(hits[0])), strict=True))
    return np.rint(np.bincount(index, weights=(first - second).astype(np.float64))).astype(np.int64)
