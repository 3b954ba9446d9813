"""Filling a gallery: what is new or has changed is encoded and committed chunk by chunk, what is unchanged is skipped.

``fill`` runs a model over a data set; ``fill_from`` takes what has been encoded elsewhere, such as the shards of
several processes. Whole chunks are committed, so a kill leaves a gallery that opens, and the same command finishes the
job: the batches that are left are those of an undisturbed run.

What filling a gallery has to do: which images are to be encoded, and which only to be described anew.

From what a model's steps return to columns: vectors, predictions, thumbnails and captions.

A chunk is what is committed, or written as a shard, at a time. Outputs stay on the model's device until it is whole, so
that the model need not wait for them.

Encodings of several processes on their way into one gallery: each process writes whole shards, one joins them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.image_files import note_folders
from retrieval.schema import CONFIDENCE, LABEL, PREDICTED, ModelIdentity, caption_schema, image_schema
from vitrail.errors import UserError
from vitrail.files import read_parquet, write_atomically, write_parquet
from vitrail.predictions import predicted_classes
from vitrail.types import LABEL_TASK, UNKNOWN, DescribesImages

if TYPE_CHECKING:
    import pyarrow as pa

    from retrieval.gallery import Gallery, GalleryWriter


class Plan(NamedTuple):
    """What becomes of the images of a list.

    Attributes:
        encode: int64, places in the list that the model has to see.
        renew: int64, places that only have other labels, captions, paths or splits.
        added: bool, for all of the list, whether an image is new.
        replaced: bool, for all of the list, whether another image has its name.
    """

    encode: NDArray[np.int64]
    renew: NDArray[np.int64]
    added: NDArray[np.bool_]
    replaced: NDArray[np.bool_]


def plan(facts: pa.Table, known: pa.Table, captions: pa.Table | None, identity: ModelIdentity) -> Plan:
    """Compares what the data say with what the gallery holds.

    Args:
        facts: of ``DescribesImages.image_facts``, with the gallery's labels.
        known: rows of the gallery, without vectors.
        captions: ``image`` and ``caption`` of the captions that it has vectors of; None where there are to be none.
        identity: of the gallery.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    place = pc.index_in(facts.column("id"), value_set=known.column("id").combine_chunks())
    there = known.take(place)  # null where an image is not there
    is_new = place.is_null().to_numpy()
    unknown_content = pc.equal(facts.column("content"), "").to_numpy()
    other_content = _differs(facts.column("content"), there.column("content")) | unknown_content
    described = ["path", "caption", "group", "split", *(f"{LABEL}{task}" for task in identity.labels)]
    other = np.zeros(len(facts), dtype=bool)
    for name in described:
        other |= _differs(pc.cast(facts.column(name), pa.string()), there.column(name))
    replaced = ~is_new & other_content
    encode = is_new | replaced
    if captions is not None:
        encode |= _other_captions(facts, captions)  # their vectors have to be made anew
    return Plan(np.flatnonzero(encode), np.flatnonzero(other & ~encode), is_new, replaced)


def _differs(first: Any, second: Any) -> NDArray[np.bool_]:
    """Where two columns differ; null is like null only. bool ``(N,)``."""
    import pyarrow.compute as pc

    same = pc.fill_null(pc.equal(first, second), False)
    both_null = pc.and_(pc.is_null(first), pc.is_null(second))
    differs: NDArray[np.bool_] = pc.invert(pc.or_(same, both_null)).to_numpy()
    return differs


def _other_captions(facts: pa.Table, captions: pa.Table) -> NDArray[np.bool_]:
    """Which images have other captions than those that are known, bool ``(N,)``."""
    there: dict[str, list[str]] = {}
    for image, caption in zip(*(captions.column(name).to_pylist() for name in ("image", "caption")), strict=True):
        there.setdefault(image, []).append(caption)
    pairs = zip(facts.column("id").to_pylist(), facts.column("captions").to_pylist(), strict=True)
    return np.array([texts != there.get(name, []) for name, texts in pairs], dtype=bool)


