"""Paired comparison of two models on the same test samples: differences, tests, and corrections for several.

* Difference with its interval by group: Tango's for shares as accuracy, Student's for mean errors, a bootstrap with the
  same resamples for both models for others, as macro F1 and mAP (``pooled.paired_difference``).
* Exact test by group: under the null hypothesis the models are exchangeable, so every group's difference could as well
  have the other sign (a randomisation test; Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005).
  With single samples as groups it is McNemar's exact test; with few groups it cannot reach small p-values, whatever
  the differences, which is as it should be: five objects are never enough for p < .05.
  Errors of regression are compared in the same way, mean absolute error being a mean over samples, too. For mAP, which
  is none, there is no such test: the interval alone decides.
* McNemar (Psychometrika 12, 1947), exact: the cross-check, which takes samples for independent.
* Several comparisons: Holm, Scandinavian Journal of Statistics 6 (1979).
* Interval over seeds: a test set shows how sure a difference between these very models is, not what other seeds would
  have given, and that is often the larger part (Bouthillier et al., Accounting for Variance in Machine Learning
  Benchmarks, MLSys 2021). Welch's interval (Biometrika 34, 1947) where both sides have several seeds; a single run's
  spread is taken for that of the others (Student).

Two models differ clearly only where the interval leaves out 0 and the test by group has p < .05: with few groups either
alone is too bold at times (where there is a test). Of several seeds the interval over seeds must leave out 0 as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import Estimate, Interval, Mean, Statistic
from evaluation.statistics.pooled import in_order_of, mean_statistic, paired_difference, repetitions, same_outputs
from evaluation.statistics.scores import IN_UNITS, LOWER_IS_BETTER, MAIN, TESTED, Score, heading, names_of, scores_of
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.types import CLASS_KINDS, TaskKind


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


class PairedScore(NamedTuple):
    """One score of two models, or two sets of runs, on the same samples.

    Attributes:
        values: of the first and the second; NaN for no samples.
        difference: first less second, with its 95 % interval by group.
        p_value: of equal scores, test by group; NaN where there is none (``scores.TESTED``).
    """

    values: tuple[float, float]
    difference: Estimate
    p_value: float = math.nan


@dataclass(frozen=True)
class PairedComparison:
    """Two models, or two sets of runs, on the same samples of one task.

    Attributes:
        names: of the first and the second.
        task: name of the task.
        n: samples with a known target.
        groups: different groups among them.
        scores: by name, the main one first (``statistics.scores``).
        over_seeds: of the difference of the main score, 95 % interval over the runs' seeds; NaN where both sides have
            one.
        p_value: of equal main scores, test by group; NaN where the main score is no mean over samples, as mAP, of which
            the interval alone decides.
        only_first_right: samples that only the first answered rightly; None where a side is several runs, and of
            multi-label and regression tasks.
        only_second_right: samples that only the second answered rightly; likewise.
        mcnemar_p: of equal accuracy, exact, as if samples were independent; NaN likewise.
        single: whether each side is a single run, which shows nothing of what its method gives with other seeds.
        kind: of the task.
    """

    names: tuple[str, str]
    task: str
    n: int
    groups: int
    scores: Mapping[str, PairedScore]
    over_seeds: Interval
    p_value: float
    only_first_right: int | None
    only_second_right: int | None
    mcnemar_p: float
    single: bool = True
    kind: TaskKind = "single_label"

    @property
    def main(self) -> str:
        """Name of the main score."""
        return MAIN[self.kind]

    @property
    def difference(self) -> Estimate:
        """Of the main score, first less second."""
        return self.scores[self.main].difference

    @property
    def accuracy(self) -> tuple[float, float]:
        """Of each, of single-label and ordinal tasks."""
        return self.scores["accuracy"].values

    @property
    def f1_macro(self) -> tuple[float, float]:
        """Of each, of tasks with classes or labels."""
        return self.scores["f1_macro"].values

    @property
    def accuracy_difference(self) -> Estimate:
        """First less second, with its 95 % interval by group."""
        return self.scores["accuracy"].difference

    @property
    def f1_macro_difference(self) -> Estimate:
        """First less second, with its 95 % interval by group."""
        return self.scores["f1_macro"].difference

    @property
    def first_is_better(self) -> bool:
        """Whether the first has the better main score here, however small the difference."""
        value = self.difference.value
        return value < 0 if self.main in LOWER_IS_BETTER else value > 0

    def differs(self, p_value: float | None = None) -> bool:
        """Return whether the data show which has the better main score: which model, of single runs, not which method.

        Args:
            p_value: corrected for several comparisons (``holm``); by default this comparison's own. NaN where there is
                no test.
        """
        low, high = self.difference.interval
        p_value = self.p_value if p_value is None else p_value
        may_be_the_seed = self.over_seeds.low <= 0 <= self.over_seeds.high
        return bool((low > 0 or high < 0) and not p_value >= ALPHA and not may_be_the_seed)

    def verdict(self, p_value: float | None = None) -> str:
        """Return a sentence: which is better, or that they do not differ clearly; ``p_value`` as in ``differs``."""
        first, second = self.names
        if not self.n:
            return f"{first} and {second} cannot be compared on '{self.task}': no sample has a known target."
        form = "+.4g" if self.main in IN_UNITS else "+.3f"
        low, high = self.difference.interval
        shown = self.p_value if p_value is None else p_value
        seeds = self.over_seeds
        over_seeds = "" if math.isnan(seeds.low) else f"over seeds [{seeds.low:{form}}, {seeds.high:{form}}], "
        tested = "no test, by the interval alone" if math.isnan(shown) else f"p = {shown:.3g}"
        what = "" if self.main == "accuracy" else f" of {heading(self.main)}"
        interval = "" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]"
        basis = (
            f"difference{what} {self.difference.value:{form}}{interval}, {over_seeds}{tested}, "
            f"n = {self.n} of {self.groups} groups"
        )
        if not self.differs(p_value):
            return f"{first} and {second} do not differ clearly on '{self.task}' ({basis})."
        better, worse = self.names if self.first_is_better else (second, first)
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
    metrics: Sequence[str] = (),
) -> PairedComparison:
    """Compare two experiments of several runs each: folds are put together, scores are means over seeds.

    ``first`` and ``second`` are predictions of each experiment's runs, which together have the same test samples. The
    interval and the test by group are about these very runs on other samples, ``over_seeds`` about seeds. ``metrics``
    are the scores next to the main one, by default the usual ones of the kind (``scores.scores_of``).

    Raises:
        UserError: as ``compare_pair`` and ``join_runs``.
    """
    sides = [_whole(runs, task, name) for runs, name in zip((first, second), names, strict=True)]
    base = sides[0][0]
    sides[1] = [in_order_of(base, run, task, (f"in {names[0]}", f"in {names[1]}")) for run in sides[1]]
    rows, kind = base.known(task), base.kind(task)
    groups, single = base.groups[rows], all(len(side) == 1 for side in sides)
    if not len(rows):
        nothing = Interval(math.nan, math.nan)
        empty = dict.fromkeys(names_of(kind, metrics), PairedScore((math.nan, math.nan), Estimate(math.nan, nothing)))
        return PairedComparison(names, task, 0, 0, empty, nothing, math.nan, None, None, math.nan, single, kind)
    scores = [[scores_of(run, task, metrics) for run in side] for side in sides]
    agree = all(same_outputs(base, run, task) for side in sides for run in side)
    main = [[own[MAIN[kind]].statistic for own in side] for side in scores]
    hits = None
    if kind in CLASS_KINDS:
        hits = [np.stack([run.predicted(task)[rows] == base.targets[task][rows] for run in side]) for side in sides]
    only = None
    if single and hits is not None:
        only = int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum())
    paired = _paired_scores(scores, groups, agree, n_resamples, seed)
    return PairedComparison(
        names=names,
        task=task,
        n=len(rows),
        groups=len(set(groups.tolist())),
        scores=paired,
        over_seeds=seed_interval(
            [_of_all(one, len(rows)) for one in main[0]],
            [_of_all(one, len(rows)) for one in main[1]],
            same_answers=all(same_outputs(side[0], run, task) for side in sides for run in side[1:]),
        ),
        p_value=sign_flip_p(_by_group(hits, groups)) if hits else paired[MAIN[kind]].p_value,
        only_first_right=None if only is None else only[0],
        only_second_right=None if only is None else only[1],
        mcnemar_p=math.nan if only is None else mcnemar_p(*only),
        single=single,
        kind=kind,
    )


def _paired_scores(
    scores: Sequence[Sequence[Mapping[str, Score]]],
    groups: NDArray[np.object_],
    agree: bool,
    n_resamples: int,
    seed: int,
) -> dict[str, PairedScore]:
    """Each score of both sides, whose runs are averaged, with the interval of the difference."""
    found = {}
    for name, one in scores[0][0].items():
        first, second = (mean_statistic([own[name].statistic for own in side]) for side in scores)
        same = agree
        if isinstance(first, Mean) and isinstance(second, Mean):
            same = np.array_equal(first.scores, second.scores)
        found[name] = PairedScore(
            (_of_all(first, len(groups)), _of_all(second, len(groups))),
            paired_difference(first, second, groups, same, n_resamples, seed=seed, bounds=one.bounds),
            _p_of_means(first, second, groups) if name in TESTED else math.nan,
        )
    return found


def _p_of_means(first: Statistic, second: Statistic, groups: NDArray[np.object_]) -> float:
    """The test by group of scores that are means over samples."""
    if not (isinstance(first, Mean) and isinstance(second, Mean)):
        return math.nan
    index = np.unique(groups.astype(str), return_inverse=True)[1]
    return sign_flip_p(np.bincount(index, weights=first.scores - second.scores))


def _of_all(statistic: Statistic, n: int) -> float:
    return float(statistic(np.ones((1, n)))[0])


def mcnemar_p(only_first_right: int, only_second_right: int) -> float:
    """Return the two-sided exact p-value of McNemar's test; 1 where the models never differ in being right."""
    from scipy.stats import binomtest

    total = only_first_right + only_second_right
    return float(binomtest(only_first_right, total).pvalue) if total else 1.0


