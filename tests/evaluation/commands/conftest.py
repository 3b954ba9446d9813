"""Commands' tests train tiny runs."""

from __future__ import annotations

from tests.support.plain_figures import drawn, undrawn

__all__ = ["drawn", "undrawn"]
