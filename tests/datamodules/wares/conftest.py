"""What is tested here is the drawing itself."""

from __future__ import annotations

import pytest

from datamodules import wares
from datamodules.wares.render import draw_ware


@pytest.fixture(autouse=True)
def drawn_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the cache that all other tests share."""
    monkeypatch.setattr(wares, "draw_ware", draw_ware)