_EXACT_SIGNS = 16
"""Groups of which all signs of differences that are no whole numbers are tried; of more groups, a sample."""

_SAMPLED_SIGNS = 100_000


def sign_flip_p(differences: NDArray[Any], *, seed: int = 0) -> float:
    """Return the two-sided p-value that differences of independent groups could as well have the other sign.

    Exact for whole numbers and for up to 16 groups that differ, otherwise of 100,000 sampled signs, the signs as they
    are counted among them (Phipson & Smyth, Statistical Applications in Genetics and Molecular Biology 9, 2010).

    Args:
        differences: int64 ``(G,)``, how many more right predictions the first model has in each group; or float64, how
            much larger its sum of losses is.
        seed: of sampled signs.
    """
    differing = differences[differences != 0]
    if differing.dtype.kind != "f":
        return _whole_sign_flip_p(differing)
    if not len(differing):
        return 1.0
    observed = abs(float(differing.sum())) * (1 - 1e-9)
    if len(differing) <= _EXACT_SIGNS:
        numbers = np.arange(2 ** len(differing))[:, None]
        signs = 1.0 - 2.0 * ((numbers >> np.arange(len(differing))) & 1)
        return float((np.abs(signs @ differing) >= observed).mean())
    rng, extreme, rows = np.random.default_rng(seed), 1, max(1, 4_000_000 // len(differing))
    for start in range(0, _SAMPLED_SIGNS, rows):
        size = min(rows, _SAMPLED_SIGNS - start), len(differing)
        signs = rng.integers(2, size=size, dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ differing) >= observed).sum())
    return extreme / (_SAMPLED_SIGNS + 1)


def _whole_sign_flip_p(differences: NDArray[np.int64]) -> float:
    from scipy.signal import fftconvolve
    from scipy.stats import binom

    sizes, counts = np.unique(np.abs(differences), return_counts=True)
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
