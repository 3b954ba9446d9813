"""Base-to-novel evaluation: accuracy on the classes that were trained, on the others, and their harmonic mean.

As in Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022, with the classes halved as in the
code of Zhou et al., Learning to Prompt for Vision-Language Models (CoOp), IJCV 2022: base classes are the first half in
label order, and each half of the test samples is classified among the classes of its own half only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import Estimate, Statistic, estimate, known, share_statistic, student_interval
from evaluation.statistics.pooled import JoinedScore, in_order_of, mean_statistic, paired_difference
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.predictions import Predictions, predicted_classes, refuse_kinds
from vitrail.types import LABEL_TASK

_ESTIMATES = ("base", "novel", "harmonic_mean")


@dataclass(frozen=True)
class BaseToNovel:
    """Accuracy on either half of the classes; 0 to 1, higher is better.

    Attributes:
        base_classes: number of base classes, the first ones in label order.
        novel_classes: number of the others.
        n_base: test samples of base classes.
        n_novel: test samples of novel classes.
        base: accuracy on the former among base classes.
        novel: accuracy on the latter among novel classes.
        harmonic_mean: of both, 0 where either is.
    """

    base_classes: int
    novel_classes: int
    n_base: int
    n_novel: int
    base: Estimate
    novel: Estimate
    harmonic_mean: Estimate


@dataclass(frozen=True)
class Cost:
    """A model before and after fine-tuning on the same samples; differences are paired, after less before, -1 to 1."""

    after: BaseToNovel
    before: BaseToNovel
    base: Estimate
    novel: Estimate
    harmonic_mean: Estimate


class _Halves:
    """Which of the N samples with a known target are of base classes, and which are classified correctly."""

    def __init__(self, predictions: Predictions, base: int) -> None:
        rows = known(predictions.targets[LABEL_TASK])
        targets = predictions.targets[LABEL_TASK][rows]
        self.groups = predictions.groups[rows]
        self.is_base = targets < base
        self.right = _right(targets, predictions.logits[LABEL_TASK][rows], base)

    def statistics(self) -> dict[str, tuple[Statistic, NDArray[np.bool_]]]:
        """Each estimate as a function of the weights of some samples, and these samples."""
        everything = np.ones(len(self.right), dtype=bool)
        return {
            "base": (share_statistic(self.right[self.is_base]), self.is_base),
            "novel": (share_statistic(self.right[~self.is_base]), ~self.is_base),
            "harmonic_mean": (self._harmonic_mean, everything),
        }

    def _harmonic_mean(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        sides = (side.astype(np.float64) for side in (self.is_base, ~self.is_base))
        # A resample may lack one side: accuracy 0.
        base, novel = (weights @ (side * self.right) / np.maximum(weights @ side, 1) for side in sides)
        values: NDArray[np.float64] = 2 * base * novel / np.where(base + novel > 0, base + novel, 1)
        return values


def base_to_novel(
    predictions: Predictions, base: int | None = None, *, n_resamples: int = 5_000, seed: int = 0
) -> BaseToNovel:
    """Measure accuracy on both halves, each among its own classes.

    The intervals of the two accuracies resample the groups of their half, that of the harmonic mean those of both
    together; a resample that lacks one half counts as 0 there, which can only widen the interval.

    Args:
        predictions: of samples of all classes.
        base: number of base classes; None for half of them, rounded up.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: there is no such half, or no sample of it.
    """
    base = checked_base(predictions, base)
    halves = _Halves(predictions, base)
    n_base = int(halves.is_base.sum())
    estimates = {
        name: estimate(statistic, halves.groups[rows], n_resamples, seed=seed)
        for name, (statistic, rows) in halves.statistics().items()
    }
    classes = len(predictions.tasks[LABEL_TASK])
    return BaseToNovel(base, classes - base, n_base, len(halves.right) - n_base, **estimates)


def compare(
    after: Predictions, before: Predictions, base: int | None = None, *, n_resamples: int = 5_000, seed: int = 0
) -> Cost:
    """Measure what fine-tuning changed; the groups that are resampled are those of ``after``.

    Args:
        after: predictions of the fine-tuned model.
        before: predictions of the same samples, in any order, by the model that fine-tuning began with.
        base: number of base classes; None for half of them, rounded up.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: the samples, their targets or the classes are not the same; or as ``base_to_novel``.
    """
    before = in_order_of(after, before, LABEL_TASK)
    base = checked_base(after, base)
    old, new = _Halves(before, base), _Halves(after, base)
    earlier = old.statistics()
    differences = {
        name: paired_difference(
            later,
            earlier[name][0],
            new.groups[rows],
            bool((old.right[rows] == new.right[rows]).all()),
            n_resamples,
            seed=seed,
        )
        for name, (later, rows) in new.statistics().items()
    }
    sides = [base_to_novel(one, base, n_resamples=n_resamples, seed=seed) for one in (after, before)]
    return Cost(sides[0], sides[1], *(differences[name] for name in _ESTIMATES))


def over_seeds(runs: Sequence[Predictions], base: int | None = None) -> dict[str, JoinedScore]:
    """Join runs that differ in their seed: base, novel and harmonic mean of each, and their means with intervals.

    Args:
        runs: predictions of the same samples.
        base: number of base classes; None for half of them, rounded up.

    Raises:
        UserError: as ``base_to_novel``; or the samples are not the same.
    """
    base = checked_base(runs[0], base)
    aligned = [runs[0], *(in_order_of(runs[0], run, LABEL_TASK, ("in the first", "in another")) for run in runs[1:])]
    halves = [_Halves(run, base) for run in aligned]
    found = {}
    for name, (_, rows) in halves[0].statistics().items():
        statistics = [one.statistics()[name][0] for one in halves]
        values = tuple(float(one(np.ones((1, int(rows.sum()))))[0]) for one in statistics)
        found[name] = JoinedScore(
            values=values,
            mean=float(np.mean(values)),
            std=float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
            interval=student_interval(values),
            pooled=estimate(mean_statistic(statistics), halves[0].groups[rows], 2_000),
        )
    return found


def restricted_accuracy(
    targets: NDArray[np.int64], logits: NDArray[np.float32], base: int, *, novel: bool = False
) -> float:
    """Accuracy on the samples of one half of the classes, among these only; 0 to 1, higher is better, NaN for none.

    Args:
        targets: int64 ``(N,)``, all known.
        logits: float32 ``(N, C)``.
        base: number of base classes.
        novel: the other half.
    """
    rows = (targets >= base) == novel
    return float(_right(targets, logits, base)[rows].mean()) if rows.any() else math.nan


def accuracy_table(result: BaseToNovel | Cost, title: str, note: str = "") -> Table:
    """Return the result as a table for the terminal, with a note below such as what was not checked."""
    cost = result if isinstance(result, Cost) else None
    after = result.after if isinstance(result, Cost) else result
    labels = (f"base, among {after.base_classes} classes", f"novel, among {after.novel_classes} classes")
    sizes = after.n_base, after.n_novel, after.n_base + after.n_novel
    lines = []
    for name, label, n in zip(_ESTIMATES, (*labels, "harmonic mean"), sizes, strict=True):
        cells = [_with_interval(getattr(after, name))]
        if cost:
            cells += [_with_interval(getattr(cost.before, name)), _with_interval(getattr(cost, name), "+")]
        lines.append([label, str(n), *cells])
    columns = ("after [95 %]", "before [95 %]", "difference [95 %]") if cost else ("[95 %]",)
    return Table(["accuracy", "n", *columns], lines, title=title, caption=note)


def plain_values(result: BaseToNovel | Cost | Estimate | int) -> Any:
    """Return the result as JSON has it; an estimate becomes an object of ``value``, ``low`` and ``high``."""
    if isinstance(result, int):
        return result
    if isinstance(result, Estimate):
        return {"value": result.value, "low": result.interval.low, "high": result.interval.high}
    return {field.name: plain_values(getattr(result, field.name)) for field in fields(result)}


def checked_base(predictions: Predictions, base: int | None) -> int:
    """Return the number of base classes, by default half of them.

    Raises:
        UserError: there is no such half, or no sample of it.
    """
    if LABEL_TASK not in predictions.tasks:
        raise UserError(f"base-to-novel: the predictions have no task '{LABEL_TASK}'; test a model of classes")
    refuse_kinds({LABEL_TASK: predictions.kind(LABEL_TASK)}, "base-to-novel")
    num_classes = len(predictions.tasks[LABEL_TASK])
    base = (num_classes + 1) // 2 if base is None else base
    if not 0 < base < num_classes:
        raise UserError(f"--base: must be from 1 to {num_classes - 1}, as there are {num_classes} classes; got {base}")
    targets = predictions.targets[LABEL_TASK]
    for half, is_there in (("base", (targets[known(targets)] < base).any()), ("novel", (targets >= base).any())):
        if not is_there:
            raise UserError(
                f"base-to-novel: no sample is of the {half} classes ({base} of {num_classes} are base); test on data "
                f"with all classes"
            )
    return base


def _right(targets: NDArray[np.int64], logits: NDArray[np.float32], base: int) -> NDArray[np.bool_]:
    """Which predictions are right, each among the classes of the sample's own half."""
    # Within a half all logits may be equal, as where a generative model names a class of the other one: not to be luck.
    is_base = targets < base
    among_base = predicted_classes(logits[:, :base]) == targets
    among_novel = predicted_classes(logits[:, base:]) == targets - base
    right: NDArray[np.bool_] = np.where(is_base, among_base, among_novel & ~is_base)
    return right


def _with_interval(value: Estimate, sign: str = "") -> str:
    (low, high), form = value.interval, f"{sign}.3f"
    return f"{value.value:{form}} [{low:{form}}, {high:{form}}]"
