"""Filling a gallery: what is new or has changed is encoded and committed chunk by chunk, what is unchanged is skipped.

``fill`` runs a model over a data set; ``fill_from`` takes what has been encoded elsewhere, such as the shards of
several processes. Whole chunks are committed, so a kill leaves a gallery that opens, and the same command finishes the
job: the batches that are left are those of an undisturbed run.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.image_files import note_folders
from retrieval.schema import (
    CHUNK,
    CONFIDENCE,
    DEVIATION,
    LABEL,
    PREDICTED,
    ModelIdentity,
    caption_schema,
    image_schema,
    not_unit,
    shortened,
    value_type,
)
from vitrail.errors import UserError
from vitrail.files import local_folder, read_parquet, write_atomically, write_parquet, write_text_atomically
from vitrail.predictions import Predictions, predicted_classes, task_predictions
from vitrail.types import CLASS_KINDS, LABEL_TASK, UNKNOWN, DescribesImages

if TYPE_CHECKING:
    import pyarrow as pa

    from retrieval.gallery import Gallery, GalleryWriter

# A loader's worker processes are forked while nothing of LanceDB is under way, and do not use it.
warnings.filterwarnings("ignore", message="lancedb fork support is experimental")

THUMBNAIL = 128
"""Longest side of a thumbnail in pixels."""

Thumbnails = Literal["auto", "always", "never"]
"""Whether a gallery keeps small images: ``auto`` where images are not files of their own."""


MARK = "indexed.json"
"""File in a gallery's folder that is written once all images of its run are indexed."""


class Encoded(NamedTuple):
    """A model's outputs for some images.

    Attributes:
        images: ``sample_id``, ``vector``, ``predicted_<task>`` and ``confidence_<task>`` (of numbers
            ``deviation_<task>``) of each task, ``thumbnail`` (null where none is wanted); ascending by ``sample_id``.
        captions: ``sample_id`` of the image, ``number`` of the caption within it, ``caption``, ``vector``; None where
            captions are not embedded.
    """

    images: pa.Table
    captions: pa.Table | None


