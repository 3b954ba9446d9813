"""What is trained: one task a file, and what all tasks share.

Names are imported when they are first used, so that ``import lightning_modules`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.base import VisionTask
    from lightning_modules.checkpoint import load_task
    from lightning_modules.classification import FewShotClassifier, ImageClassifier, MultiTaskClassifier
    from lightning_modules.distributed import FullySharded
    from lightning_modules.dual_encoder import DualEncoder
    from lightning_modules.ensemble import Ensemble
    from lightning_modules.generative import GenerativeClassifier

__all__ = [
    "DualEncoder",
    "Ensemble",
    "FewShotClassifier",
    "FullySharded",
    "GenerativeClassifier",
    "ImageClassifier",
    "MultiTaskClassifier",
    "VisionTask",
    "load_task",
]

_HOMES = {
    "DualEncoder": "lightning_modules.dual_encoder",
    "Ensemble": "lightning_modules.ensemble",
    "FewShotClassifier": "lightning_modules.classification",
    "FullySharded": "lightning_modules.distributed",
    "GenerativeClassifier": "lightning_modules.generative",
    "ImageClassifier": "lightning_modules.classification",
    "MultiTaskClassifier": "lightning_modules.classification",
    "VisionTask": "lightning_modules.base",
    "load_task": "lightning_modules.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
