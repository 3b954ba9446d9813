"""What is trained: one task a file, and what all tasks share.

Names are imported when they are first used, so that ``import lightning_modules`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrail import lazy_names

if TYPE_CHECKING:
    from lightning_modules.base import VisionTask as VisionTask
    from lightning_modules.checkpoint import load_task as load_task
    from lightning_modules.classification import FewShotClassifier as FewShotClassifier
    from lightning_modules.classification import ImageClassifier as ImageClassifier
    from lightning_modules.classification import MultiTaskClassifier as MultiTaskClassifier
    from lightning_modules.distributed import FullySharded as FullySharded
    from lightning_modules.dual_encoder import DualEncoder as DualEncoder
    from lightning_modules.ensemble import Ensemble as Ensemble
    from lightning_modules.generative import GenerativeClassifier as GenerativeClassifier

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "lightning_modules.dual_encoder": "DualEncoder",
        "lightning_modules.ensemble": "Ensemble",
        "lightning_modules.classification": "FewShotClassifier ImageClassifier MultiTaskClassifier",
        "lightning_modules.distributed": "FullySharded",
        "lightning_modules.generative": "GenerativeClassifier",
        "lightning_modules.base": "VisionTask",
        "lightning_modules.checkpoint": "load_task",
    },
)
