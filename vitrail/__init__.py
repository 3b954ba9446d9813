"""Image understanding and retrieval in experiment files: what every other package builds on, and the Python API.

Example:
    >>> from vitrail import Run
    >>> [prediction] = Run.latest("tiny", runs=runs).predict(photo)
    >>> prediction.tasks["class"].top_k(1) == [(prediction.label, prediction.confidence)]
    True
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
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


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of a package whose names are imported on first use.

    Args:
        package: its ``__name__``.
        homes: names, separated by blanks, by the module that has them.
    """
    modules = {name: module for module, names in homes.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    def names() -> list[str]:
        known = vars(sys.modules[package])
        return sorted({*known, *known["__all__"]})

    return sorted(modules), find, names


__all__, _find, __dir__ = lazy_names(
    __name__,
    {
        "retrieval.gallery": "Gallery",
        "vitrail.runs": "Run",
        "datamodules": "Fashion Flickr8k Flowers102 HubImages ImageFolder Products StreamedImages Table "
        "UnlabeledFolder Wares",
        "lightning_modules": "DualEncoder Ensemble FewShotClassifier GenerativeClassifier ImageClassifier "
        "MultiTaskClassifier",
    },
)
"""The core imports no other package of ours before one of its names is used."""

__all__ += ["__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("vitrail")
        except PackageNotFoundError:  # a source tree that is not installed
            return "0+unknown"
    return _find(name)
