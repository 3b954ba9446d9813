"""Tiny galleries, images on disk with a table, and models that fill and search galleries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from app.state.galleries import ServedGallery
from app.state.runs import ServedRun
from datamodules.base import ImageDataModule
from datamodules.options import CheckOptions, ImageOptions
from datamodules.table import SampleTable
from lightning_modules import DualEncoder, MultiTaskClassifier
from lightning_modules.options import TowerOptions
from retrieval.gallery import Gallery
from retrieval.schema import ModelIdentity, caption_schema, identity_of, image_schema
from retrieval.search.text import words
from vitrail.types import TextReading

DIM = 8

CLASSES = ["bag", "tableware_water_bottle", "sneakers"]
COLOURS = ["black", "blue"]
MATERIALS = ["leather", "plastic"]

SHOWN = [(label, colour, material) for label in CLASSES for colour in COLOURS for material in MATERIALS]
"""Class, colour and material of each image; image ``i`` is ``p<i>``."""

MISTAKES = {3: ("class", "sneakers"), 7: ("colour", "black")}
"""Wrong predictions."""


def identity(**changes: Any) -> ModelIdentity:
    """A dual encoder that also predicts, so that one gallery serves all rankers."""
    fields: dict[str, Any] = {
        "task": "DualEncoder",
        "weights": "a" * 64,
        "run": "runs/small/20260101-000000",
        "dim": DIM,
        "encodes_text": True,
        "input_options": {"size": 32},
        "predicts": {"class": CLASSES, "colour": COLOURS, "material": MATERIALS},
        "labels": ["class", "colour", "material"],
    }
    return ModelIdentity(**{**fields, **changes})


def vectors(n: int, dim: int = DIM, seed: int = 0) -> NDArray[np.float32]:
    """Random directions, float32 ``(n, dim)``, of unit length."""
    sampled = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return np.asarray(sampled / np.linalg.norm(sampled, axis=1, keepdims=True), np.float32)


def meaning_vector(*words: str) -> NDArray[np.float32]:
    """Embedding of some words by a perfect encoder, float32 ``(DIM,)``."""
    vector = np.zeros(DIM, np.float32)
    for place, word in enumerate([*CLASSES, *COLOURS, *MATERIALS]):
        vector[place] = float(word in words)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def image_rows(made_by: ModelIdentity, ids: list[str], matrix: NDArray[np.float32], **columns: list[Any]) -> pa.Table:
    """Rows of the table of images; columns that are not given are empty."""
    schema = image_schema(made_by)
    given: dict[str, Any] = {"id": ids, "content": [f"{name:0>64}" for name in ids], **columns}
    given["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), made_by.dim)
    blank = {"path": "", "caption": "", "group": "", "split": "test", "text": ""}
    blank |= {"run": made_by.run, "weights": made_by.weights}
    arrays = [given.get(field.name, [blank.get(field.name)] * len(ids)) for field in schema]
    return pa.table(
        [pa.array(a, f.type) if isinstance(a, list) else a for a, f in zip(arrays, schema, strict=True)], schema
    )


def caption_rows(made_by: ModelIdentity, captions: list[tuple[str, str]], matrix: NDArray[np.float32]) -> pa.Table:
    """Rows of the table of captions, each an image's id and a text."""
    counts: dict[str, int] = {}
    ids = []
    for image, _ in captions:
        ids.append(f"{image}#{counts.setdefault(image, 0)}")
        counts[image] += 1
    vector = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), made_by.dim)
    columns = [pa.array(ids), pa.array([p for p, _ in captions]), pa.array([t for _, t in captions]), vector]
    return pa.table(columns, caption_schema(made_by))


