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
    from datamodules import Fashion as Fashion
    from datamodules import Flickr8k as Flickr8k
    from datamodules import Flowers102 as Flowers102
    from datamodules import HubImages as HubImages
    from datamodules import ImageFolder as ImageFolder
    from datamodules import Products as Products
    from datamodules import StreamedImages as StreamedImages
    from datamodules import Table as Table
    from datamodules import UnlabeledFolder as UnlabeledFolder
    from datamodules import Wares as Wares
    from lightning_modules import DualEncoder as DualEncoder
    from lightning_modules import Ensemble as Ensemble
    from lightning_modules import FewShotClassifier as FewShotClassifier
    from lightning_modules import GenerativeClassifier as GenerativeClassifier
    from lightning_modules import ImageClassifier as ImageClassifier
    from lightning_modules import MultiTaskClassifier as MultiTaskClassifier
    from retrieval.gallery import Gallery as Gallery
    from vitrail.runs import Run as Run

__all__ = [
    "DualEncoder",
    "Ensemble",
    "Fashion",
    "FewShotClassifier",
    "Flickr8k",
    "Flowers102",
    "Gallery",
    "GenerativeClassifier",
    "HubImages",
    "ImageClassifier",
    "ImageFolder",
    "MultiTaskClassifier",
    "Products",
    "Run",
    "StreamedImages",
    "Table",
    "UnlabeledFolder",
    "Wares",
    "__version__",
]

_HOMES = {
    "Gallery": "retrieval.gallery",
    "Run": "vitrail.runs",
    **dict.fromkeys(
        (
            "Fashion",
            "Flickr8k",
            "Flowers102",
            "HubImages",
            "ImageFolder",
            "Products",
            "StreamedImages",
            "Table",
            "UnlabeledFolder",
            "Wares",
        ),
        "datamodules",
    ),
    **dict.fromkeys(
        (
            "DualEncoder",
            "Ensemble",
            "FewShotClassifier",
            "GenerativeClassifier",
            "ImageClassifier",
            "MultiTaskClassifier",
        ),
        "lightning_modules",
    ),
}
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
