"""A gallery that ``test`` and ``predict`` fill with vectors and predictions, on any number of processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from callbacks.best_checkpoint import keep_weights
from callbacks.outputs import OutputCollector
from callbacks.trackers import MOST_ROWS, log_embeddings
from retrieval.fill import Chunk, Shards, write_shard
from retrieval.schema import CHUNK, value_text
from vitrail.errors import UserError
from vitrail.runs import Run
from vitrail.types import DescribesImages, Split

if TYPE_CHECKING:
    from retrieval.gallery import Gallery
    from retrieval.schema import ModelIdentity

ExportedStage = Literal["test", "predict"]
SHARDS = "embeddings"
"""In the run directory: the processes' shards until they are joined."""


class EmbeddingExport(OutputCollector):
    """Fills a gallery (``retrieval.gallery``) after ``test`` and ``predict``, each sample once.

    Every process writes what it has encoded as whole shards as it goes, so that memory stays bounded; the first one
    joins them in the order of ``sample_id`` and stores what is new or has changed, as ``python -m retrieval index``
    does. Vectors come from ``image_embedding``; predicted classes and their confidences, and vectors of captions, are
    stored where the task yields them. ``data.init_args.loader.predict: [train, val, test]`` lets ``predict`` see
    everything. The run directory must be one that all processes see.

    Args:
        gallery: folder or URI; ``gallery`` in the run directory by default.
        splits: which of ``test`` and ``predict`` fill it; both by default.
        chunk: images of a shard, and of a commit.
    """

    def __init__(self, gallery: str = "", splits: list[ExportedStage] | None = None, chunk: int = CHUNK) -> None:
        self.gallery = gallery
        self.splits: list[ExportedStage] = ["test", "predict"] if splits is None else splits
        self._check_splits(get_args(ExportedStage))
        if chunk < 1:
            raise UserError(f"EmbeddingExport.chunk: must be at least 1, got {chunk}")
        self.chunk = chunk
        self._identity: ModelIdentity | None = None
        self._collected: Chunk | None = None
        self._written = 0

    def start(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Make room, and refuse a gallery of another model before anything is computed; the weights are there now."""
        self._identity = None
        if getattr(trainer, "fast_dev_run", False):
            return
        from retrieval.gallery import Gallery
        from retrieval.schema import identity_of

        samples = _describes_images(trainer)
        run = str(_run_of_weights(trainer).resolve())
        options = getattr(samples, "image_options", getattr(pl_module, "input_options", {}))
        # All processes, because weights may be shared out among them.
        identity = identity_of(
            pl_module, run, options, getattr(samples, "tasks", {}), getattr(samples, "task_kinds", {})
        )
        refusal = ""
        if trainer.is_global_zero:
            shutil.rmtree(_shards(trainer, split), ignore_errors=True)  # what a killed run has left
            try:
                Gallery.open_or_create(self._uri(trainer), identity)
            except UserError as error:
                refusal = str(error)
        # Also keeps the others from writing before the folder is empty.
        if refusal := trainer.strategy.broadcast(refusal):
            raise UserError(refusal)
        self._identity, self._written = identity, 0
        self._collected = self._new_chunk(trainer)

    def collect(self, trainer: Trainer, pl_module: LightningModule, split: Split, outputs: object, batch: Any) -> None:
        """Keep a batch, and write a shard once there are enough."""
        if self._identity is not None and self._collected is not None:
            self._collected.add(outputs, batch, self._identity.task)
            if self._collected.rows >= self.chunk:
                self._write(trainer, split)

    def finish(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Fill the gallery."""
        if self._identity is None:
            return
        self._write(trainer, split)
        identity, self._identity, self._collected = self._identity, None, None
        keep_weights(trainer)
        trainer.strategy.barrier("every process has written its embeddings")
        if not trainer.is_global_zero:
            return
        from retrieval.fill import fill_from
        from retrieval.gallery import Gallery

        folder = _shards(trainer, split)
        shards = Shards(folder)
        if not len(shards.sample_ids):
            return
        gallery = Gallery.open_or_create(self._uri(trainer), identity)
        report = fill_from(
            gallery,
            _describes_images(trainer),
            shards.sample_ids,
            lambda due: shards.chunks(due, self.chunk),
            run=identity.run,
            chunk=self.chunk,
        )
        shutil.rmtree(folder)
        rank_zero_info(f"Gallery {gallery.uri}: {report}")
        _log_embeddings(trainer, split, gallery)

    def _write(self, trainer: Trainer, split: Split) -> None:
        assert self._collected is not None
        if self._collected.rows:
            write_shard(_shards(trainer, split), trainer.global_rank, self._written, self._collected.encoded())
            self._written += 1
        self._collected = self._new_chunk(trainer)

    def _new_chunk(self, trainer: Trainer) -> Chunk:
        assert self._identity is not None
        return Chunk(self._identity, thumbnails=not _describes_images(trainer).image_files)

    def _uri(self, trainer: Trainer) -> str:
        return self.gallery or str(Path(trainer.default_root_dir) / Run.GALLERY)


def _log_embeddings(trainer: Trainer, split: Split, gallery: Gallery) -> None:
    """Log the embeddings with what describes them, which W&B and TensorBoard project to a plane."""
    if not any(isinstance(logger, WandbLogger | TensorBoardLogger | MLFlowLogger) for logger in trainer.loggers):
        return
    texts = gallery.table(
        [name for name in gallery.columns() if name == "id" or name.startswith(("label", "predicted"))]
    )
    texts = texts.slice(0, MOST_ROWS)
    described = {name: [*map(value_text, values)] for name, values in texts.to_pydict().items()}
    log_embeddings(trainer, f"embeddings/{split}", described, gallery.vectors(texts["id"].to_pylist()))


def _shards(trainer: Trainer, split: Split) -> Path:
    return Path(trainer.default_root_dir) / SHARDS / f".{split}"


def _run_of_weights(trainer: Trainer) -> Path:
    """Directory of the run that a checkpoint is of; of this run, where the weights are of no checkpoint."""
    checkpoint = Path(str(trainer.ckpt_path)) if trainer.ckpt_path else None
    if checkpoint is not None and checkpoint.parent.name == Run.CHECKPOINTS:
        return checkpoint.parent.parent
    return Path(trainer.default_root_dir)


def _describes_images(trainer: Trainer) -> DescribesImages:
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, DescribesImages):
        raise UserError(
            "EmbeddingExport: needs a DataModule that describes its images (vitrail.types.DescribesImages); "
            "pass the trainer a `datamodule`"
        )
    return datamodule
