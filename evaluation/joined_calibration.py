"""Expected calibration error of one run or of several runs of one experiment, with temperatures or without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evaluation.calibration import calibration_error, expected_calibration_error
from evaluation.joining import repetitions
from evaluation.statistics import Estimate, Interval, known
from vitrail.predictions import Predictions


def joined_calibration_error(
    runs: Sequence[Predictions],
    task: str,
    names: Sequence[str],
    temperatures: Sequence[float] | None = None,
    n_resamples: int = 5_000,
) -> Estimate:
    """ECE over all samples: folds are put together, and of seeds the mean is taken.

    Args:
        runs: predictions of each run, at least one.
        task: whose confidences.
        names: of the runs, for messages.
        temperatures: above 0, by which each run's logits are divided; as they are where not given.
        n_resamples: of the bootstrap.

    Returns:
        0 to 1, lower is better; NaN where no target is known. The interval is by group; for several seeds it is NaN,
        because what chance alone gives (see ``calibration_error``) is not known for answers that depend on each other.

    Raises:
        UserError: the runs cannot be joined, as ``join_runs``.
    """
    if temperatures is not None:
        runs = [
            replace(run, logits={**run.logits, task: run.logits[task] / np.float32(temperature)})
            for run, temperature in zip(runs, temperatures, strict=True)
        ]
    whole = repetitions(runs, task, names)
    rows = known(whole[0].targets[task])
    confidence = [run.probabilities(task)[rows].max(axis=1) for run in whole]
    correct = [run.predicted(task)[rows] == run.targets[task][rows] for run in whole]
    if len(whole) == 1:
        return calibration_error(confidence[0], correct[0], whole[0].groups[rows], n_resamples=n_resamples)
    errors = [expected_calibration_error(*each) for each in zip(confidence, correct, strict=True)]
    return Estimate(float(np.mean(errors)), Interval(math.nan, math.nan))
