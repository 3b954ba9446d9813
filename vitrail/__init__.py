"""Image understanding and retrieval in experiment files: what every other package builds on, and the Python API.

Example:
    >>> from vitrail import Run
    >>> [prediction] = Run.latest("tiny", runs=runs).predict(photo)
    >>> prediction.tasks["class"].top_k(1) == [(prediction.label, prediction.confidence)]
    True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrail.runs import Run as Run

__all__ = ["Gallery", "Run", "__version__"]

_HOMES = {"Gallery": "retrieval.gallery", "Run": "vitrail.runs"}
"""Imported when first used: ``import vitrail`` is quick, and the core imports no other package of ours."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("vitrail")
        except PackageNotFoundError:  # a source tree that is not installed
            return "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
