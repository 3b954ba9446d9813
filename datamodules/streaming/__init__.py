"""StreamedImages: data sets larger than a disk, read from Parquet or WebDataset shards during training.

WebDataset: tar files whose members ``key.jpg``, ``key.cls``, ``key.txt``, ``key.json`` belong together
(github.com/webdataset/webdataset). ``python -m datamodules pack`` writes either format.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.base import ImageDataModule
from datamodules.files.label_csv import count_files_left_out
from datamodules.loading.dataset import CountedLoader, make_loader
from datamodules.options import SplitName
from datamodules.streaming.dataset import OnBad, StreamedDataset, StreamOrder, StreamSampler
from datamodules.streaming.index import StreamColumns, read_streams, stamp_of
from datamodules.streaming.shards import INDEX_FILE, ShardFormat, Shards, find_shards, format_of, local_path
from datamodules.table import Missing, SampleTable, composed
from vitrail.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

JOURNAL = "skipped_images.jsonl"
"""In the run directory: the images that could not be read, one JSON object a line."""


class StreamedImages(ImageDataModule):
    """Images in shards, on disk or behind any URL that fsspec knows (``https://``, ``s3://``, ``hf://`` …).

    Labels, captions and keys are read before training; images only when they are due, by each process and each worker
    from its own shards, so the set need not fit on disk or in memory. Order and augmentation are functions of (seed,
    epoch, number of processes); the number of workers changes nothing, and a run resumes in the middle of an epoch.

    Args:
        shards: a folder, a glob, a URL, a numbered range (``train-{00000..00011}.tar``), a list of those, for all
            splits or for train, val and test each; or the name of a data set on the hub that is stored so. Where splits
            are not given, file names decide.
        format: parquet, webdataset, or auto by the files' endings.
        columns: which columns, or members of a WebDataset sample, are what.
        vocabulary: for ``class`` and each attribute the class names in order; for whole numbers what 0, 1 … stand for.
            By default as the shards record it, otherwise the values of train in alphabetical order.
        shuffle_buffer: encoded images that a process reads ahead to sample from, beyond the order of shards.
        streams: parts of a process's share that are read concurrently, each by one worker; a multiple of
            ``loader.num_workers``. Batches are made of one stream each.
        interleave: shards that each stream reads in turn in training, so that shards sorted by class mix; as many files
            are open for each stream.
        shared: options of every data set, see ``ImageDataModule``. Unreadable images are found only when they are due:
            with ``checks.on_bad_image: error`` training stops there; ``skip`` replaces it by another image of the
            batch, in evaluation leaves it out, and adds a line to ``skipped_images.jsonl`` in the run directory. Only
            leaks of groups are looked for. ``caption: all`` and orders other than ``shuffle`` are refused.
    """

    def __init__(
        self,
        shards: str | list[str] | dict[str, str | list[str]],
        format: ShardFormat = "auto",  # noqa: A002 -- the word for it in YAML
        columns: StreamColumns | None = None,
        vocabulary: dict[str, list[str]] | None = None,
        shuffle_buffer: int = 4096,
        streams: int = 8,
        interleave: int = 4,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if strange := sorted(set(columns or {}) - set(StreamColumns.__annotations__)):
            known = ", ".join(StreamColumns.__annotations__)
            raise UserError(f"data columns: unknown key {strange[0]!r}; known keys are {known}")
        self.shards = shards
        self.format: ShardFormat = format
        self.columns: StreamColumns = columns or {}
        self.vocabulary = {
            composed(task): [composed(name) for name in names] for task, names in (vocabulary or {}).items()
        }
        self.shuffle_buffer = shuffle_buffer
        self.streams = streams
        self.interleave = interleave
        self._shards: Shards | None = None
        self._refuse_options()

    def _refuse_options(self) -> None:
        loader, workers = self.loader_options, self.loader_options.num_workers
        workers = 0 if workers == "auto" else workers
        if self.shuffle_buffer < 1:
            raise UserError(f"data shuffle_buffer: is {self.shuffle_buffer}, must be at least 1")
        if self.interleave < 1:
            raise UserError(f"data interleave: is {self.interleave}, must be at least 1")
        if self.streams < 1 or (workers and self.streams % workers):
            raise UserError(
                f"data streams: {self.streams} cannot be dealt to loader.num_workers: {workers}; make it a multiple of "
                "that, so that each stream is read by one worker"
            )
        if loader.sampling != "shuffle":
            raise UserError(
                f"data loader.sampling: {loader.sampling} needs images in any order, which shards do not give; "
                "use shuffle"
            )
        if loader.cache == "always":
            raise UserError("data loader.cache: streamed images are not kept decoded; use auto or never")
        if self.shots:
            raise UserError("data shots: few images of each class would be all over the shards; pack them alone")
        if self.caption_mode == "all":
            raise UserError("data caption: all would read each image several times; use first or random for streams")

    def load_table(self) -> SampleTable:
        """Read everything but the images."""
        urls = find_shards(self.shards)
        kind = format_of([url for part in urls.values() for url in part], self.format)
        origin = self.shards if isinstance(self.shards, str) else "data shards"
        missing = Missing(self.check_options.missing or ())
        table, self._shards = read_streams(urls, kind, self.columns, self.vocabulary, origin, missing)
        if self._shards.value_range is not None:
            self.decide_range(self._shards.value_range)
        return table

    def read_image(self, index: int) -> torch.Tensor:
        """See ``ImageDataModule``; opens the shard, so only for single samples."""
        return self._opened().image(index, self.value_range, self.max_pixels)

    def encoded_image(self, index: int) -> bytes:
        """Return the image's file as it is in the shard."""
        return self._opened().encoded(index)

    def images_state(self) -> str:
        """Return where the shards are and what changes with their content."""
        return json.dumps([[url, stamp_of(url)] for url in self._opened().urls])

    @property
    def image_files(self) -> bool:
        """False: images are in shards."""
        return False

    def image_facts(self, sample_ids: NDArray[np.int64]) -> pa.Table:
        """See ``vitrail.types.DescribesImages``; images are not read for it (``Shards.place_hashes``)."""
        hashes = self._opened().place_hashes(sample_ids, stamp_of)
        return self.table.facts(sample_ids, hashes, image_files=False)

    def rows_dataloader(self, rows: NDArray[np.int64]) -> CountedLoader:
        """See ``ImageDataModule``; one stream and so at most one worker on each process, which keeps to the order."""
        on_bad: OnBad = "leave_out" if self._skips else "error"
        dataset = self.streamed(rows, training=False, augmented=False, on_bad=on_bad, streams=1)
        return self._in_order(dataset)

    def streamed(
        self, rows: NDArray[np.int64], *, training: bool, augmented: bool, on_bad: OnBad, streams: int = 0
    ) -> StreamedDataset:
        """Return some rows of the table, int64 ``(n,)``, ascending, in the order of this process.

        Args:
            rows: such as those of a split.
            training: whether the order is shuffled; otherwise that of the shards.
            augmented: whether images get the training augmentation; otherwise the evaluation transform.
            on_bad: what becomes of an unreadable image.
            streams: number of streams; 0 for the user's.
        """
        return StreamedDataset(
            rows,
            self._opened(),
            self.order(rows, training=training, streams=streams),
            self.transform(augmented=augmented),
            self.image_size,
            self.seed,
            self.texts.pairs(rows)[1] if training else None,
            on_bad,
            self._journal(),
            self.value_range,
            self.max_pixels,
        )

    def order(self, rows: NDArray[np.int64], *, training: bool, streams: int = 0) -> StreamOrder:
        """Return the order of some rows on this process."""
        rank, world_size = self._place()
        which = self._opened().shard_of(rows)
        sizes = np.bincount(which, minlength=1)
        sizes = sizes[sizes > 0]
        if training and len(sizes) < world_size:
            rank_zero_warn(
                f"{self.table.origin}: {len(sizes)} shards of train for {world_size} processes, so that several read "
                "parts of the same one; more, smaller shards (`python -m datamodules pack --shard-size`) are faster"
            )
        options = self.loader_options
        return StreamOrder(
            shard_sizes=sizes.astype(np.int64),
            batch_size=options.training_batch_size if training else options.batch_size,
            streams=streams or self.streams,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer if training else 0,
            interleave=self.interleave if training else 1,
        )

    def train_dataloader(self) -> CountedLoader:
        """Return augmented training batches in the order of the epoch."""
        if not len(self.split_indices("train")):
            raise UserError(f"{self.table.origin}: the train split is empty; name shards that hold samples")
        if self._augment.repeats > 1:
            raise UserError("data augment.repeats: a stream delivers each image once an epoch; set 1")
        on_bad: OnBad = "replace" if self._skips else "error"
        dataset = self.streamed(self.split_indices("train"), training=True, augmented=True, on_bad=on_bad)
        sampler = StreamSampler(dataset.order)
        workers = self._workers(dataset)
        return make_loader(dataset, sampler, self.collate(training=True), self.loader_options, workers, training=True)

    def eval_dataloader(self, split: str) -> CountedLoader:
        """Return batches of any split with the evaluation transform, each sample once over all processes."""
        if not len(self.split_indices(split)):
            raise UserError(f"{self.table.origin}: the {split} split is empty; name its shards with shards.{split}")
        return self._once(split, None, "leave_out" if self._skips else "error")

    def view_dataloader(self, split: str, view: int | None) -> CountedLoader:
        """See ``ImageDataModule``; in the order of the shards.

        An unreadable image is always an error here: what is computed for each image must not lack any.
        """
        return self._once(split, view, "error")

    def count_left_out(self) -> dict[str, int]:
        """Count files next to local shards that are not shards, and unused members of tar files."""
        urls = [url.removeprefix("file://") for url in self._opened().urls]
        local = [url for url in urls if "://" not in url]
        indices = {str(Path(url).parent / INDEX_FILE) for url in local}
        top = local_path(self.shards) if isinstance(self.shards, str) and local else ""
        files = count_files_left_out([*local, *indices], "", top if os.path.isdir(top) else "")  # noqa: PTH112
        left = Counter(files) + Counter(self._opened().members_left_out)
        return dict(sorted(left.items(), key=lambda one: (-one[1], one[0])))

    def data_record(self) -> dict[str, Any]:
        """Return the record of the data; skipped images are those that earlier stages have read."""
        record = super().data_record()
        return {**record, "shards": len(self._opened().urls), "skipped": self._skipped(), "verify": "never"}

    def teardown(self, stage: str) -> None:
        """Warn of images that could not be read."""
        if skipped := self._skipped():
            rank_zero_warn(f"{self.table.origin}: {len(skipped)} images could not be read; see {self._journal()}")

    @property
    def _skips(self) -> bool:
        return self.check_options.on_bad_image == "skip"

    def _once(self, split: str, view: int | None, on_bad: OnBad) -> CountedLoader:
        rows = self.split_indices(split)
        return self._in_order(self.streamed(rows, training=False, augmented=view is not None, on_bad=on_bad), view or 0)

    def _in_order(self, dataset: StreamedDataset, view: int = 0) -> CountedLoader:
        sampler, workers = StreamSampler(dataset.order, view), self._workers(dataset)
        return make_loader(dataset, sampler, self.collate(training=False), self.loader_options, workers, training=False)

    def _workers(self, dataset: StreamedDataset) -> int:
        """As many as there may be, so that each stream is read by one."""
        streams, most = dataset.order.streams, self.worker_processes()
        return max((number for number in range(1, most + 1) if streams % number == 0), default=0)

    def verify(self, cached_splits: Sequence[SplitName] = ()) -> None:
        """Images are not read before they are due."""
        self._bad = {}

    def _opened(self) -> Shards:
        _ = self.table
        assert self._shards is not None, "the table finds the shards"
        return self._shards

    def _journal(self) -> Path | None:
        return None if self.trainer is None else Path(self.trainer.default_root_dir) / JOURNAL

    def _skipped(self) -> list[dict[str, Any]]:
        """The images in the journal, each once."""
        path = self._journal()
        if path is None or not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for _, line in sorted({line["row"]: line for line in lines}.items())]
