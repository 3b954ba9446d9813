"""Commands' tests train tiny runs."""

from __future__ import annotations

from tests.support.plain_figures import undrawn

__all__ = ["undrawn"]