@dataclass(frozen=True)
class FillReport:
    """Counts of images.

    Attributes:
        added: that are new.
        replaced: whose content has changed.
        renewed: whose labels, captions, path or split have changed.
        unchanged: that are as they were.
        left_out: names of those that could not be read.
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
    datamodule: Any,
    gallery: Gallery,
    *,
    splits: Sequence[str] = ("train", "val", "test"),
    run: str = "",
    chunk: int = CHUNK,
    thumbnails: Thumbnails = "auto",
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda batches, total: batches,
) -> FillReport:
    """Encode images and store them, in the order of the data set.

    Args:
        task: a ``lightning_modules.VisionTask`` on its device, with the weights that ``gallery.identity`` names.
        datamodule: a ``datamodules.ImageDataModule`` after ``setup``, with images of the size that the task expects.
        gallery: to fill.
        splits: that are stored.
        run: where the weights come from; the gallery's own by default.
        chunk: images that are committed at a time, rounded down to whole batches.
        thumbnails: whether to store small images.
        progress: passes on the batches, of which there are ``total``, and shows progress.

    Raises:
        UserError: if another process writes, there are no images, or something is wrong with them or the model.
    """
    rows = datamodule.rows_of(splits)
    if not len(rows):
        raise UserError(f"--splits: the data have no image in {', '.join(splits)}; name another split")
    wants = thumbnails == "always" or (thumbnails == "auto" and not datamodule.image_files)

    def encode(due: NDArray[np.int64]) -> Iterator[Callable[[], Encoded]]:
        return _encoded_chunks(task, datamodule, due, Chunk(gallery.identity, thumbnails=wants), chunk, progress)

    return fill_from(gallery, datamodule, rows, encode, run=run, chunk=chunk)


def fill_from(
    gallery: Gallery,
    samples: DescribesImages,
    sample_ids: NDArray[np.int64],
    encode: Callable[[NDArray[np.int64]], Iterable[Callable[[], Encoded]]],
    *,
    run: str = "",
    chunk: int = CHUNK,
) -> FillReport:
    """Store what is new or has changed.

    Args:
        gallery: to fill.
        samples: describes them.
        sample_ids: int64 ``(n,)``, ascending, the images that are to be in the gallery.
        encode: yields the model's outputs for some of them, in chunks and in their order; each is a function that
            returns them, called in another thread.
        run: where the weights come from; the gallery's own by default.
        chunk: rows that are committed at a time where nothing is encoded.

    Raises:
        UserError: if another process writes, or something is wrong with the images or the model.
    """
    with gallery.writing() as writer:
        filler = _Filler(gallery, writer, samples, sample_ids, run)
        note_folders(gallery.uri, filler.facts.column("path").to_pylist())
        # One chunk is written while the next one is computed.
        with ThreadPoolExecutor(1, thread_name_prefix="gallery") as pool:
            writing: Future[None] | None = None
            for encoded in encode(sample_ids[filler.plan.encode]):
                if writing is not None:
                    writing.result()
                writing = pool.submit(filler.commit, encoded)
            if writing is not None:
                writing.result()
        for start in range(0, len(filler.plan.renew), chunk):
            filler.renew(filler.plan.renew[start : start + chunk])
    return filler.report()


@torch.inference_mode()
def _encoded_chunks(
    task: Any,
    datamodule: Any,
    due: NDArray[np.int64],
    empty: Chunk,
    chunk: int,
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
) -> Iterator[Callable[[], Encoded]]:
    from lightning.fabric.utilities import move_data_to_device

    if not len(due):
        return
    device = next(task.parameters()).device
    task.eval()
    task.on_predict_epoch_start()
    batch_size = int(datamodule.loader_options.batch_size)
    batches_of_chunk = max(1, chunk // batch_size)
    collected = empty
    batches = progress(datamodule.rows_dataloader(due), -(-len(due) // batch_size))
    for number, batch in enumerate(batches):
        collected.add(task.predict_step(move_data_to_device(batch, device), number), batch, type(task).__name__)
        if collected.batches == batches_of_chunk:
            yield collected.encoded
            collected = collected.next()
    if collected.batches:
        yield collected.encoded


class _Plan(NamedTuple):
    """What is to be done with the images of a list.

    Attributes:
        encode: int64, places in the list of images that the model has to encode.
        renew: int64, places of those that only have other labels, captions, paths or splits.
        added: bool, for all of the list, whether an image is new.
        replaced: bool, for all of the list, whether another image has its name.
    """

    encode: NDArray[np.int64]
    renew: NDArray[np.int64]
    added: NDArray[np.bool_]
    replaced: NDArray[np.bool_]


def _plan(facts: pa.Table, known: pa.Table, captions: pa.Table | None, identity: ModelIdentity) -> _Plan:
    """Compare the data with what the gallery holds.

    Args:
        facts: of ``DescribesImages.image_facts``, with the gallery's labels.
        known: rows of the gallery, without vectors.
        captions: ``image`` and ``caption`` of the captions that it has vectors of; None where there are to be none.
        identity: of the gallery.
    """
    import pyarrow.compute as pc

    place = pc.index_in(facts.column("id"), value_set=known.column("id").combine_chunks())
    there = known.take(place)  # null where an image is not there
    is_new = place.is_null().to_numpy()
    unknown_content = pc.equal(facts.column("content"), "").to_numpy()
    other_content = _differs(facts.column("content"), there.column("content")) | unknown_content
    described = ["path", "caption", "group", "split", *(f"{LABEL}{task}" for task in identity.labels)]
    other = np.zeros(len(facts), dtype=bool)
    for name in described:
        other |= _differs(pc.cast(facts.column(name), there.column(name).type), there.column(name))
    replaced = ~is_new & other_content
    encode = is_new | replaced
    if captions is not None:  # vectors of other captions have to be made
        present: dict[str, list[str]] = {}
        for image, caption in zip(*captions.select(["image", "caption"]).to_pydict().values(), strict=True):
            present.setdefault(image, []).append(caption)
        pairs = zip(facts.column("id").to_pylist(), facts.column("captions").to_pylist(), strict=True)
        encode |= np.array([texts != present.get(name, []) for name, texts in pairs], dtype=bool)
    return _Plan(np.flatnonzero(encode), np.flatnonzero(other & ~encode), is_new, replaced)


def _differs(first: Any, second: Any) -> NDArray[np.bool_]:
    """Where two columns differ; null is like null only. bool ``(N,)``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(first.type):  # lists cannot be compared; no label has this separator
        first, second = (pc.binary_join(values, "\x1f") for values in (first, second))
    same = pc.fill_null(pc.equal(first, second), False)
    both_null = pc.and_(pc.is_null(first), pc.is_null(second))
    differs: NDArray[np.bool_] = pc.invert(pc.or_(same, both_null)).to_numpy()
    return differs


