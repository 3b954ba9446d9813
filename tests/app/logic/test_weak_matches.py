from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.logic.search import ALPHA, FEWEST, WeakMatches
from tests.app.meaning_run import MeaningRun, served_small


@pytest.mark.parametrize("count", [FEWEST, 50, 128])
def test_as_many_captions_are_called_weak_as_promised(count: int) -> None:
    # Captions and queries of one distribution: the share of weak ones is at most ALPHA, and not far below it.
    rng = np.random.default_rng(count)
    weak = [
        bool(WeakMatches(rng.normal(size=count).astype(np.float32)).weakness(float(rng.normal()))) for _ in range(4000)
    ]
    largest = np.floor(ALPHA * (count + 1)) / (count + 1)
    assert np.mean(weak) == pytest.approx(largest, abs=4 * np.sqrt(ALPHA / 4000))


def test_the_p_value_is_said() -> None:
    matches = WeakMatches(np.linspace(0.5, 0.9, 39).astype(np.float32))
    assert "p = 0.025 beside 39" in matches.weakness(0.4)
    assert "p = 0.050 beside 39" in matches.weakness(0.505)
    assert matches.weakness(0.52) == ""


def test_too_few_captions_say_nothing(tmp_path: Path) -> None:
    # Twelve captions, and a gallery whose model is not served.
    for name, run in (("few", MeaningRun()), ("alone", None)):
        assert WeakMatches.of(served_small(tmp_path / name, run=run)).weakness(-1.0) == ""