def small_rows(made_by: ModelIdentity) -> tuple[pa.Table, pa.Table]:
    """Rows of the twelve images and of their captions, two each."""
    columns: dict[str, list[Any]] = {"group": [f"g{row // 2}" for row in range(len(SHOWN))]}
    columns["split"] = ["train", "val", "test", "test"] * 3
    columns["caption"] = [" ".join((colour, material, label.split("_")[-1])) for label, colour, material in SHOWN]
    for task, true in zip(("class", "colour", "material"), zip(*SHOWN, strict=True), strict=True):
        columns[f"label_{task}"] = [None if (row, task) == (11, "material") else true[row] for row in range(len(SHOWN))]
        predicted_labels = [
            MISTAKES[row][1] if MISTAKES.get(row, ("",))[0] == task else true[row] for row in range(len(SHOWN))
        ]
        if task in made_by.predicts:
            columns[f"predicted_{task}"] = predicted_labels
            columns[f"confidence_{task}"] = [0.4 + 0.05 * row for row in range(len(SHOWN))]
    predicted = [columns[f"predicted_{task}"] for task in made_by.predicts]
    columns["text"] = [" ".join(words) for words in zip(*predicted, strict=True)] if predicted else [""] * len(SHOWN)
    columns = {name: values for name, values in columns.items() if name in image_schema(made_by).names}
    # A little noise, so that no two images have the same score.
    matrix = np.stack([meaning_vector(*shown) for shown in SHOWN]) + 0.05 * vectors(len(SHOWN))
    matrix = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)
    ids = [f"p{row}" for row in range(len(SHOWN))]
    texts = [
        (name, text)
        for name, caption in zip(ids, columns["caption"], strict=True)
        for text in (caption, f"a {caption}")
    ]
    spoken = np.repeat(np.stack([meaning_vector(*shown) for shown in SHOWN]), 2, axis=0) + 0.02 * vectors(24, seed=1)
    spoken = (spoken / np.linalg.norm(spoken, axis=1, keepdims=True)).astype(np.float32)
    return image_rows(made_by, ids, matrix, **columns), caption_rows(made_by, texts, spoken)


def small_gallery(folder: Path | str, **changes: Any) -> Gallery:
    """Fill a new gallery with the twelve images; ``changes`` are fields of its identity."""
    made_by = identity(**changes)
    gallery = Gallery.create(str(folder), made_by)
    images, captions = small_rows(made_by)
    with gallery.writing() as writer:
        writer.add(images, captions if made_by.encodes_text else None)
    return gallery


GRADES = ["poor", "fair", "good"]
TAGS = ["cat", "cat's toy", "dog"]

OF_EVERY_KIND: dict[str, list[Any]] = {
    "label_class": ["bag", "sneakers", "bag", None, "bag", "sneakers"],
    "predicted_class": ["bag", "sneakers", "sneakers", "bag", "bag", "bag"],
    "confidence_class": [0.9, 0.8, 0.7, 0.6, 0.9, 0.5],
    "label_tags": [["cat"], ["cat", "dog"], [], None, ["dog"], ["cat's toy"]],
    "predicted_tags": [["cat"], ["dog", "cat"], ["dog"], [], ["cat's toy"], ["cat's toy", "dog"]],
    "confidence_tags": [[0.75], [0.875, 0.5], [0.625], [], [0.75], [0.75, 0.625]],
    "label_price": [3.5, 12.99, None, 20.0, 100.0, 7.25],
    "predicted_price": [4.0, 13.5, 8.0, 25.0, 80.0, 7.25],
    "deviation_price": [1.0, 2.0, 1.5, 3.0, 10.0, 0.5],
    "label_grade": ["poor", "fair", "good", None, "good", "fair"],
    "predicted_grade": ["fair", "fair", "good", "poor", "good", "poor"],
    "confidence_grade": [0.5, 0.6, 0.7, 0.8, 0.9, 0.95],
}
"""Labels and predictions of six images in tasks of every kind."""


def gallery_of_every_kind(folder: Path | str, **changes: Any) -> Gallery:
    """A classifier's gallery of ``OF_EVERY_KIND``; its images are ``q0`` to ``q5``."""
    predicts: dict[str, list[str]] = {"class": ["bag", "sneakers"], "tags": TAGS, "price": [], "grade": GRADES}
    kinds = {"tags": "multi_label", "price": "regression", "grade": "ordinal"}
    fields = {"predicts": predicts, "labels": list(predicts), "encodes_text": False, **changes}
    made_by = identity(task="MultiTaskClassifier", kinds=kinds, scales={"grade": GRADES}, **fields)
    gallery = Gallery.create(str(folder), made_by)
    columns = {name: values for name, values in OF_EVERY_KIND.items() if name in image_schema(made_by).names}
    with gallery.writing() as writer:
        writer.add(image_rows(made_by, [f"q{row}" for row in range(6)], vectors(6), **columns))
    return gallery


