"""What training again would change in a difference: the interval over the seeds of two experiments.

A test set says how sure a difference between these very models is, not what other seeds would have given, and that is
often the larger part (Bouthillier et al., Accounting for Variance in Machine Learning Benchmarks, MLSys 2021).

* Several seeds on both sides: Welch, Biometrika 34 (1947), which lets the spreads differ.
* A single run against several seeds: its spread is not known, so it is taken for that of the others (Student).
* Single runs alone: nothing is known of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evaluation.statistics import Interval


def seed_interval(
    first: Sequence[float], second: Sequence[float], level: float = 0.95, *, same_answers: bool = True
) -> Interval:
    """Interval of the difference of two means over seeds.

    Args:
        first: scores of the runs of one experiment, at least one.
        second: those of the other, at least one; they are subtracted.
        level: of the interval.
        same_answers: whether the runs of either side answer every sample alike. Scores that are equal by coincidence
            say nothing of what seeds change.

    Returns:
        From low to high; NaN where each side is a single run, and where scores are equal but answers are not.
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