# A loader's worker processes are forked while nothing of LanceDB is under way, and do not use it.
warnings.filterwarnings("ignore", message="lancedb fork support is experimental")

CHUNK = 1024
"""Images that are committed at a time, by default."""

THUMBNAIL = 128
"""Longest side of a thumbnail in pixels."""

_QUALITY = 85


class Encoded(NamedTuple):
    """What a model says of some images.

    Attributes:
        images: ``sample_id``, ``vector``, ``predicted_<task>`` and ``confidence_<task>`` of each task, ``thumbnail``
            (null where none is wanted); ascending by ``sample_id``.
        captions: ``sample_id`` of the image, ``number`` of the caption within it, ``caption``, ``vector``; None where
            captions are not embedded.
    """

    images: pa.Table
    captions: pa.Table | None


class _Step(NamedTuple):
    outputs: Mapping[str, Any]
    images: torch.Tensor | None
    captions: list[str] | None


class Chunk:
    """Collects the outputs of several batches.

    Args:
        predicts: class names of each task that is predicted.
        thumbnails: whether to make small images of the batches' own.
    """

    def __init__(self, predicts: Mapping[str, list[str]], *, thumbnails: bool) -> None:
        self._predicts = predicts
        self._thumbnails = thumbnails
        self._steps: list[_Step] = []
        self.batches = 0
        self.rows = 0

    def add(self, outputs: object, batch: Mapping[str, Any], origin: str) -> None:
        """Keeps what a step returned.

        Args:
            outputs: of the step, padding left out.
            batch: that it was given.
            origin: what messages call the model.

        Raises:
            UserError: if there are no embeddings among them.
        """
        if not isinstance(outputs, Mapping) or not {"sample_id", "image_embedding"} <= outputs.keys():
            raise UserError(
                f"{origin}: its steps return no image_embedding (vitrail.types.Outputs); use a task that yields "
                "embeddings of images"
            )
        self.batches += 1
        self.rows += len(outputs["sample_id"])
        real = _real_rows(batch, len(outputs["sample_id"]))
        images = batch["image"][real] if self._thumbnails and "image" in batch else None
        captions = None
        if "text_embedding" in outputs and "captions" in batch:
            texts = [texts for texts, is_real in zip(batch["captions"], real.tolist(), strict=True) if is_real]
            captions = [text for several in texts for text in several]
        self._steps.append(_Step(outputs, images, captions))

    @torch.no_grad()
    def encoded(self) -> Encoded:
        """The collected outputs as columns; may be called in another thread.

        Raises:
            UserError: if an embedding or a prediction is not finite.
        """
        import pyarrow as pa

        sample_id = _joined([step.outputs["sample_id"] for step in self._steps])
        order = np.argsort(sample_id, kind="stable")
        vectors = _joined([step.outputs["image_embedding"] for step in self._steps])[order]
        _check_unit(vectors, sample_id[order])
        columns: dict[str, Any] = {"sample_id": pa.array(sample_id[order]), "vector": vector_column(vectors)}
        for task, names in self._predicts.items():
            logits = torch.cat([step.outputs["logits"][task] for step in self._steps]).float()
            confidence = logits.softmax(dim=1).amax(dim=1).cpu().numpy()[order]
            indices = predicted_classes(logits.cpu().numpy()[order])
            # Null where the model predicts none of the classes.
            places = pa.array(indices, pa.int64(), mask=indices == UNKNOWN)
            columns[f"{PREDICTED}{task}"] = pa.array(names, pa.string()).take(places)
            columns[f"{CONFIDENCE}{task}"] = pa.array(confidence, pa.float32())
        columns["thumbnail"] = pa.array(self._small_images(order), pa.binary())
        return Encoded(pa.table(columns), self._captions())

    def _small_images(self, order: NDArray[np.int64]) -> list[bytes | None]:
        images: list[bytes | None] = []
        for step in self._steps:
            if step.images is None:
                images += [None] * len(step.outputs["sample_id"])
            else:
                images += [thumbnail(pixels) for pixels in step.images.permute(0, 2, 3, 1).cpu().numpy()]
        return [images[place] for place in order.tolist()]

    def _captions(self) -> pa.Table | None:
        import pyarrow as pa

        steps = [step for step in self._steps if step.captions is not None]
        if not steps:
            return None
        texts = [text for step in steps for text in step.captions or ()]
        owner = _joined([step.outputs["text_image"] for step in steps])
        vectors = _joined([step.outputs["text_embedding"] for step in steps])
        # An image's captions stand together; the empty text stands for none.
        first = np.r_[True, owner[1:] != owner[:-1]] if len(owner) else np.zeros(0, dtype=bool)
        starts = np.flatnonzero(first)
        number = np.arange(len(owner)) - np.repeat(starts, np.diff(np.r_[starts, len(owner)]))
        given = np.flatnonzero([bool(text) for text in texts])
        rows = given[np.argsort(owner[given], kind="stable")]
        _check_unit(vectors[rows], owner[rows])
        return pa.table(
            {
                "sample_id": pa.array(owner[rows]),
                "number": pa.array(number[rows]),
                "caption": pa.array([texts[row] for row in rows.tolist()], pa.string()),
                "vector": vector_column(vectors[rows]),
            }
        )


def thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """A small JPEG of an image.

    Args:
        pixels: uint8 ``(H, W, 3)``.
    """
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.getvalue()


def vector_column(vectors: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """float32 ``(N, D)`` as a column of lists of one length."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _real_rows(batch: Mapping[str, Any], count: int) -> torch.Tensor:
    """Which rows of a batch are no padding, bool ``(B,)`` on the CPU."""
    if "is_padding" in batch:
        padding: torch.Tensor = batch["is_padding"].cpu()
        return ~padding
    return torch.ones(count, dtype=torch.bool)


def _joined(parts: list[torch.Tensor]) -> NDArray[Any]:
    joined: NDArray[Any] = torch.cat([part.detach() for part in parts]).cpu().numpy()
    return joined


def _check_unit(vectors: NDArray[np.float32], sample_id: NDArray[np.int64]) -> None:
    """Refuses vectors that are not of unit length, which includes those that are not finite."""
    bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-3))
    if bad.size:
        raise UserError(
            f"{bad.size} of {len(vectors)} embeddings are zero or not finite, first of sample {sample_id[bad[0]]}; "
            "has the model diverged? train again with a lower learning rate"
        )


Thumbnails = Literal["auto", "always", "never"]
"""Whether a gallery keeps small images: ``auto`` where images are not files of their own."""

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Hands batches on and shows how far it is; gets their number as well."""


class GivesRows(DescribesImages, Protocol):
    """A DataModule that ``fill`` can go through."""

    loader_options: Any

    def rows_of(self, splits: Sequence[str]) -> NDArray[np.int64]:
        """Ids of the samples of several splits, ascending."""

    def rows_dataloader(self, rows: NDArray[np.int64]) -> Iterable[Any]:
        """Batches of some samples, each once and in this order."""


@dataclass(frozen=True)
class FillReport:
    """What became of the images.

    Attributes:
        added: were not there.
        replaced: were there with another content.
        renewed: were there with other labels, captions, place or split.
        unchanged: were there as they are.
        left_out: names of images that could not be read.
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
    """Encodes images and stores them, in the order of the data set.

    Args:
        task: on its device, with its weights; those that ``gallery.identity`` names.
        datamodule: set up, with images of the size that the task expects.
        gallery: to fill.
        splits: that are filled in.
        run: where the weights come from; the gallery's own by default.
        chunk: images that are committed at a time, rounded down to whole batches.
        thumbnails: whether to store small images.
        progress: shows how far it is.

    Raises:
        UserError: if another process writes, there are no images, or something of them or the model is wrong.
    """
    rows = datamodule.rows_of(splits)
    if not len(rows):
        raise UserError(f"--splits: the data have no image in {', '.join(splits)}; name another split")
    wants = thumbnails == "always" or (thumbnails == "auto" and not datamodule.image_files)

    def encode(due: NDArray[np.int64]) -> Iterator[Chunk]:
        return _chunks(task, datamodule, due, gallery.identity, chunk, wants, progress or _silently)

    return fill_from(gallery, datamodule, rows, encode, run=run, chunk=chunk)


class ToBeEncoded(Protocol):
    """A chunk whose columns are made when they are asked for, in another thread."""

    def encoded(self) -> Encoded:
        """The columns."""


def fill_from(
    gallery: Gallery,
    samples: DescribesImages,
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
        sample_ids: int64 ``(n,)``, ascending, the images that are to be in the gallery.
        encode: gives what the model says of some of them, chunk by chunk, in their order.
        run: where the weights come from; the gallery's own by default.
        chunk: rows that are committed at a time where nothing is encoded.

    Raises:
        UserError: if another process writes, or something is wrong with the images or the model.
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
        samples: DescribesImages,
        sample_ids: NDArray[np.int64],
        run: str,
    ) -> None:
        self._gallery, self._writer, self._sample_ids = gallery, writer, sample_ids
        self._identity: ModelIdentity = gallery.identity
        self._run = run or self._identity.run
        self._facts = _with_labels(samples.image_facts(sample_ids), self._identity)
        captions = writer.known_captions() if self._identity.encodes_text and samples.own_captions else None
        self.plan = plan(self._facts, writer.known(), captions, self._identity)
        self._stored = np.zeros(len(sample_ids), dtype=bool)

    def commit(self, made: ToBeEncoded) -> None:
        """Stores a chunk."""
        images, captions = made.encoded()
        places = np.searchsorted(self._sample_ids, images.column("sample_id").to_numpy())
        facts = self._facts.take(places)
        rows = self._rows(facts, {name: images.column(name) for name in images.column_names})
        self._writer.add(rows, None if captions is None else self._caption_rows(captions))
        self._stored[places] = True

    def renew(self, places: NDArray[np.int64]) -> None:
        """Describes images anew that need not be encoded again."""
        facts = self._facts.take(places)
        ids = facts.column("id").to_pylist()
        kept = [name for name in image_schema(self._identity).names if name.startswith((PREDICTED, CONFIDENCE))]
        stored = self._gallery.rows(ids, [*kept, "thumbnail", "vector"])
        self._writer.add(self._rows(facts, {name: stored.column(name) for name in stored.column_names}))

    def paths(self) -> list[str]:
        """Files of the images, empty for those that are none of their own."""
        found: list[str] = self._facts.column("path").to_pylist()
        return found

    def report(self) -> FillReport:
        """What became of the images."""
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

        schema = image_schema(self._identity)
        given = {name: facts.column(name) for name in facts.column_names} | columns
        given["text"] = _texts(columns, self._identity.predicts, len(facts))
        given["run"] = pa.array([self._run] * len(facts), pa.string())
        given["weights"] = pa.array([self._identity.weights] * len(facts), pa.string())
        return pa.table([given[name] for name in schema.names], schema=schema)

    def _caption_rows(self, captions: pa.Table) -> pa.Table:
        import pyarrow as pa

        places = np.searchsorted(self._sample_ids, captions.column("sample_id").to_numpy())
        images = self._facts.column("id").take(places).to_pylist()
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
    """Columns for the labels that the gallery has and the data lack, with unknown ones."""
    import pyarrow as pa

    for task in identity.labels:
        if f"{LABEL}{task}" not in facts.column_names:
            facts = facts.append_column(f"{LABEL}{task}", pa.nulls(len(facts), pa.string()))
    return facts


def _texts(columns: dict[str, Any], predicts: dict[str, list[str]], count: int) -> pa.Array:
    """Predicted words of each image, the class first."""
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
    batch_size = int(datamodule.loader_options.batch_size)
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


_CAPTIONS = ".captions.parquet"


def write_shard(folder: Path, rank: int, number: int, encoded: Encoded) -> None:
    """Writes what one process has encoded since its last shard.

    Args:
        folder: that all processes see.
        rank: of this process.
        number: of the shard on this process.
        encoded: its images and captions.
    """
    # Captions first: a shard counts once its images are there.
    if encoded.captions is not None:
        with write_atomically(folder / f"rank{rank}-{number}{_CAPTIONS}") as partial:
            write_parquet(encoded.captions, partial)
    with write_atomically(folder / f"rank{rank}-{number}.parquet") as partial:
        write_parquet(encoded.images, partial)


@dataclass(frozen=True, eq=False)
class Shards:
    """All shards of a folder as one list of samples.

    Attributes:
        sample_ids: int64 ``(n,)``, ascending, each once.
        files: of the images.
    """

    sample_ids: NDArray[np.int64]
    files: list[Path]
    _file: NDArray[np.int64]
    _row: NDArray[np.int64]

    @classmethod
    def of(cls, folder: Path) -> Shards:
        """Reads which samples there are; of one that several shards have, the first shard's counts."""
        files = sorted(path for path in folder.glob("rank*.parquet") if not path.name.endswith(_CAPTIONS))
        ids = [read_parquet(path, ["sample_id"]).column(0).to_numpy() for path in files]
        every = np.concatenate([*ids, np.zeros(0, dtype=np.int64)])
        distinct, first = np.unique(every, return_index=True)
        lengths = np.array([len(part) for part in ids], dtype=np.int64)
        file = np.repeat(np.arange(len(files)), lengths)[first]
        row = first - (np.cumsum(lengths) - lengths)[file]
        return cls(distinct, files, file, row)

    def chunks(self, sample_ids: NDArray[np.int64], chunk: int) -> Iterator[JoinedChunk]:
        """Some samples in their order, so many at a time.

        Args:
            sample_ids: int64, ascending, among those that there are.
            chunk: samples at a time.
        """
        for start in range(0, len(sample_ids), chunk):
            yield JoinedChunk(self, sample_ids[start : start + chunk])

    def read(self, sample_ids: NDArray[np.int64]) -> Encoded:
        """What the processes have encoded of some samples, in this order."""
        import pyarrow as pa

        places = np.searchsorted(self.sample_ids, sample_ids)
        files, rows = self._file[places], self._row[places]
        images, captions = [], []
        for number in np.unique(files).tolist():
            mine = files == number
            images.append(_read(self.files[number]).take(rows[mine]))
            beside = self.files[number].with_suffix("").with_suffix(_CAPTIONS)
            if beside.exists():
                captions.append(_of_samples(_read(beside), sample_ids[mine]))
        joined = pa.concat_tables(images)
        return Encoded(
            joined.take(np.argsort(joined.column("sample_id").to_numpy(), kind="stable")),
            pa.concat_tables(captions).sort_by([("sample_id", "ascending"), ("number", "ascending")])
            if captions
            else None,
        )


@dataclass(frozen=True, eq=False)
class JoinedChunk:
    """A chunk that is read when it is asked for."""

    shards: Shards
    sample_ids: NDArray[np.int64]

    def encoded(self) -> Encoded:
        """The columns."""
        return self.shards.read(self.sample_ids)


def _read(path: Path) -> pa.Table:
    return read_parquet(path)


def _of_samples(captions: pa.Table, sample_ids: NDArray[np.int64]) -> pa.Table:
    """The captions of some samples; of a sample that a process was given twice, once."""
    ids, numbers = captions.column("sample_id").to_numpy(), captions.column("number").to_numpy()
    pairs = np.stack([ids, numbers], axis=1)
    once = np.zeros(len(pairs), dtype=bool)
    once[np.unique(pairs, axis=0, return_index=True)[1]] = True
    return captions.filter(once & np.isin(ids, sample_ids))