SIDE = 16
TASKS = {"colour": ["blue", "red"], "class": ["bag", "water_bottle", "cap"]}

Row = dict[str, Any]


def row(number: int) -> Row:
    name = TASKS["class"][number % 3]
    return {
        "name": f"photo {number}",
        "split": ("train", "val", "test")[number % 3],
        "group": f"object {number // 2}",
        "class": name,
        "colour": None if number % 5 == 4 else TASKS["colour"][number % 2],
        "caption": [f"{name} {number}", f"the {name} {number}"],
    }


def write_image(root: Path, name: str, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE + 4, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / f"{name}.png")


def write_photos(root: Path, count: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write_image(root, f"photo {number}", number)
    return write_table(root, [row(number) for number in range(count)])


def write_table(root: Path, rows: list[Row]) -> Path:
    (root / "table.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


class Photos(ImageDataModule):
    """The images of ``write_photos``."""

    def __init__(
        self, root: str, batch_size: int = 4, captions: bool = False, checks: CheckOptions = CheckOptions()
    ) -> None:
        loader: Any = {"batch_size": batch_size}
        super().__init__(image=ImageOptions(size=SIDE), loader=loader, checks=checks)
        self.root = root
        self.captions = captions

    def load_table(self) -> SampleTable:
        rows = json.loads((Path(self.root) / "table.json").read_text(encoding="utf-8"))
        frame = pd.DataFrame(rows).assign(source=lambda table: table["name"] + ".png")
        if not self.captions:
            frame["caption"] = frame["caption"].str[0]
        vocabularies = {} if self.captions else TASKS
        return SampleTable.from_frame(
            frame, [] if self.captions else ["class", "colour"], vocabularies, "photos", self.root
        )


def photos(root: Path, **options: Any) -> Photos:
    """The DataModule, ready."""
    datamodule = Photos(str(root), **options)
    datamodule.setup("predict")
    return datamodule


def classifier(seed: int = 0) -> MultiTaskClassifier:
    torch.manual_seed(seed)
    return MultiTaskClassifier("test_vit", TASKS, pretrained=False, image_size=SIDE).eval()


def dual_encoder(clip: Path) -> DualEncoder:
    torch.manual_seed(0)
    task = DualEncoder(TowerOptions(model=str(clip)), image_size=SIDE)
    task.load_pretrained()
    return task.eval()


def gallery_of(task: Any, datamodule: Photos, uri: Path) -> Gallery:
    labels = list(datamodule.tasks)
    return Gallery.open_or_create(str(uri), identity_of(task, "runs/tiny", datamodule.image_options, labels))


def rows_of(uri: Path, table: str = "images") -> Any:
    import lancedb

    return lancedb.connect(uri).open_table(table).to_arrow()


KNOWN = {word: value for value in (*CLASSES, *COLOURS, *MATERIALS) for word in words(value)}


class MeaningRun:
    """A run whose model understands the small gallery; an image means blue if it is more blue than red."""

    def __init__(self, name: str = "perfect", weights: str = "a" * 64) -> None:
        self.name, self.weights = name, weights

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        meant = [[KNOWN[word] for word in words(text) if word in KNOWN] or ["black"] for text in texts]
        return np.stack([meaning_vector(*values) for values in meant])

    def encode_labels(self, prompts: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        return self.encode_texts([texts[0] for texts in prompts])

    value_range = "auto"

    def prepared(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def encode_images(self, images: Sequence[torch.Tensor]) -> NDArray[np.float32]:
        means = [image.float().mean(dim=(1, 2)).tolist() for image in images]
        return np.stack([meaning_vector("blue" if mean[2] > mean[0] else "black") for mean in means])

    def reading(self, text: str) -> TextReading:
        found = words(text)
        known = [word for word in found if word in KNOWN]
        return TextReading(len(known), [word for word in found if word not in KNOWN], "")


def served_small(folder: Path, name: str = "small", run: MeaningRun | None = None, **changes: Any) -> ServedGallery:
    small_gallery(folder, **changes)
    return ServedGallery(folder, name, cast("ServedRun | None", run))
