"""Features of all samples of a split, computed once and looked up by sample and view."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from lightning.pytorch import Trainer

from vitrail.types import Batch

LARGEST_SHARE = 0.5
"""Of the machine's memory that features may fill on each process."""


class TooManyFeaturesError(Exception):
    """The features of a split do not fit into memory; the message says so and names the way out."""


class View(Protocol):
    """A loader that knows how many batches it has."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class FeatureTable:
    """Features of a split.

    Args:
        sample_id: int64 ``(n,)``, ascending.
        features: float ``(V, n, D)``, of each view of each sample.
    """

    def __init__(self, sample_id: torch.Tensor, features: torch.Tensor) -> None:
        self._sample_id = sample_id
        self._features = features

    def __call__(self, sample_id: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        """See ``vitrail.types.FeatureLookup``; after the last view the first comes again."""
        return self._features[view % len(self._features), torch.searchsorted(self._sample_id, sample_id)]


def compute_features(
    trainer: Trainer,
    encode: Callable[[torch.Tensor], torch.Tensor],
    views: Sequence[View],
    name: str,
) -> FeatureTable:
    """Encode every view of every sample; with several processes each encodes its share, and all get everything.

    Args:
        trainer: gives device, precision and processes.
        encode: from uint8 ``(B, 3, H, W)`` to float ``(B, D)``.
        views: for each view batches that cover the split, the same samples in the same order.
        name: of the split, for the progress bar.

    Raises:
        TooManyFeaturesError: if they do not fit into memory.
    """
    sample_id = torch.empty(0, dtype=torch.int64)
    tables: list[torch.Tensor] = []
    total = sum(len(view) for view in views)
    with _progress(trainer, f"features of the {name} split, once", total) as advance, torch.no_grad():
        for view in views:
            features, ids = [], []
            for batch in view:
                with trainer.precision_plugin.forward_context():
                    features.append(encode(trainer.strategy.batch_to_device(batch["image"])))
                ids.append(batch["sample_id"])
                if len(ids) == 1 and not tables:
                    _refuse_too_many(features[0], total * trainer.world_size, name)
                advance()
            own = torch.cat(features)
            sample_id, places = _first_places(_of_all_processes(trainer, torch.cat(ids).to(own.device)).cpu())
            tables.append(_of_all_processes(trainer, own).cpu()[places])
    return FeatureTable(sample_id, torch.stack(tables))


def _refuse_too_many(batch: torch.Tensor, batches: int, name: str) -> None:
    needed = batch.numel() * batch.element_size() * batches
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    if memory is not None and needed > memory * LARGEST_SHARE:
        raise TooManyFeaturesError(
            f"the features of the {name} split need {needed / 1e9:.1f} GB of the machine's {memory / 1e9:.1f} GB; "
            "lower features.n_views"
        )


def _of_all_processes(trainer: Trainer, own: torch.Tensor) -> torch.Tensor:
    """The processes' rows one after the other; all have the same number."""
    return own if trainer.world_size == 1 else trainer.strategy.all_gather(own).flatten(0, 1)


def _first_places(sample_id: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ids in ascending order, and where each stands first: what fills up a process's share comes twice."""
    ordered, order = torch.sort(sample_id, stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_first], order[is_first]


@contextmanager
def _progress(trainer: Trainer, description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on the first process's terminal; gives a function that moves it on by one."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    shown = trainer.is_global_zero and console.is_terminal
    with Progress(console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
