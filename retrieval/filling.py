"""Filling a gallery: what is new or has changed is encoded and committed chunk by chunk, what is unchanged is skipped.

``fill`` runs a model over a data set; ``fill_from`` takes what has been encoded elsewhere, such as the shards of
several processes. Whole chunks are committed, so a kill leaves a gallery that opens, and the same command finishes the
job: the batches that are left are those of an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from retrieval.encoding import CHUNK, Chunk, Encoded
from retrieval.fill_plan import plan
from retrieval.image_files import note_folders
from retrieval.schema import CONFIDENCE, LABEL, PREDICTED, ModelIdentity, caption_schema, picture_schema
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, DescribesPictures

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from retrieval.gallery import Gallery
    from retrieval.gallery_writer import GalleryWriter

Thumbnails = Literal["auto", "always", "never"]
"""Whether a gallery keeps small pictures: ``auto`` where pictures are not files of their own."""

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Hands batches on and shows how far it is; gets their number as well."""


class GivesRows(DescribesPictures, Protocol):
    """A DataModule that ``fill`` can go through."""

    loader_options: Any

    def rows_of(self, splits: Sequence[str]) -> NDArray[np.int64]:
        """Ids of the samples of several splits, ascending."""

    def rows_dataloader(self, rows: NDArray[np.int64]) -> Iterable[Any]:
        """Batches of some samples, each once and in this order."""


@dataclass(frozen=True)
class FillReport:
    """What became of the pictures.

    Attributes:
        added: were not there.
        replaced: were there with another content.
        renewed: were there with other labels, captions, place or split.
        unchanged: were there as they are.
        left_out: names of pictures that could not be read.
    """

    added: int = 0
    replaced: int = 0
    renewed: int = 0
    unchanged: int = 0
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.added} added, {self.replaced} replaced, {self.renewed} renewed (labels or captions only), "
            f"{self.unchanged} unchanged"
        )


def fill(
    task: Any,
    datamodule: GivesRows,
    gallery: Gallery,
    *,
    splits: Sequence[str] = ("train", "val", "test"),
    run: str = "",
    chunk: int = CHUNK,
    thumbnails: Thumbnails = "auto",
    progress: Progress | None = None,
) -> FillReport:
    """Encodes pictures and stores them, in the order of the data set.

    Args:
        task: on its device, with its weights; those that ``gallery.identity`` names.
        datamodule: set up, with pictures of the size that the task expects.
        gallery: to fill.
        splits: that are filled in.
        run: where the weights come from; the gallery's own by default.
        chunk: pictures that are committed at a time, rounded down to whole batches.
        thumbnails: whether to store small pictures.
        progress: shows how far it is.

    Raises:
        UserError: if another process writes, there are no pictures, or something of them or the model is wrong.
    """
    rows = datamodule.rows_of(splits)
    if not len(rows):
        raise UserError(f"--splits: the data have no picture in {', '.join(splits)}; name another split")
    wants = thumbnails == "always" or (thumbnails == "auto" and not datamodule.picture_files)

    def encode(due: NDArray[np.int64]) -> Iterator[Chunk]:
        return _chunks(task, datamodule, due, gallery.identity, chunk, wants, progress or _silently)

    return fill_from(gallery, datamodule, rows, encode, run=run, chunk=chunk)


class ToBeEncoded(Protocol):
    """A chunk whose columns are made when they are asked for, in another thread."""

    def encoded(self) -> Encoded:
        """The columns."""


def fill_from(
    gallery: Gallery,
    samples: DescribesPictures,
    sample_ids: NDArray[np.int64],
    encode: Callable[[NDArray[np.int64]], Iterator[ToBeEncoded]],
    *,
    run: str = "",
    chunk: int = CHUNK,
) -> FillReport:
    """Stores what is new or has changed.

    Args:
        gallery: to fill.
        samples: describes them.
        sample_ids: int64 ``(n,)``, ascending, the pictures that are to be in the gallery.
        encode: gives what the model says of some of them, chunk by chunk, in their order.
        run: where the weights come from; the gallery's own by default.
        chunk: rows that are committed at a time where nothing is encoded.

    Raises:
        UserError: if another process writes, or something is wrong with the pictures or the model.
    """
    with gallery.writing() as writer:
        filler = _Filler(gallery, writer, samples, sample_ids, run)
        note_folders(gallery.uri, filler.paths())
        # One chunk is written while the next one is computed.
        with ThreadPoolExecutor(1, thread_name_prefix="gallery") as pool:
            writing: Future[None] | None = None
            for made in encode(sample_ids[filler.plan.encode]):
                if writing is not None:
                    writing.result()
                writing = pool.submit(filler.commit, made)
            if writing is not None:
                writing.result()
        for start in range(0, len(filler.plan.renew), chunk):
            filler.renew(filler.plan.renew[start : start + chunk])
    return filler.report()


