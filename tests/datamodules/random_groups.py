"""Random groups of samples, for the tests of splits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def random_groups(seed: int, *, mixed: bool) -> tuple[Ints, Ints]:
    """Groups of 1 to 12 samples in skewed classes; mixed groups hold several classes."""
    rng = np.random.default_rng(seed)
    n_groups, n_classes = int(rng.integers(60, 200)), int(rng.integers(3, 9))
    groups = np.repeat(np.arange(n_groups), rng.integers(1, 13, n_groups))
    weights = 1 / np.arange(1, n_classes + 1)
    labels = rng.choice(n_classes, n_groups, p=weights / weights.sum())[groups]
    if mixed:
        labels = np.where(rng.random(len(groups)) < 0.3, rng.integers(0, n_classes, len(groups)), labels)
    order = rng.permutation(len(groups))
    return groups[order], labels[order]
