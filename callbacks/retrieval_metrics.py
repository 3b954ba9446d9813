"""How well images find their texts and texts their image, after every validation and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.outputs import OutputCollector
from evaluation.retrieval import RankedAnswers, report_rows, report_table, write_report
from retrieval.metrics import RECALL_AT, RankedQueries, rank_queries
from vitrail.errors import UserError
from vitrail.runs import Run
from vitrail.types import Split

EMBEDDING_KEYS = ("sample_id", "image_embedding", "text_embedding", "text_image")


class _Direction(NamedTuple):
    """The ranks of one direction; ``images`` is int64 ``(Q,)``, the image of each query."""

    name: str
    ranked: RankedQueries
    images: torch.Tensor
    candidates: int


class _Share(NamedTuple):
    """Embeddings of N images and M texts; ``source`` numbers the batches of all processes."""

    image_id: torch.Tensor
    image_source: torch.Tensor
    image: torch.Tensor
    text_id: torch.Tensor
    text_source: torch.Tensor
    text: torch.Tensor


class RetrievalMetrics(OutputCollector):
    """Logs R@1, R@5, R@10, median rank and mAP (``retrieval.metrics``) in both directions, and reports them.

    It does nothing for tasks whose outputs have no ``text_embedding``, so it can always stand in an experiment.

    Logged after every validation and test, each ``sample_id`` of all processes counted once:
    ``<split>/image_to_text/<metric>``, ``<split>/text_to_image/<metric>``, and ``<split>/retrieval/mean_recall``, the
    mean of the six recalls, by which a checkpoint can be chosen. Sanity checking does not count. Recalls of shorter
    embeddings that are trained (``loss_options.matryoshka``) end in their length, ``val/text_to_image/R@1/64d``.

    An image's relevant texts are its own only, and a text's relevant image is its own only: where another image
    has the same caption word for word, that one is wrong, and being equally similar it stands before the right one. An
    image without a text is found but does not ask.

    After ``test``, and ``validate`` outside of a fit, ``reports/<split>_retrieval.csv`` is written and a table printed,
    with 95 % bootstrap intervals by image; the gallery stays as it is (``evaluation.retrieval``).
    """

    def __init__(self) -> None:
        self._batches: list[Mapping[str, torch.Tensor]] = []
        self._found: list[_Direction] = []

    def start(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Reset what was collected."""
        self._batches, self._found = [], []

    def collect(self, trainer: Trainer, pl_module: LightningModule, split: Split, outputs: object, batch: Any) -> None:
        """Keep the embeddings of a batch."""
        if not isinstance(outputs, Mapping) or "text_embedding" not in outputs:
            return
        missing = [key for key in EMBEDDING_KEYS if key not in outputs]
        if missing:
            raise UserError(
                f"RetrievalMetrics: the steps of {type(pl_module).__name__} return text_embedding without "
                f"{', '.join(missing)} (vitrail.types.Outputs); add it, or leave text_embedding out"
            )
        self._batches.append({key: outputs[key].detach() for key in EMBEDDING_KEYS})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics, before a checkpoint is chosen by them."""
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics."""
        self._log(trainer, pl_module, "test")

    def finish(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Write and print the report, unless fitting."""
        found, self._found = self._found, []
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits or not found or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        ranked = [
            RankedAnswers(
                direction.name,
                direction.ranked.first_rank.cpu().numpy(),
                direction.ranked.average_precision.cpu().numpy().astype(np.float64),
                direction.images.cpu().numpy(),
            )
            for direction in found
        ]
        rows = report_rows(ranked)
        write_report(Path(trainer.default_root_dir) / Run.REPORTS / f"{split}_retrieval.csv", rows)
        candidates = {direction.name: direction.candidates for direction in found}
        report_table(rows, f"{split}: retrieval [95 %]", candidates).show()

    def _log(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        batches, self._batches = self._batches, []
        share = _gathered(_share(batches, trainer), trainer)
        if not len(share.text):
            return
        # Every process computes the same, so that all agree on the best checkpoint.
        once = _counted_once(share)
        self._found = _both_directions(once)
        values = {
            f"{split}/{direction.name}/{metric}": value
            for direction in self._found
            for metric, value in direction.ranked.metrics().items()
        }
        recalls = [direction.ranked.recall_at(k) for direction in self._found for k in RECALL_AT]
        values[f"{split}/retrieval/mean_recall"] = torch.stack(recalls).mean()
        for length in getattr(pl_module, "shorter_lengths", []):
            shorter = once._replace(
                **{name: F.normalize(getattr(once, name)[:, :length], dim=-1) for name in ("image", "text")}
            )
            values |= {
                f"{split}/{direction.name}/R@{k}/{length}d": direction.ranked.recall_at(k)
                for direction in _both_directions(shorter)
                for k in RECALL_AT
            }
        pl_module.log_dict(values, sync_dist=True)


def _share(batches: Sequence[Mapping[str, torch.Tensor]], trainer: Trainer) -> _Share:
    """What this process has seen, empty where it has seen nothing."""
    device = trainer.strategy.root_device
    if not batches:
        no_ids = torch.empty(0, dtype=torch.int64, device=device)
        no_rows = torch.empty(0, 0, device=device)
        return _Share(no_ids, no_ids, no_rows, no_ids, no_ids, no_rows)

    def joined(key: str) -> torch.Tensor:
        return torch.cat([batch[key] for batch in batches]).to(device)

    def source(key: str) -> torch.Tensor:
        rows = torch.tensor([len(batch[key]) for batch in batches], device=device)
        numbers = torch.arange(len(batches), device=device) * trainer.world_size + trainer.global_rank
        return numbers.repeat_interleave(rows)

    return _Share(
        joined("sample_id"),
        source("sample_id"),
        joined("image_embedding").float(),
        joined("text_image"),
        source("text_image"),
        joined("text_embedding").float(),
    )


def _gathered(share: _Share, trainer: Trainer) -> _Share:
    """The shares of all processes one after the other; every process must call this, also with an empty share."""
    if trainer.world_size == 1:
        return share
    own = [len(share.image), len(share.text), max(share.image.shape[1], share.text.shape[1])]
    sizes = trainer.strategy.all_gather(torch.tensor(own, device=share.image.device)).reshape(-1, 3)
    images, texts, dims = sizes.T.tolist()
    if not sum(texts):
        return share

    def gather(rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        # Shares of one shape, because that is all that a collective can send.
        shape = (max(lengths), *([max(dims)] if rows.ndim == 2 else []))
        padded = torch.zeros(shape, dtype=rows.dtype, device=rows.device)
        if len(rows):
            padded[: len(rows)] = rows
        parts = trainer.strategy.all_gather(padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    return _Share(*(gather(rows, images) for rows in share[:3]), *(gather(rows, texts) for rows in share[3:]))


def _counted_once(share: _Share) -> _Share:
    """Each image and its texts once, in the order of ``sample_id``, from the first batch that holds the image.

    Our own DataModules mark what only fills up a process's share, and tasks leave it out; Lightning's sampler does not.

    Raises:
        UserError: if a text belongs to no image.
    """
    image_id, image_source, text_id, text_source = (
        values.cpu().numpy() for values in (share.image_id, share.image_source, share.text_id, share.text_source)
    )
    if not np.isin(text_id, image_id).all():
        raise UserError(
            "RetrievalMetrics: text_image names samples that are not in sample_id; the step must return texts together "
            "with their images"
        )
    order = np.lexsort((image_source, image_id))
    images = order[np.unique(image_id[order], return_index=True)[1]]
    # Of an image that came twice in one batch, so did the texts.
    place = np.searchsorted(image_id[images], image_id)
    copies = np.bincount(place[image_source == image_source[images][place]], minlength=len(images))
    owner = np.searchsorted(image_id[images], text_id)
    texts = np.flatnonzero(text_source == image_source[images][owner])
    texts = texts[np.argsort(owner[texts], kind="stable")]
    counts = np.bincount(owner[texts], minlength=len(images))
    ordinal = np.arange(len(texts)) - (np.cumsum(counts) - counts)[owner[texts]]
    texts = texts[ordinal < (counts // copies)[owner[texts]]]
    device = share.image.device
    image_rows, text_rows = (torch.from_numpy(rows).to(device) for rows in (images, texts))
    return _Share(*(rows[image_rows] for rows in share[:3]), *(rows[text_rows] for rows in share[3:]))


def _both_directions(share: _Share) -> list[_Direction]:
    asks = torch.isin(share.image_id, share.text_id)
    asking = share.image_id[asks]
    to_text = rank_queries(share.image[asks], share.text, asking, share.text_id)
    to_image = rank_queries(share.text, share.image, share.text_id, share.image_id)
    return [
        _Direction("image_to_text", to_text, asking, len(share.text)),
        _Direction("text_to_image", to_image, share.text_id, len(share.image)),
    ]