class _Filler:
    """Makes rows of a gallery out of facts and encodings, and commits them."""

    def __init__(
        self,
        gallery: Gallery,
        writer: GalleryWriter,
        samples: DescribesPictures,
        sample_ids: NDArray[np.int64],
        run: str,
    ) -> None:
        self._gallery, self._writer, self._sample_ids = gallery, writer, sample_ids
        self._identity: ModelIdentity = gallery.identity
        self._run = run or self._identity.run
        self._facts = _with_labels(samples.picture_facts(sample_ids), self._identity)
        captions = writer.known_captions() if self._identity.encodes_text and samples.own_captions else None
        self.plan = plan(self._facts, writer.known(), captions, self._identity)
        self._stored = np.zeros(len(sample_ids), dtype=bool)

    def commit(self, made: ToBeEncoded) -> None:
        """Stores a chunk."""
        pictures, captions = made.encoded()
        places = np.searchsorted(self._sample_ids, pictures.column("sample_id").to_numpy())
        facts = self._facts.take(places)
        rows = self._rows(facts, {name: pictures.column(name) for name in pictures.column_names})
        self._writer.add(rows, None if captions is None else self._caption_rows(captions))
        self._stored[places] = True

    def renew(self, places: NDArray[np.int64]) -> None:
        """Describes pictures anew that need not be encoded again."""
        facts = self._facts.take(places)
        ids = facts.column("id").to_pylist()
        kept = [name for name in picture_schema(self._identity).names if name.startswith((PREDICTED, CONFIDENCE))]
        stored = self._gallery.rows(ids, [*kept, "thumbnail", "vector"])
        self._writer.add(self._rows(facts, {name: stored.column(name) for name in stored.column_names}))

    def paths(self) -> list[str]:
        """Files of the images, empty for those that are none of their own."""
        found: list[str] = self._facts.column("path").to_pylist()
        return found

    def report(self) -> FillReport:
        """What became of the pictures."""
        plan, asked = self.plan, self.plan.encode
        missing = asked[~self._stored[asked]]
        again = self._stored & ~plan.added & ~plan.replaced
        return FillReport(
            added=int((plan.added & self._stored).sum()),
            replaced=int((plan.replaced & self._stored).sum()),
            renewed=len(plan.renew) + int(again.sum()),
            unchanged=len(self._sample_ids) - len(asked) - len(plan.renew),
            left_out=self._facts.column("id").take(missing).to_pylist(),
        )

    def _rows(self, facts: pa.Table, columns: dict[str, Any]) -> pa.Table:
        import pyarrow as pa

        schema = picture_schema(self._identity)
        given = {name: facts.column(name) for name in facts.column_names} | columns
        given["text"] = _texts(columns, self._identity.predicts, len(facts))
        given["run"] = pa.array([self._run] * len(facts), pa.string())
        given["weights"] = pa.array([self._identity.weights] * len(facts), pa.string())
        return pa.table([given[name] for name in schema.names], schema=schema)

    def _caption_rows(self, captions: pa.Table) -> pa.Table:
        import pyarrow as pa

        places = np.searchsorted(self._sample_ids, captions.column("sample_id").to_numpy())
        pictures = self._facts.column("id").take(places).to_pylist()
        numbers = captions.column("number").to_pylist()
        given = {
            "id": pa.array([f"{name}#{number}" for name, number in zip(pictures, numbers, strict=True)], pa.string()),
            "picture": pa.array(pictures, pa.string()),
            "caption": captions.column("caption"),
            "vector": captions.column("vector"),
        }
        schema = caption_schema(self._identity)
        return pa.table([given[name] for name in schema.names], schema=schema)


def _with_labels(facts: pa.Table, identity: ModelIdentity) -> pa.Table:
    """Columns for the labels that the gallery has and the data lack, with unknown ones."""
    import pyarrow as pa

    for task in identity.labels:
        if f"{LABEL}{task}" not in facts.column_names:
            facts = facts.append_column(f"{LABEL}{task}", pa.nulls(len(facts), pa.string()))
    return facts


def _texts(columns: dict[str, Any], predicts: dict[str, list[str]], count: int) -> pa.Array:
    """Predicted words of each picture, the class first."""
    import pyarrow as pa

    tasks = sorted(predicts, key=lambda task: task != LABEL_TASK)
    words = [columns[f"{PREDICTED}{task}"].to_pylist() for task in tasks]
    texts = [" ".join(row) for row in zip(*words, strict=True)] if words else [""] * count
    return pa.array(texts, pa.string())


@torch.inference_mode()
def _chunks(
    task: Any,
    datamodule: GivesRows,
    due: NDArray[np.int64],
    identity: ModelIdentity,
    chunk: int,
    thumbnails: bool,
    progress: Progress,
) -> Iterator[Chunk]:
    """Outputs of the model, chunk by chunk."""
    from lightning.fabric.utilities import move_data_to_device

    if not len(due):
        return
    device = next(task.parameters()).device
    task.eval()
    task.on_predict_epoch_start()
    batch_size = int(datamodule.loader_options["batch_size"])
    at_once = max(1, chunk // batch_size)
    collected = Chunk(identity.predicts, thumbnails=thumbnails)
    batches = progress(datamodule.rows_dataloader(due), -(-len(due) // batch_size))
    for number, batch in enumerate(batches):
        collected.add(task.predict_step(move_data_to_device(batch, device), number), batch, identity.task)
        if collected.batches == at_once:
            yield collected
            collected = Chunk(identity.predicts, thumbnails=thumbnails)
    if collected.batches:
        yield collected


def _silently(items: Iterable[Any], total: int) -> Iterable[Any]:
    return items