class _Filler:
    """Makes rows of a gallery from facts and outputs, and commits them."""

    def __init__(
        self,
        gallery: Gallery,
        writer: GalleryWriter,
        samples: DescribesImages,
        sample_ids: NDArray[np.int64],
        run: str,
    ) -> None:
        self._gallery, self._writer, self._sample_ids = gallery, writer, sample_ids
        self._identity: ModelIdentity = gallery.identity
        self._run = run or self._identity.run
        self.facts = _with_labels(samples.image_facts(sample_ids), self._identity)
        captions = writer.known_captions() if self._identity.encodes_text and samples.own_captions else None
        self.plan = _plan(self.facts, writer.known(), captions, self._identity)
        self._stored = np.zeros(len(sample_ids), dtype=bool)

    def commit(self, encoded: Callable[[], Encoded]) -> None:
        images, captions = encoded()
        places = np.searchsorted(self._sample_ids, images.column("sample_id").to_numpy())
        facts = self.facts.take(places)
        rows = self._rows(facts, {name: images.column(name) for name in images.column_names})
        self._writer.add(rows, None if captions is None else self._caption_rows(captions))
        self._stored[places] = True

    def renew(self, places: NDArray[np.int64]) -> None:
        """Update what is known of images that need not be encoded again."""
        facts = self.facts.take(places)
        ids = facts.column("id").to_pylist()
        prefixes = (PREDICTED, CONFIDENCE, DEVIATION)
        kept = [name for name in image_schema(self._identity).names if name.startswith(prefixes)]
        stored = self._gallery.rows(ids, [*kept, "thumbnail", "vector"])
        self._writer.add(self._rows(facts, {name: stored.column(name) for name in stored.column_names}))

    def report(self) -> FillReport:
        plan = self.plan
        missing = plan.encode[~self._stored[plan.encode]]
        again = self._stored & ~plan.added & ~plan.replaced
        return FillReport(
            added=int((plan.added & self._stored).sum()),
            replaced=int((plan.replaced & self._stored).sum()),
            renewed=len(plan.renew) + int(again.sum()),
            unchanged=len(self._sample_ids) - len(plan.encode) - len(plan.renew),
            left_out=self.facts.column("id").take(missing).to_pylist(),
        )

    def _rows(self, facts: pa.Table, columns: dict[str, Any]) -> pa.Table:
        import pyarrow as pa

        schema = image_schema(self._identity)
        given = {name: facts.column(name) for name in facts.column_names} | columns
        given["text"] = _texts(columns, self._identity.worded(self._identity.predicts), len(facts))
        given["run"] = pa.array([self._run] * len(facts), pa.string())
        given["weights"] = pa.array([self._identity.weights] * len(facts), pa.string())
        return pa.table([given[name] for name in schema.names], schema=schema)

    def _caption_rows(self, captions: pa.Table) -> pa.Table:
        import pyarrow as pa

        places = np.searchsorted(self._sample_ids, captions.column("sample_id").to_numpy())
        images = self.facts.column("id").take(places).to_pylist()
        numbers = captions.column("number").to_pylist()
        given = {
            "id": pa.array([f"{name}#{number}" for name, number in zip(images, numbers, strict=True)], pa.string()),
            "image": pa.array(images, pa.string()),
            "caption": captions.column("caption"),
            "vector": captions.column("vector"),
        }
        schema = caption_schema(self._identity)
        return pa.table([given[name] for name in schema.names], schema=schema)


