"""Empty figures for runs and pages whose figures are not tested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure
from PIL import Image

from evaluation.report import page

_drawn_png = page._png


@contextmanager
def plain_figures() -> Iterator[None]:
    """Within it confusion matrices, reliability diagrams and figures of pages are not drawn.

    That takes longer than tiny trainings.

    Their own tests are ``tests/callbacks/test_confusion.py`` and ``tests/evaluation/report/test_figures.py``.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("callbacks.confusion.confusion_image", lambda *_, **__: Image.new("RGB", (1, 1)))
        patched.setattr("evaluation.commands.calibrate.reliability_figure", lambda *_, **__: Figure())
        patched.setattr(page, "_png", lambda figure: _drawn_png(Figure((0.01, 0.01))))
        yield


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """For a folder's ``conftest.py``: a fifth of what a tiny run takes would be its figures."""
    with plain_figures():
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of pages are drawn for a test after all."""
    monkeypatch.setattr(page, "_png", _drawn_png)
