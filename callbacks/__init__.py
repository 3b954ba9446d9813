"""What happens around training: unfreezing, confusion matrices, class reports, retrieval metrics, galleries, files.

Callbacks read a task's step outputs (``vitrail.types.Outputs``) and an ``ImageDataModule``, so they work with every
task and data set. Names are imported on demand, so that ``import callbacks`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from callbacks.averaged_weights import AveragedWeights
    from callbacks.best_checkpoint import BestCheckpoint
    from callbacks.compile_model import CompileModel
    from callbacks.confusion import ClassReport, ConfusionMatrixLogger
    from callbacks.finetuning import BackboneUnfreezing, StartWeights
    from callbacks.frozen_features import FrozenFeatures
    from callbacks.gallery_writer import EmbeddingExport
    from callbacks.guards import MonitoredMetrics, NonFiniteLoss
    from callbacks.last_checkpoint import LastCheckpoint
    from callbacks.prediction_writer import PredictionWriter
    from callbacks.retrieval_metrics import RetrievalMetrics
    from callbacks.saliency import SaliencyOfMistakes
    from callbacks.trackers import EpochLines

__all__ = [
    "AveragedWeights",
    "BackboneUnfreezing",
    "BestCheckpoint",
    "ClassReport",
    "CompileModel",
    "ConfusionMatrixLogger",
    "EmbeddingExport",
    "EpochLines",
    "FrozenFeatures",
    "LastCheckpoint",
    "MonitoredMetrics",
    "NonFiniteLoss",
    "PredictionWriter",
    "RetrievalMetrics",
    "SaliencyOfMistakes",
    "StartWeights",
]

_HOMES = {
    "AveragedWeights": "callbacks.averaged_weights",
    "BackboneUnfreezing": "callbacks.finetuning",
    "BestCheckpoint": "callbacks.best_checkpoint",
    "ClassReport": "callbacks.confusion",
    "CompileModel": "callbacks.compile_model",
    "ConfusionMatrixLogger": "callbacks.confusion",
    "EmbeddingExport": "callbacks.gallery_writer",
    "EpochLines": "callbacks.trackers",
    "FrozenFeatures": "callbacks.frozen_features",
    "LastCheckpoint": "callbacks.last_checkpoint",
    "MonitoredMetrics": "callbacks.guards",
    "NonFiniteLoss": "callbacks.guards",
    "PredictionWriter": "callbacks.prediction_writer",
    "RetrievalMetrics": "callbacks.retrieval_metrics",
    "SaliencyOfMistakes": "callbacks.saliency",
    "StartWeights": "callbacks.finetuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
