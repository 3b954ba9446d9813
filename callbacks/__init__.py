"""What happens around training: unfreezing, confusion matrices, class reports, retrieval metrics, galleries, files.

Callbacks read a task's step outputs (``vitrail.types.Outputs``) and an ``ImageDataModule``, so they work with every
task and data set. Names are imported on demand, so that ``import callbacks`` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrail import lazy_names

if TYPE_CHECKING:
    from callbacks.averaged_weights import AveragedWeights as AveragedWeights
    from callbacks.best_checkpoint import BestCheckpoint as BestCheckpoint
    from callbacks.compile_model import CompileModel as CompileModel
    from callbacks.confusion import ClassReport as ClassReport
    from callbacks.confusion import ConfusionMatrixLogger as ConfusionMatrixLogger
    from callbacks.finetuning import BackboneUnfreezing as BackboneUnfreezing
    from callbacks.finetuning import FrozenFeatures as FrozenFeatures
    from callbacks.finetuning import StartWeights as StartWeights
    from callbacks.gallery_writer import EmbeddingExport as EmbeddingExport
    from callbacks.guards import MonitoredMetrics as MonitoredMetrics
    from callbacks.guards import NonFiniteLoss as NonFiniteLoss
    from callbacks.last_checkpoint import LastCheckpoint as LastCheckpoint
    from callbacks.outputs import PredictionWriter as PredictionWriter
    from callbacks.retrieval_metrics import RetrievalMetrics as RetrievalMetrics
    from callbacks.saliency import SaliencyOfMistakes as SaliencyOfMistakes
    from callbacks.trackers import EpochLines as EpochLines

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "callbacks.averaged_weights": "AveragedWeights",
        "callbacks.finetuning": "BackboneUnfreezing FrozenFeatures StartWeights",
        "callbacks.best_checkpoint": "BestCheckpoint",
        "callbacks.confusion": "ClassReport ConfusionMatrixLogger",
        "callbacks.compile_model": "CompileModel",
        "callbacks.gallery_writer": "EmbeddingExport",
        "callbacks.trackers": "EpochLines",
        "callbacks.last_checkpoint": "LastCheckpoint",
        "callbacks.guards": "MonitoredMetrics NonFiniteLoss",
        "callbacks.outputs": "PredictionWriter",
        "callbacks.retrieval_metrics": "RetrievalMetrics",
        "callbacks.saliency": "SaliencyOfMistakes",
    },
)