def _with_labels(facts: pa.Table, identity: ModelIdentity) -> pa.Table:
    """Add columns of unknown labels for those that the gallery has and the data lack."""
    import pyarrow as pa

    for task in identity.labels:
        if f"{LABEL}{task}" not in facts.column_names:
            facts = facts.append_column(f"{LABEL}{task}", pa.nulls(len(facts), value_type(identity.kind(task))))
    return facts


def _texts(columns: dict[str, Any], tasks: Sequence[str], count: int) -> pa.Array:
    """Predicted labels of each image, the class first."""
    import pyarrow as pa

    tasks = sorted(tasks, key=lambda task: task != LABEL_TASK)
    labels = [[_words(value) for value in columns[f"{PREDICTED}{task}"].to_pylist()] for task in tasks]
    texts = [" ".join(filter(None, row)) for row in zip(*labels, strict=True)] if labels else [""] * count
    return pa.array(texts, pa.string())


def _words(value: str | list[str] | None) -> str:
    """Return a label, several or none as text."""
    return " ".join(value) if isinstance(value, list) else value or ""


class Chunk:
    """Collects the outputs of several batches; they stay on the model's device, so that it need not wait for them.

    Args:
        identity: which tasks are predicted.
        thumbnails: whether to make small images of the batches' own.
    """

    def __init__(self, identity: ModelIdentity, *, thumbnails: bool) -> None:
        self._identity = identity
        self._thumbnails = thumbnails
        self._outputs: list[Mapping[str, Any]] = []
        self._images: list[torch.Tensor | None] = []
        self._texts: list[str] = []

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self._outputs)

    @property
    def rows(self) -> int:
        """Number of images."""
        return sum(len(outputs["sample_id"]) for outputs in self._outputs)

    def next(self) -> Chunk:
        """Return an empty chunk with the same options."""
        return Chunk(self._identity, thumbnails=self._thumbnails)

    def add(self, outputs: object, batch: Mapping[str, Any], origin: str) -> None:
        """Keep what a step returned.

        Args:
            outputs: of the step, padding left out.
            batch: its input.
            origin: name of the model in messages.

        Raises:
            UserError: if they have no embeddings.
        """
        if not isinstance(outputs, Mapping) or not {"sample_id", "image_embedding"} <= outputs.keys():
            raise UserError(
                f"{origin}: its steps return no image_embedding (vitrail.types.Outputs); use a task that yields "
                "embeddings of images"
            )
        count = len(outputs["sample_id"])
        real = ~batch["is_padding"].cpu() if "is_padding" in batch else torch.ones(count, dtype=torch.bool)
        self._outputs.append(outputs)
        self._images.append(batch["image"][real] if self._thumbnails and "image" in batch else None)
        if "text_embedding" in outputs and "captions" in batch:
            captions = zip(batch["captions"], real.tolist(), strict=True)
            self._texts += [text for texts, is_real in captions if is_real for text in texts]

    @torch.no_grad()
    def encoded(self) -> Encoded:
        """Return the collected outputs as columns; may be called in another thread.

        Raises:
            UserError: if an embedding or a prediction is not finite.
        """
        import pyarrow as pa

        sample_id = self._joined("sample_id")
        order = np.argsort(sample_id, kind="stable")
        vectors = shortened(self._joined("image_embedding")[order], self._identity.dim)
        _check_unit(vectors, sample_id[order])
        columns: dict[str, Any] = {"sample_id": pa.array(sample_id[order]), "vector": vector_column(vectors)}
        for task in self._identity.predicts:
            logits = torch.cat([outputs["logits"][task] for outputs in self._outputs]).float()
            columns |= self._predicted(task, logits, order)
        small: list[bytes | None] = []
        for outputs, images in zip(self._outputs, self._images, strict=True):
            if images is None:
                small += [None] * len(outputs["sample_id"])
            else:
                small += [thumbnail(pixels) for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]
        columns["thumbnail"] = pa.array([small[place] for place in order.tolist()], pa.binary())
        return Encoded(pa.table(columns), self._captions() if self._texts else None)

    def _predicted(self, task: str, logits: torch.Tensor, order: NDArray[np.int64]) -> dict[str, pa.Array]:
        """Columns of a task's predictions."""
        import pyarrow as pa

        identity = self._identity
        names, kind = identity.predicts[task], identity.kind(task)
        if kind in CLASS_KINDS:
            confidence = logits.softmax(dim=1).amax(dim=1).cpu().numpy()[order]
            indices = predicted_classes(logits.cpu().numpy()[order])
            # Null where the model predicts none of the classes.
            places = pa.array(indices, pa.int64(), mask=indices == UNKNOWN)
            labels = pa.array(names, pa.string()).take(places)
            return {f"{PREDICTED}{task}": labels, f"{CONFIDENCE}{task}": pa.array(confidence, pa.float32())}
        values = logits.cpu().numpy()[order]
        if not np.isfinite(values).all():
            raise UserError(f"predictions of {task!r} are not finite; has the model diverged? train again")
        numbers, empty = np.arange(len(values)), np.full(len(values), "", object)
        kinds, thresholds = {task: kind}, {name: own for name, own in identity.thresholds.items() if name == task}
        one = Predictions(numbers, empty, empty, {task: names}, {}, {task: values}, kinds, thresholds)
        if kind == "regression":
            spreads = one.deviations(task)
            missing = pa.nulls(len(values), pa.float32())
            return {
                f"{PREDICTED}{task}": pa.array(one.values(task), pa.float32()),
                f"{DEVIATION}{task}": missing if spreads is None else pa.array(spreads, pa.float32()),
            }
        found = [prediction.labels for prediction in task_predictions(one, task)]
        return {
            f"{PREDICTED}{task}": pa.array([[name for name, _ in row] for row in found], value_type(kind)),
            f"{CONFIDENCE}{task}": pa.array([[share for _, share in row] for row in found], pa.list_(pa.float32())),
        }

    def _captions(self) -> pa.Table:
        import pyarrow as pa

        owner = self._joined("text_image")
        vectors = shortened(self._joined("text_embedding"), self._identity.dim)
        # An image's captions are consecutive; an empty text means none.
        starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
        number = np.arange(len(owner)) - np.repeat(starts, np.diff(np.r_[starts, len(owner)]))
        given = np.flatnonzero([bool(text) for text in self._texts])
        rows = given[np.argsort(owner[given], kind="stable")]
        _check_unit(vectors[rows], owner[rows])
        return pa.table(
            {
                "sample_id": pa.array(owner[rows]),
                "number": pa.array(number[rows]),
                "caption": pa.array([self._texts[row] for row in rows.tolist()], pa.string()),
                "vector": vector_column(vectors[rows]),
            }
        )

    def _joined(self, name: str) -> NDArray[Any]:
        parts = [outputs[name].detach() for outputs in self._outputs if name in outputs]
        joined: NDArray[Any] = torch.cat(parts).cpu().numpy()
        return joined


def thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """Return a small JPEG of an image, uint8 ``(H, W, 3)``."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def vector_column(vectors: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """Return vectors float32 ``(N, D)`` as a column of lists of one length."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _check_unit(vectors: NDArray[np.float32], sample_id: NDArray[np.int64]) -> None:
    if len(bad := not_unit(vectors)):
        raise UserError(
            f"{len(bad)} of {len(vectors)} embeddings are zero or not finite, first of sample {sample_id[bad[0]]}; "
            "has the model diverged? train again with a lower learning rate"
        )


_CAPTIONS = ".captions.parquet"


def write_shard(folder: Path, rank: int, number: int, encoded: Encoded) -> None:
    """Write shard ``number`` of the process ``rank`` to a folder that all processes share."""
    # Captions first: a shard counts once its images exist.
    if encoded.captions is not None:
        with write_atomically(folder / f"rank{rank}-{number}{_CAPTIONS}") as partial:
            write_parquet(encoded.captions, partial)
    with write_atomically(folder / f"rank{rank}-{number}.parquet") as partial:
        write_parquet(encoded.images, partial)


class Shards:
    """All shards in a folder as one list of samples.

    Attributes:
        sample_ids: int64 ``(n,)``, ascending, each once; of one that several shards have, the first shard's counts.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted(path for path in folder.glob("rank*.parquet") if not path.name.endswith(_CAPTIONS))
        ids = [read_parquet(path, ["sample_id"]).column(0).to_numpy() for path in self._files]
        self.sample_ids, first = np.unique(np.concatenate([*ids, np.zeros(0, np.int64)]), return_index=True)
        lengths = np.array([len(part) for part in ids], dtype=np.int64)
        self._file = np.repeat(np.arange(len(ids)), lengths)[first]
        self._row = first - (np.cumsum(lengths) - lengths)[self._file]

    def chunks(self, sample_ids: NDArray[np.int64], chunk: int) -> Iterator[Callable[[], Encoded]]:
        """Yield functions that read ``chunk`` of some samples (int64, ascending) each."""
        for start in range(0, len(sample_ids), chunk):
            yield partial(self.read, sample_ids[start : start + chunk])

    def read(self, sample_ids: NDArray[np.int64]) -> Encoded:
        """Read what the processes have encoded of some samples, int64, ascending."""
        import pyarrow as pa

        places = np.searchsorted(self.sample_ids, sample_ids)
        files, rows = self._file[places], self._row[places]
        images, captions = [], []
        for number in np.unique(files).tolist():
            mine = files == number
            images.append(read_parquet(self._files[number]).take(rows[mine]))
            captions_file = self._files[number].with_suffix("").with_suffix(_CAPTIONS)
            if captions_file.exists():
                captions.append(_captions_of(read_parquet(captions_file), sample_ids[mine]))
        joined = pa.concat_tables(images).sort_by("sample_id")
        if not captions:
            return Encoded(joined, None)
        order = [("sample_id", "ascending"), ("number", "ascending")]
        return Encoded(joined, pa.concat_tables(captions).sort_by(order))


def _captions_of(captions: pa.Table, sample_ids: NDArray[np.int64]) -> pa.Table:
    """The captions of some samples; of a sample that a process was given twice, once."""
    ids, numbers = captions.column("sample_id").to_numpy(), captions.column("number").to_numpy()
    pairs = np.stack([ids, numbers], axis=1)
    first = np.zeros(len(pairs), dtype=bool)
    first[np.unique(pairs, axis=0, return_index=True)[1]] = True
    return captions.filter(first & np.isin(ids, sample_ids))


def mark_complete(uri: str) -> None:
    """Record in a gallery's folder that it has all images of its run; a gallery in an object store gets no mark."""
    from retrieval.gallery import Gallery

    folder, gallery = local_folder(uri), Gallery.open(uri)
    if folder is not None:
        mark = {"weights": gallery.identity.weights, "images": len(gallery)}
        write_text_atomically(folder / MARK, json.dumps(mark))


def is_complete(folder: Path, weights: str) -> bool:
    """Return whether a gallery has all images of the run with these weights."""
    from retrieval.gallery import Gallery

    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        gallery = Gallery.open(str(folder))
        return bool(mark["weights"] == gallery.identity.weights == weights and mark["images"] <= len(gallery))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        # Whatever is wrong, indexing again repairs it or reports it.
        return False
