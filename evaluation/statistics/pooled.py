"""Several runs of one experiment as one result: seeds on the same test set, folds on parts of it, or both.

Two kinds of chance differ. The spread over runs (standard deviation, Student's interval) is what another seed or fold
would change; the interval by group is what other objects in the test set would change, with the runs as they are.
Neither includes the other. Folds share most of their training data, so their spread is no independent sample of
anything (Bengio & Grandvalet, No unbiased estimator of the variance of k-fold cross-validation, JMLR 5, 2004): for
folds the pooled predictions with their interval by group are the number to quote.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import (
    Estimate,
    Interval,
    Linearised,
    Mean,
    Share,
    Statistic,
    group_interval,
    student_interval,
    variance_of_mean,
    wilson,
)
from evaluation.statistics.scores import MAIN, Coverage, names_of, scores_of
from vitrail.errors import UserError
from vitrail.predictions import Predictions, concatenate
from vitrail.types import CLASS_KINDS, UNKNOWN, TaskKind


def paired_difference(
    later: Statistic,
    earlier: Statistic,
    groups: NDArray[Any],
    agree: bool,
    n_resamples: int = 5_000,
    *,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Return the difference of a statistic of two models on the same N samples, with its 95 % interval by group.

    What makes a sample hard for both models cancels out. The difference of two shares has ``paired_share_interval``;
    ``coverage@R`` has ``coverage_difference_interval``; of other statistics both models have the same resamples.

    Args:
        later: of the one model.
        earlier: of the other; it is subtracted.
        groups: ``(N,)``, the group of each sample.
        agree: whether the models predict every sample alike. No resample can differ then: the interval is that of as
            many trials as groups in which none differed (Wilson), to both sides; NaN without finite bounds.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.
        bounds: lowest and highest value of the statistic.
    """
    span = bounds[1] - bounds[0]
    difference: Statistic
    if isinstance(later, Mean) and isinstance(earlier, Mean):
        difference = Mean(later.scores - earlier.scores)
    else:

        def difference(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            return later(weights) - earlier(weights)

    value = float(difference(np.ones((1, len(groups))))[0])
    if agree:
        most = math.nan if math.isinf(span) else span * wilson(0.0, len(np.unique(groups))).high
        return Estimate(value, Interval(-most, most))
    if isinstance(later, Share) and isinstance(earlier, Share):
        return Estimate(value, paired_share_interval(later.scores - earlier.scores, groups))
    if isinstance(later, Coverage) and isinstance(earlier, Coverage):
        return Estimate(value, coverage_difference_interval(later, earlier, groups))
    return Estimate(value, group_interval(difference, groups, n_resamples, seed=seed, bounds=(-span, span)))


def coverage_difference_interval(later: Coverage, earlier: Coverage, groups: NDArray[Any]) -> Interval:
    """Return the interval of a difference of ``coverage@R``, from the intervals of both (MOVER).

    Zou and Donner, Statistics in Medicine 27, 2008, without the correlation of the two, which makes it wider.
    Percentiles of common resamples cover .84 to .88 where the models differ and groups are of very unequal size: they
    choose thresholds by the errors that they count.

    Args:
        later: of the one model.
        earlier: of the other; it is subtracted.
        groups: ``(N,)``, the group of each sample.
    """
    one = np.ones((1, len(groups)))
    (first, own), (second, other) = ((float(side(one)[0]), side.interval(groups)) for side in (later, earlier))
    below = math.hypot(first - own.low, other.high - second)
    above = math.hypot(own.high - first, second - other.low)
    return Interval(max(-1.0, first - second - below), min(1.0, first - second + above))


def paired_share_interval(differences: NDArray[np.float64], groups: NDArray[Any], level: float = 0.95) -> Interval:
    """Return the interval of a mean difference of paired scores: Tango's with the effective number of pairs.

    Tango's score interval (Statistics in Medicine 17, 1998) is made for few pairs that differ. As in ``share_interval``
    the variance of the grouped mean gives the number of independent pairs, and Student's quantile stands in for the
    normal one. Simulated coverage (11 to 500 groups of equal and very unequal size, 4 to 30 % of the pairs differing,
    correlation 0 to .5): .93 to 1.00.

    Args:
        differences: ``(N,)``, from -1 to 1; 0 for pairs that do not differ.
        groups: ``(N,)``, the group of each sample.
        level: of the interval.
    """
    from scipy.optimize import brentq
    from scipy.special import stdtrit

    num_groups = len(np.unique(groups))
    mean, variance = float(differences.mean()), variance_of_mean(differences, groups)
    if variance == 0:
        most = wilson(0.0, num_groups, level).high
        return Interval(max(-1.0, mean - most), min(1.0, mean + most))
    independent = float(differences.var()) / len(differences)
    pairs = len(differences) * independent / variance
    gains, losses = (float(np.maximum(sign * differences, 0).mean()) for sign in (1, -1))
    quantile = float(stdtrit(num_groups - 1, (1 + level) / 2))

    def score(difference: float) -> float:
        """How many standard errors the observed difference lies above this one, if this one were true."""
        linear = (2 + losses - gains) * difference - gains - losses
        root = math.sqrt(max(linear**2 + 8 * losses * difference * (1 - difference), 0.0))
        spread = (root - linear) / 2 + difference * (1 - difference)
        return math.sqrt(pairs) * (mean - difference) / math.sqrt(max(spread, 1e-300))

    def end(outermost: float, target: float) -> float:
        if (score(outermost) - target) * (score(mean) - target) > 0:
            return outermost
        return float(brentq(lambda difference: score(difference) - target, outermost, mean, xtol=1e-12))

    return Interval(end(-1.0, quantile), end(1.0, -quantile))


def in_order_of(
    after: Predictions, before: Predictions, task: str, labels: tuple[str, str] = ("after", "before")
) -> Predictions:
    """Return the rows of ``before`` in the order of ``after``, with its groups, so that both resample alike.

    Samples are matched by name, because a data set that is loaded with other options (fewer classes, say) numbers its
    rows differently.

    Args:
        after: one model's predictions.
        before: the other's, of the same samples in any order.
        task: whose classes and targets must agree.
        labels: what the message calls the two, as in "2 samples only …".

    Raises:
        UserError: classes, samples or targets are not the same; names what differs first.
    """

    def refused(what: str) -> UserError:
        return UserError(f"predictions {labels[1]} and {labels[0]}: {what}; test both on the same data")

    if (kind := before.kind(task)) != after.kind(task):
        raise refused(f"task '{task}' is {after.kind(task)} {labels[0]} and {kind} {labels[1]}")
    classes = [list(predictions.tasks.get(task, [])) for predictions in (after, before)]
    if classes[0] != classes[1]:
        raise refused(f"the classes of '{task}' differ: {_first_difference(classes[0], classes[1], labels)}")
    row_of = {name: row for row, name in enumerate(before.names.tolist())}
    names = after.names.tolist()
    if len(row_of) != len(before) or len(set(names)) != len(names):
        raise refused("several samples have the same name, so they cannot be paired")
    only = [name for name in names if name not in row_of], sorted(row_of.keys() - set(names))
    differing = [f"{len(own)} only {label} (first '{own[0]}')" for own, label in zip(only, labels, strict=True) if own]
    if differing:
        raise refused(f"the samples differ: {', '.join(differing)}")
    ordered = before.take(np.array([row_of[name] for name in names], dtype=np.int64))
    same = np.isclose(ordered.targets[task], after.targets[task], rtol=0, atol=0, equal_nan=True)
    bad = np.flatnonzero(~(same.all(axis=1) if same.ndim > 1 else same))
    if bad.size:
        first = names[bad[0]]
        raise refused(f"{bad.size} of {len(names)} samples have another target of '{task}', first '{first}'")
    return replace(ordered, groups=after.groups)


def _first_difference(after: Sequence[str], before: Sequence[str], labels: tuple[str, str]) -> str:
    for index, (new, old) in enumerate(zip(after, before, strict=False)):
        if new != old:
            return f"number {index} is '{new}' {labels[0]} and '{old}' {labels[1]}"
    return f"{len(after)} {labels[0]}, {len(before)} {labels[1]}"


Kind = Literal["one run", "seeds", "folds", "seeds and folds"]


@dataclass(frozen=True)
class JoinedScore:
    """One score of several runs.

    Attributes:
        values: of each run, on its own test samples; NaN where it has none with a known target.
        mean: of these.
        std: their standard deviation (n − 1); NaN for one run.
        interval: Student's 95 % interval of the mean over runs; NaN for one run, and where runs with other predictions
            have the same score: that is a coincidence, not certainty.
        pooled: over all samples, folds put together and then the mean over seeds, with its 95 % interval by group.
    """

    values: tuple[float, ...]
    mean: float
    std: float
    interval: Interval
    pooled: Estimate


@dataclass(frozen=True)
class JoinedRuns:
    """Several runs of one experiment on one task.

    Attributes:
        kind: whether the runs have the same test samples (seeds), none in common (folds), or both.
        task: name of the task.
        runs: names of the runs.
        n: different samples with a known target in all test sets together.
        groups: different groups among them.
        unanswered: how many of them have no prediction and so count as wrong; the mean over seeds.
        scores: by name, the main one first (``statistics.scores``).
        task_kind: of the task.
    """

    kind: Kind
    task: str
    runs: tuple[str, ...]
    n: int
    groups: int
    unanswered: float
    scores: Mapping[str, JoinedScore]
    task_kind: TaskKind = "single_label"

    @property
    def main(self) -> str:
        """Name of the main score."""
        return MAIN[self.task_kind]

    @property
    def main_score(self) -> JoinedScore:
        """The score by which models are compared."""
        return self.scores[self.main]

    @property
    def accuracy(self) -> JoinedScore:
        """Share of right predictions, of single-label and ordinal tasks."""
        return self.scores["accuracy"]

    @property
    def f1_macro(self) -> JoinedScore:
        """Mean F1 over classes or labels."""
        return self.scores["f1_macro"]


def join_runs(
    runs: Sequence[Predictions],
    task: str,
    names: Sequence[str] = (),
    *,
    n_resamples: int = 5_000,
    seed: int = 0,
    metrics: Sequence[str] = (),
) -> JoinedRuns:
    """Join runs of one experiment that differ in seed, in fold, or in both.

    Args:
        runs: predictions of at least one run each, on the test set of its own.
        task: name of the task.
        names: of the runs, for messages; numbered by default.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.
        metrics: scores next to the main one, by default the usual ones of the kind (``scores.scores_of``).

    Raises:
        UserError: test sets that overlap only in part, folds with different numbers of runs, seeds with other classes,
            folds without a common one.
    """
    names = list(names) or [f"run {number}" for number in range(1, len(runs) + 1)]
    whole = repetitions(runs, task, names)
    several = len(whole) > 1, len(runs) > len(whole)
    kinds: dict[tuple[bool, bool], Kind] = {
        (True, False): "seeds",
        (False, True): "folds",
        (True, True): "seeds and folds",
    }
    rows, kind = whole[0].known(task), whole[0].kind(task)
    without = [(run.predicted(task)[rows] == UNKNOWN).sum() for run in whole] if kind in CLASS_KINDS else [0]
    return JoinedRuns(
        kind=kinds.get(several, "one run"),
        task=task,
        runs=tuple(names),
        n=len(rows),
        groups=len(set(whole[0].groups[rows].tolist())),
        unanswered=float(np.mean(without)),
        scores=_scores(runs, whole, task, (n_resamples, seed), metrics),
        task_kind=kind,
    )


def repetitions(runs: Sequence[Predictions], task: str, names: Sequence[str]) -> list[Predictions]:
    """Put folds together: as many sets of predictions as there are seeds, each of all samples in the same order.

    Where each fold was run with several seeds, the first runs of all folds make the first set, and so on. A class that
    the train split of some fold lacks has the lowest logit there.

    Returns:
        At least one; all have the samples, targets and groups of the first. Of folds they have this task alone.

    Raises:
        UserError: as ``join_runs``.
    """
    folds = _by_samples(runs, names)
    sizes = {len(members) for members in folds}
    if len(sizes) > 1:
        fewest, most = (min(folds, key=len), max(folds, key=len))
        raise UserError(
            f"runs to join: the test set of {names[most[0]]} was run {len(most)} times and that of {names[fewest[0]]} "
            f"{len(fewest)} times; give every fold the same number of seeds"
        )
    for run, name in zip(runs, names, strict=True):
        if task not in run.tasks:
            raise UserError(f"{name}: has no task '{task}'; it has {', '.join(run.tasks)}")
    if len(folds) > 1:
        runs = _with_common_classes(runs, task, names)
    sets = [concatenate([runs[members[number]] for members in folds]) for number in range(sizes.pop())]
    first = sets[0]
    labels = [f"in {names[member]}" for member in folds[0]]
    others = zip(sets[1:], labels[1:], strict=True)
    return [first, *(in_order_of(first, other, task, (labels[0], label)) for other, label in others)]


def mean_statistic(statistics: Sequence[Statistic]) -> Statistic:
    """Return the mean of several statistics of the same samples; of means a mean, of shares a share."""
    coverages = [single for single in statistics if isinstance(single, Coverage)]
    if len(coverages) == len(statistics):
        return Coverage([model for single in coverages for model in single.models], coverages[0].risk)
    means = [single.scores for single in statistics if isinstance(single, Mean)]
    areas = [single.limiting for single in statistics if isinstance(single, Linearised)]
    if len(areas) == len(statistics):
        return Linearised(np.mean(means, axis=0), areas[0])
    if len(means) == len(statistics):
        kind = Share if all(isinstance(single, Share) for single in statistics) else Mean
        return kind(np.mean(means, axis=0))

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = np.mean([single(weights) for single in statistics], axis=0)
        return values

    return statistic


def _by_samples(runs: Sequence[Predictions], names: Sequence[str]) -> list[list[int]]:
    """Runs with the same test samples together, in the order of their first."""
    folds: dict[frozenset[str], list[int]] = {}
    owner: dict[str, int] = {}
    for index, run in enumerate(runs):
        samples = frozenset(run.names.tolist())
        if len(samples) != len(run):
            raise UserError(f"{names[index]}: several samples have the same name, so runs cannot be joined")
        if samples not in folds:
            shared = sorted(sample for sample in samples if sample in owner)
            if shared:
                raise UserError(
                    f"runs to join: {names[index]} and {names[owner[shared[0]]]} share {len(shared)} test samples "
                    f"(first '{shared[0]}') but not all; seeds have the same test set, folds have none in common"
                )
            owner.update(dict.fromkeys(samples, index))
        folds.setdefault(samples, []).append(index)
    return list(folds.values())


def _with_common_classes(runs: Sequence[Predictions], task: str, names: Sequence[str]) -> list[Predictions]:
    """The runs with this task alone and all its classes: as they are where all have the same, else by name.

    Labels are counted from each fold's own thresholds (the logit of a probability less that of the threshold): folds
    choose different ones, and the threshold of all together is 0.5.
    """
    kind = runs[0].kind(task)
    if other := [name for run, name in zip(runs, names, strict=True) if run.kind(task) != kind]:
        raise UserError(f"runs to join: '{task}' is {kind} in {names[0]} and not in {other[0]}; join runs of one kind")
    if kind == "multi_label":
        runs = [_from_thresholds(run, task) for run in runs]
    if kind == "regression":
        kept = {task: list(runs[0].tasks[task])}
        return [
            replace(run, tasks=kept, targets={task: run.targets[task]}, logits={task: run.logits[task]}) for run in runs
        ]
    for run, name in zip(runs[1:], names[1:], strict=True):
        if not set(run.tasks[task]) & set(runs[0].tasks[task]):
            raise UserError(
                f"runs to join: {name} and {names[0]} have no class of '{task}' in common; join runs of one experiment"
            )
    own = [list(run.tasks[task]) for run in runs]
    # Not in the order of the runs, so that the folds of two experiments can be compared whichever came first.
    common = own[0] if all(classes == own[0] for classes in own) else sorted({*itertools.chain(*own)})
    if kind == "ordinal" and any(classes != own[0] for classes in own):
        raise UserError(
            f"runs to join: the ordered classes of '{task}' are not the same in all folds; name all of them in their "
            "order in the data (data columns.classes)"
        )
    number = {class_name: index for index, class_name in enumerate(common)}
    found = []
    for run, class_names in zip(runs, own, strict=True):
        index = np.array([number[class_name] for class_name in class_names], dtype=np.int64)
        targets, logits = run.targets[task], np.full((len(run), len(common)), np.finfo(np.float32).min, np.float32)
        logits[:, index] = run.logits[task]
        if kind == "multi_label":
            moved = np.full(logits.shape, UNKNOWN, targets.dtype)
            moved[:, index] = targets
        else:
            moved = np.where(targets == UNKNOWN, UNKNOWN, index[np.maximum(targets, 0)])
        found.append(replace(run, tasks={task: common}, targets={task: moved}, logits={task: logits}))
    return found


def _from_thresholds(run: Predictions, task: str) -> Predictions:
    """The predictions with logits less those of the thresholds, and without thresholds."""
    from scipy.special import logit

    offset = logit(np.clip(run.thresholds_of(task), 1e-6, 1 - 1e-6))
    logits = (run.logits[task].astype(np.float64) - offset).astype(np.float32)
    return replace(run, logits={**run.logits, task: logits}, thresholds={})


def _scores(
    runs: Sequence[Predictions],
    whole: Sequence[Predictions],
    task: str,
    bootstrap: tuple[int, int],
    metrics: Sequence[str],
) -> dict[str, JoinedScore]:
    nothing = Interval(math.nan, math.nan)
    rows = whole[0].known(task)
    if not len(rows):
        empty = JoinedScore((math.nan,) * len(runs), math.nan, math.nan, nothing, Estimate(math.nan, nothing))
        return dict.fromkeys(names_of(whole[0].kind(task), metrics), empty)
    # Of seeds, whose sets are the runs themselves, each run's scores are known already.
    of_whole = [scores_of(run, task, metrics) for run in whole]
    of_runs = of_whole
    if len(whole) < len(runs):
        of_runs = [scores_of(run, task, metrics) if len(run.known(task)) else {} for run in runs]
    sizes = [len(run.known(task)) for run in (whole if of_runs is of_whole else runs)]
    alike = len(whole) == len(runs) and all(same_outputs(whole[0], run, task) for run in whole[1:])
    found = {}
    for name, first in of_whole[0].items():
        values = tuple(
            float(own[name].statistic(np.ones((1, size)))[0]) if own else math.nan
            for own, size in zip(of_runs, sizes, strict=True)
        )
        there = [value for value in values if not math.isnan(value)]
        varies = len(there) > 0 and (np.ptp(there) > 0 or alike)
        pooled = replace(first, statistic=mean_statistic([own[name].statistic for own in of_whole]))
        found[name] = JoinedScore(
            values=values,
            mean=float(np.mean(there)) if there else math.nan,
            std=float(np.std(there, ddof=1)) if len(there) > 1 else math.nan,
            interval=student_interval(there, bounds=first.bounds) if varies else nothing,
            pooled=pooled.estimate(whole[0].groups[rows], bootstrap[0], seed=bootstrap[1]),
        )
    return found


def same_outputs(first: Predictions, second: Predictions, task: str) -> bool:
    """Return whether two sets of predictions of the same samples predict the same class, labels or number for each."""
    match first.kind(task):
        case "multi_label":
            return np.array_equal(first.logits[task], second.logits[task])
        case "regression":
            return np.array_equal(first.values(task), second.values(task))
        case _:
            return np.array_equal(first.predicted(task), second.predicted(task))
