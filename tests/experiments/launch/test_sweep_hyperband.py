"""Early stopping, against a count by hand and against W&B's own rule where that package is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.launch.sweep_file import Hyperband, parse_hyperband
from vitrail.errors import UserError


def hyperband(**section: Any) -> Hyperband:
    parsed = parse_hyperband({"type": "hyperband", **section})
    assert parsed is not None
    return parsed


def test_bands_begin_at_min_iter_or_end_before_max_iter() -> None:
    assert hyperband(min_iter=3).bands[:4] == (3, 9, 27, 81)
    assert hyperband(min_iter=2, eta=1.5).bands[:5] == (2, 3, 4, 6, 10)
    assert hyperband(max_iter=27, s=2).bands == (3, 9)
    assert hyperband(max_iter=10, s=5).bands == (1, 3)
    assert parse_hyperband(None) is None


def test_one_in_eta_goes_on() -> None:
    rule = hyperband(min_iter=2, eta=3)
    histories = [[9.0, value] for value in (0.6, 0.1, 0.5, 0.4, 0.3, 0.2)]
    # Two of six, and whoever equals the limit.
    assert [rule.stops(history, histories) for history in histories] == [True, False, True, True, False, False]
    # Before the first band nobody is judged, nor is the only one.
    assert not rule.stops([99.0], [*histories, [99.0]])
    assert not rule.stops([99.0, 99.0], [[99.0, 99.0]])


def test_strict_judges_the_value_at_the_band() -> None:
    history, others = [0.1, 0.9], [[0.5, 0.5], [0.1, 0.9]]
    assert hyperband(min_iter=2).stops(history, others)
    assert not hyperband(min_iter=2, strict=False).stops(history, others)


def test_a_diverged_training_is_stopped() -> None:
    assert hyperband(min_iter=1).stops([float("nan")], [[float("nan")], [1.0]])


@pytest.mark.parametrize(
    "section", [{"min_iter": 2, "eta": 2}, {"max_iter": 12, "s": 2}, {"min_iter": 1, "strict": False}]
)
def test_the_rule_is_that_of_the_server(section: dict[str, Any]) -> None:
    sweeps = pytest.importorskip("sweeps", reason="W&B's own package, which needs numpy 1")
    generator = np.random.default_rng(5)
    config = {
        "method": "random",
        "metric": {"name": "loss", "goal": "minimize"},
        "early_terminate": {"type": "hyperband", **section},
        "parameters": {"a": {"values": [1, 2]}},
    }
    rule = hyperband(**section)
    stopped = 0
    for _ in range(30):
        histories = [generator.normal(size=generator.integers(1, 14)).tolist() for _ in range(8)]
        runs = [
            sweeps.SweepRun(name=str(i), state=sweeps.RunState.running, history=[{"loss": v} for v in history])
            for i, history in enumerate(histories)
        ]
        expected = {run.name for run in sweeps.stop_runs(config, runs)}
        found = {str(i) for i, history in enumerate(histories) if rule.stops(history, histories)}
        assert found == expected
        stopped += len(found)
    assert stopped > 30


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"type": "median"}, r"early_terminate\.type: must be hyperband"),
        ({"type": "hyperband", "patience": 2}, r"early_terminate\.patience: is not known"),
        ({"type": "hyperband"}, "needs min_iter, or max_iter and s"),
        ({"type": "hyperband", "max_iter": 27}, "needs min_iter, or max_iter and s"),
        ({"type": "hyperband", "min_iter": 0}, r"min_iter: must be an integer from 1, got 0"),
        ({"type": "hyperband", "min_iter": 2, "eta": 1}, "eta: must be a number above 1"),
        ({"type": "hyperband", "max_iter": 2, "s": 2}, "no epoch is left"),
        ({"type": "hyperband", "min_iter": 2, "strict": 1}, "strict: must be true or false"),
    ],
)
def test_mistakes_name_the_key(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_hyperband(section)
