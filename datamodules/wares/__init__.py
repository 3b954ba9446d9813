"""Wares: generated images of products, the data set that needs no download.

Ten kinds of objects in eight colours, five materials and three conditions, each object seen in several views that
differ in pose, light, background and occlusion. Objects, not images, are split. Everything is a function of (seed,
index): a larger data set begins with the images of a smaller one, in the same splits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from datamodules.base import ImageDataModule
from datamodules.table import SPLITS, SampleTable
from datamodules.wares.render import (
    COLOURS,
    CONDITIONS,
    KINDS,
    MATERIALS,
    MATERIALS_OF,
    WareSpec,
    draw_ware,
    pick,
    stream,
)
from vitrail.console import tracked
from vitrail.errors import UserError
from vitrail.types import TaskKind

MEMORY_LIMIT = 512 * 1024 * 1024
"""Bytes of images that are kept; a larger data set is drawn again in each epoch."""

_SPLITS_OF_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
_VOCABULARIES = {"class": KINDS, "colour": tuple(sorted(COLOURS)), "material": MATERIALS, "condition": CONDITIONS}
_PRICES = {
    "backpack": 60.0,
    "bottle": 15.0,
    "cap": 20.0,
    "handbag": 90.0,
    "lamp": 45.0,
    "mug": 10.0,
    "sneaker": 70.0,
    "soap dispenser": 12.0,
    "vase": 30.0,
    "watch": 120.0,
}
_OF_MATERIAL = {"fabric": 1.0, "glass": 1.1, "leather": 1.6, "metal": 1.3, "plastic": 0.7}
_OF_CONDITION = {"new": 1.0, "used": 0.7, "worn": 0.45}
_TAGS = ("fragile", "household", "soft", "wearable")
_HOUSEHOLD, _WEARABLE = ("bottle", "lamp", "mug", "soap dispenser", "vase"), ("cap", "sneaker", "watch")
_KINDS_OF_TASKS: dict[str, TaskKind] = {"condition": "ordinal", "tags": "multi_label", "price": "regression"}
_GOLDEN = (math.sqrt(5) - 1) / 2

# What a random stream is for: each use has its own, so that a change of one does not shift the others.
_FOR_KIND, _FOR_COLOUR, _FOR_CONDITION, _FOR_OBJECT, _FOR_VIEW, _FOR_CAPTION, _FOR_SPLIT = range(7)

_CONDITION_WORDS = {
    "new": ("new", "brand new", "shiny new"),
    "used": ("used", "lightly used", "used but sound"),
    "worn": ("worn", "well worn", "badly worn"),
}
_CAPTIONS = (
    "a {condition} {colour} {material} {kind}",
    "a {colour} {kind} made of {material}, {condition}",
    "photo of a {condition} {kind} in {colour} {material}",
    "this {material} {kind} is {colour} and {condition}",
    "{condition} {kind}, {colour}, {material}",
    "the {kind} on offer is {condition}: {colour} {material}",
    "an image of one {colour} {material} {kind} in {condition} condition",
    "for sale: {colour} {kind} of {material}, {condition}",
)


_SHORT_CAPTIONS = (
    "{kind}",
    "a photo of a {kind}",
    "{colour} {kind}",
    "a photo of a {colour} {kind}",
    "{material} {kind}",
    "{condition} {kind}",
    "{colour} {material} {kind}",
)


def _dealt(values: Sequence[str], number: int, *key: int) -> str:
    """Deal values from one shuffled deck after another, so that all are equally frequent."""
    deck, place = divmod(number, len(values))
    return values[int(np.argsort(stream(*key, deck).random(len(values)))[place])]


def ware_spec(seed: int, instance: int) -> WareSpec:
    """Return an object by its number; each ten in a row have one of each kind, likewise for colours and conditions."""
    kind = _dealt(KINDS, instance, seed, _FOR_KIND)
    colour = _dealt(_VOCABULARIES["colour"], instance, seed, _FOR_COLOUR)
    condition = _dealt(CONDITIONS, instance, seed, _FOR_CONDITION)
    rng = stream(seed, _FOR_OBJECT, instance)
    material = MATERIALS_OF[kind][pick(rng, len(MATERIALS_OF[kind]))]
    return WareSpec(kind, colour, material, condition, pick(rng, 2**48))


def ware_caption(spec: WareSpec, seed: int, index: int) -> str:
    """Return a sentence that names kind, colour, material and condition of an image."""
    rng = stream(seed, _FOR_CAPTION, index)
    words = _CONDITION_WORDS[spec.condition]
    return _CAPTIONS[pick(rng, len(_CAPTIONS))].format(
        condition=words[pick(rng, len(words))], colour=spec.colour, material=spec.material, kind=spec.kind
    )


def short_captions(spec: WareSpec) -> list[str]:
    """Return what people type to find an object, such as ``mug`` and ``blue mug``."""
    named = {"kind": spec.kind, "colour": spec.colour, "material": spec.material, "condition": spec.condition}
    return [text.format_map(named) for text in _SHORT_CAPTIONS]


def ware_tags(spec: WareSpec) -> list[str]:
    """Return the tags of an object: fragile, household, soft, wearable, or none of them."""
    applies = (
        spec.material == "glass",
        spec.kind in _HOUSEHOLD,
        spec.material in ("fabric", "leather"),
        spec.kind in _WEARABLE,
    )
    return [tag for tag, one in zip(_TAGS, applies, strict=True) if one]


def ware_price(spec: WareSpec) -> float:
    """Return the price of an object, 3.15 to 192, which kind, material and condition make."""
    return round(_PRICES[spec.kind] * _OF_MATERIAL[spec.material] * _OF_CONDITION[spec.condition], 2)


class Wares(ImageDataModule):
    """Generated product images with class, colour, material, condition and caption.

    Args:
        n_samples: number of images.
        views: images of each object.
        resolution: side of the images as drawn, in pixels; ``image.size`` is what the model gets.
        val_fraction: share of the objects for validation.
        test_fraction: share of the objects for the test.
        draw_seed: of objects and views, 0 or more; separate from ``seed``, so that runs with several seeds share data.
        every_kind: whether there are tasks of every kind: the condition is ordinal, and there are tags (multi-label)
            and a price (regression).
        short_captions: whether training images also have short captions, such as ``blue mug``: a text tower that is
            trained from scratch understands only what it has read. Retrieval is still measured by sentences.
        shared: options of every data set, see ``ImageDataModule``.
    """

    generated: ClassVar[bool] = True

    def __init__(
        self,
        n_samples: int = 600,
        views: int = 5,
        resolution: int = 96,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        draw_seed: int = 0,
        every_kind: bool = False,
        short_captions: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.n_samples, self.views, self.resolution = n_samples, views, resolution
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.draw_seed, self.every_kind, self.short_captions = draw_seed, every_kind, short_captions
        self._check_arguments()
        kept = n_samples if n_samples * 3 * resolution * resolution <= MEMORY_LIMIT else 0
        # Reserved, not filled: memory is taken as images are drawn.
        self._images = np.empty((kept, 3, resolution, resolution), dtype=np.uint8)
        self._drawn = np.zeros(kept, dtype=bool)

    def load_table(self) -> SampleTable:
        """List all images without drawing any."""
        import pandas as pd

        rows = []
        for instance in range(math.ceil(self.n_samples / self.views)):
            spec = ware_spec(self.draw_seed, instance)
            first = instance * self.views
            split = self._split_of(instance, spec.kind)
            short = short_captions(spec) if self.short_captions and split == "train" else []
            for index in range(first, min(first + self.views, self.n_samples)):
                rows.append(
                    {
                        "name": f"ware_{instance:06d}_{index - first}",
                        "source": str(index),
                        "split": split,
                        "group": f"ware_{instance:06d}",
                        "caption": [ware_caption(spec, self.draw_seed, index), *short],
                        "row": index,
                        "class": spec.kind,
                        "colour": spec.colour,
                        "material": spec.material,
                        "condition": spec.condition,
                        "tags": ware_tags(spec),
                        "price": ware_price(spec),
                    }
                )
        frame = pd.DataFrame(rows)
        for split, share in zip(SPLITS[1:], (self.val_fraction, self.test_fraction), strict=True):
            if share > 0 and not (frame["split"] == split).any():
                raise UserError(
                    f"data n_samples: {self.n_samples} images of {math.ceil(self.n_samples / self.views)} objects "
                    f"leave the {split} split empty; raise n_samples or {split}_fraction, or lower views"
                )
        targets, names, kinds = list(_VOCABULARIES), _VOCABULARIES, None
        if self.every_kind:
            targets, names, kinds = [*targets, "tags", "price"], {**names, "tags": _TAGS}, _KINDS_OF_TASKS
        return SampleTable.from_frame(frame, targets, names, origin="Wares", kinds=kinds)

    def read_image(self, index: int) -> torch.Tensor:
        """See ``ImageDataModule``; drawn, or from memory."""
        if not len(self._drawn):
            return torch.from_numpy(self._draw(index))
        if not self._drawn[index]:
            self._images[index] = self._draw(index)
            self._drawn[index] = True
        return torch.from_numpy(self._images[index].copy())

    def setup(self, stage: str | None = None) -> None:
        """Draw the images that the stage needs, so that worker processes share them."""
        super().setup(stage)
        if not len(self._drawn):
            return
        wanted = np.concatenate([self.split_indices(split) for split in _SPLITS_OF_STAGE.get(str(stage), SPLITS)])
        missing = wanted[~self._drawn[wanted]]
        for index in tracked(missing.tolist(), "drawing images", len(missing)):
            self.read_image(index)

    def _draw(self, index: int) -> npt.NDArray[np.uint8]:
        spec = ware_spec(self.draw_seed, index // self.views)
        view_seed = pick(stream(self.draw_seed, _FOR_VIEW, index), 2**48)
        return np.ascontiguousarray(draw_ware(spec, view_seed, self.resolution).transpose(2, 0, 1))

    def _split_of(self, instance: int, kind: str) -> str:
        """The split of an object: multiples of the golden ratio fill all splits evenly, in each kind and ten by ten."""
        offset = float(stream(self.draw_seed, _FOR_SPLIT).random())
        place = (offset + instance // len(KINDS) * _GOLDEN + KINDS.index(kind) / len(KINDS)) % 1
        if place < self.val_fraction:
            return "val"
        return "test" if place < self.val_fraction + self.test_fraction else "train"

    def _check_arguments(self) -> None:
        limits = {"n_samples": 1, "views": 1, "resolution": 16, "val_fraction": 0, "test_fraction": 0, "draw_seed": 0}
        for key, least in limits.items():
            if getattr(self, key) < least:
                raise UserError(f"data {key}: is {getattr(self, key)}, must be at least {least}")
        if self.val_fraction + self.test_fraction >= 1:
            total = self.val_fraction + self.test_fraction
            raise UserError(
                f"data val_fraction, test_fraction: together {total:g}, must be below 1 to leave training data"
            )
