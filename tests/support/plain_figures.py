"""Empty figures for runs whose figures are not tested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure


@contextmanager
def plain_figures() -> Iterator[None]:
    """Within it confusion matrices and reliability diagrams are not drawn, which takes longer than tiny trainings.

    Their own tests are ``tests/callbacks/test_confusion.py`` and ``tests/evaluation/report/test_figures.py``.
    """
    with pytest.MonkeyPatch.context() as patched:
        for place in ("callbacks.confusion.confusion_figure", "evaluation.commands.calibrate.reliability_figure"):
            patched.setattr(place, lambda *_, **__: Figure())
        yield


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """For a folder's ``conftest.py``: a fifth of what a tiny run takes would be its figures."""
    with plain_figures():
        yield
