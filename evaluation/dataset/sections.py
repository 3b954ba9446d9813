"""What is in a data set, as sections of a page: splits, classes, sizes, colors, captions, labels that go together.

``checks`` has the sections on leaks and suspected labels. Where something is missing for a section,
it reports that instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluation.dataset.features import centre_colour, pixel_features, thumbnail
from evaluation.dataset.figures import (
    Tile,
    class_bars,
    density_curves,
    heatmap,
    image_map,
    length_histogram,
    number_histogram,
    size_figure,
)
from evaluation.dataset.projections import project
from evaluation.report.page import Section
from vitrail.console import tracked
from vitrail.errors import UserError
from vitrail.predictions import known_rows
from vitrail.trust import file_name
from vitrail.types import LABEL_TASK, UNKNOWN

if TYPE_CHECKING:
    import pandas as pd


SPLITS = ("train", "val", "test")

_MOST_CLASSES = 40
"""Classes up to which a heatmap of labels that go together has room."""

_LISTED = 8


@dataclass(frozen=True)
class Collection:
    """A data set as the sections take it: N samples.

    Attributes:
        name: of the data set.
        names: object ``(N,)`` of strings, stable names.
        groups: object ``(N,)`` of strings, the physical objects.
        splits: object ``(N,)`` of strings, ``train``, ``val`` or ``test``.
        tasks: class names of each task with a single class, the main one first; none for data without labels.
        targets: for each task int64 ``(N,)``.
        usable: int64 ``(n,)``, rows whose images can be read.
        unreadable: why other rows' images cannot be read.
        read: returns uint8 ``(H, W, 3)`` for a row.
        captions: returns all captions of some rows; None where the data have none of their own.
        others: label names of each multi-label task, and regression tasks, without any names.
        other_targets: of these tasks, see ``vitrail.predictions.Predictions``.
    """

    name: str
    names: NDArray[np.object_]
    groups: NDArray[np.object_]
    splits: NDArray[np.object_]
    tasks: Mapping[str, Sequence[str]]
    targets: Mapping[str, NDArray[np.int64]]
    usable: NDArray[np.int64]
    unreadable: Mapping[int, str]
    read: Callable[[int], NDArray[np.uint8]]
    captions: Callable[[NDArray[np.int64]], list[list[str]]] | None
    others: Mapping[str, Sequence[str]] = field(default_factory=dict)
    other_targets: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def sample(self, limit: int, seed: int) -> NDArray[np.int64]:
        """Sample at most ``limit`` rows of readable images evenly; ascending, int64."""
        if len(self.usable) <= limit:
            return self.usable
        return np.sort(np.random.default_rng(seed).choice(self.usable, limit, replace=False))


@dataclass(frozen=True)
class ImageStats:
    """Sizes, colours and features of n images.

    Attributes:
        rows: int64 ``(n,)``, ascending.
        sizes: int64 ``(n, 2)``, width and height in pixels.
        centres: float64 ``(n, 3)``, mean hue, saturation and value of the centre, 0 to 1.
        features: float32 ``(n, D)``, see ``pixel_features``.
        of: number of readable images that these were sampled from.
    """

    rows: NDArray[np.int64]
    sizes: NDArray[np.int64]
    centres: NDArray[np.float64]
    features: NDArray[np.float32]
    of: int

    @property
    def summary(self) -> str:
        """How many images were read, as text."""
        return f"{self.of:,} images" if len(self.rows) == self.of else f"{len(self.rows):,} of {self.of:,} images"


def look_at(collection: Collection, rows: NDArray[np.int64]) -> ImageStats:
    """Read some images once, with a progress bar.

    Raises:
        UserError: if there is no image to read.
    """
    if not len(rows):
        raise UserError(f"{collection.name}: has no image that can be read; there is nothing to explore")
    sizes, centres, features = [], [], []
    for row in tracked(rows.tolist(), "reading images", len(rows)):
        image = collection.read(row)
        sizes.append((image.shape[1], image.shape[0]))
        centres.append(centre_colour(image))
        features.append(pixel_features(image))
    return ImageStats(rows, np.array(sizes, np.int64), np.array(centres), np.stack(features), len(collection.usable))


def splits_section(collection: Collection) -> Section:
    """Samples and groups of each split."""
    import pandas as pd

    masks = {split: collection.splits == split for split in SPLITS}
    rows = {
        "samples": {split: int(mask.sum()) for split, mask in masks.items()},
        "groups": {split: len(set(collection.groups[mask].tolist())) for split, mask in masks.items()},
    }
    for task, targets in collection.targets.items():
        known = {split: targets[mask & (targets != UNKNOWN)] for split, mask in masks.items()}
        classes = len(collection.tasks[task])
        rows[f"{task}: classes that occur, of {classes}"] = {split: len(np.unique(of)) for split, of in known.items()}
        rows[f"{task}: samples without a known value"] = {
            split: rows["samples"][split] - len(of) for split, of in known.items()
        }
    for task, targets in collection.other_targets.items():
        if names := collection.others[task]:
            occurs = {split: (targets[mask] == 1).any(axis=0) for split, mask in masks.items()}
            rows[f"{task}: labels that occur, of {len(names)}"] = {split: int(of.sum()) for split, of in occurs.items()}
        unknown = ~known_rows(targets)
        rows[f"{task}: samples without a known value"] = {
            split: int((unknown & mask).sum()) for split, mask in masks.items()
        }
    table = pd.DataFrame(rows).T.rename_axis("number of").reset_index()
    total, groups = len(collection.names), len(set(collection.groups.tolist()))
    paragraphs = [f"{total:,} samples of {groups:,} groups (physical objects; a sample without a group is its own)."]
    missing = [f"The {split} split is empty." for split, count in rows["samples"].items() if not count]
    if collection.unreadable:
        some = [f"{collection.names[row]}: {reason}" for row, reason in sorted(collection.unreadable.items())]
        listed = "; ".join(some[:_LISTED]) + (f"; and {len(some) - _LISTED} more" if len(some) > _LISTED else "")
        missing.append(f"Images that cannot be read, left out where images are needed ({len(some)}): {listed}")
    return Section("Splits", paragraphs, tables={"splits": table}, missing=missing)


def class_section(collection: Collection) -> Section:
    """How many samples each class of each task has in each split."""
    import pandas as pd

    if not collection.tasks:
        none = "no task with a single class" if collection.others else "no labels"
        return Section("Classes", missing=[f"The data have {none}, so there are no classes to count."])
    paragraphs, missing, figures, files = [], [], {}, {}
    for task, names in collection.tasks.items():
        counts = pd.DataFrame({split: class_counts(collection, task, split) for split in SPLITS}, index=list(names))
        order = counts.sort_values("train", ascending=False, kind="stable")
        figures[f"classes_{file_name(task)}"] = class_bars(order, f"{task}: samples of each class")
        files[f"classes_{file_name(task)}"] = order.rename_axis("value" if task in order else task).reset_index()
        paragraphs.append(_frequencies(task, order["train"]))
        if len(names) == 1:
            missing.append(f"{task} has one class only, so there is nothing to distinguish.")
        if rare := [str(name) for name in order.index[order["train"] == 1]]:
            missing.append(
                f"{task}: {_counted(rare, 'class has', 'classes have')} one training sample only: {_list(rare)}"
            )
        never = [str(name) for name in order.index[(order["train"] == 0) & (order.sum(axis=1) > 0)]]
        if never and order["train"].sum():
            missing.append(f"{task}: {_counted(never, 'class is', 'classes are')} never trained: {_list(never)}")
    return Section("Classes", paragraphs, figures, files=files, missing=missing)


def labels_section(collection: Collection) -> Section:
    """How many samples each label of the multi-label tasks applies to in each split, and which apply together."""
    import pandas as pd

    section = Section("Labels of which several may apply")
    for task, names in collection.others.items():
        if not names:
            continue
        targets = collection.other_targets[task]
        by_split = {split: (targets[collection.splits == split] == 1).sum(axis=0) for split in SPLITS}
        counts = pd.DataFrame(by_split, index=list(names))
        order = counts.sort_values("train", ascending=False, kind="stable")
        stem = file_name(task)
        section.figures[f"labels_{stem}"] = class_bars(order, f"{task}: samples that each label applies to")
        section.files[f"labels_{stem}"] = order.rename_axis("value" if task in order else task).reset_index()
        train = targets[(collection.splits == "train") & known_rows(targets)]
        section.paragraphs.append(_label_frequencies(task, list(names), order["train"], train))
        applies = (targets == 1).astype(np.int64)
        together = pd.DataFrame(applies.T @ applies, index=list(names), columns=list(names))
        section.files[f"together_{stem}"] = together.rename_axis("label").reset_index()
        if len(names) <= _MOST_CLASSES:
            title = f"{task}: samples with both labels; on the diagonal with the label"
            section.figures[f"together_{stem}"] = heatmap(together.loc[order.index, order.index], title)
        else:
            section.missing.append(
                f"{task} has more than {_MOST_CLASSES} labels; those that go together are in the CSV."
            )
        never = [str(name) for name in order.index[order["train"] == 0]]
        if never:
            section.missing.append(
                f"{task}: {_counted(never, 'label applies', 'labels apply')} to no training sample: {_list(never)}"
            )
        if always := [name for name, column in zip(names, train.T, strict=True) if len(train) and (column != 0).all()]:
            section.missing.append(f"{task}: no training sample is without {_list(always)}.")
    if not section.figures:
        section.missing.append("The data have no task of which several labels may apply.")
    return section


def _label_frequencies(task: str, order: Sequence[str], train: pd.Series[int], targets: NDArray[np.int8]) -> str:
    """What stands out of labels: their names, their counts by frequency, and int8 ``(N, C)``."""
    import pandas as pd

    if not len(targets) or not train.sum():
        return f"{task}: no label applies to a training sample."
    per_sample = (targets == 1).sum(axis=1)
    seen = train[train > 0]
    text = (
        f"{task}: a training sample has {per_sample.mean():.2f} labels on average ({per_sample.min()} to "
        f"{per_sample.max()}; {int((per_sample == 0).sum()):,} have none), {seen.index[0]} most often "
        f"({seen.iloc[0] / len(targets):.1%}), {seen.index[-1]} most rarely ({seen.iloc[-1]:,})."
    )
    varies = train.index[(train > 0) & (train < len(targets))]
    if len(varies) < 2:
        return text
    # Phi, the correlation of two labels; an unknown entry counts as one that does not apply.
    phi = np.triu(pd.DataFrame(targets == 1, columns=list(order)).corr().loc[varies, varies].to_numpy(), k=1)
    one, other = divmod(int(np.abs(phi).argmax()), len(phi))
    how = "together" if phi[one, other] > 0 else "without each other"
    return f"{text} {varies[one]} and {varies[other]} occur {how} most (phi {phi[one, other]:+.2f})."


def numbers_section(collection: Collection) -> Section:
    """How the numbers of the regression tasks are distributed in each split."""
    import pandas as pd

    section = Section("Numbers")
    for task in (task for task, names in collection.others.items() if not names):
        targets = collection.other_targets[task].astype(np.float64)
        numbers = {split: targets[(collection.splits == split) & ~np.isnan(targets)] for split in SPLITS}
        numbers = {split: values for split, values in numbers.items() if len(values)}
        if not numbers:
            section.missing.append(f"{task}: no value is known.")
            continue
        stem = file_name(task)
        section.figures[f"numbers_{stem}"] = number_histogram(numbers, task)
        table = pd.DataFrame({split: pd.Series(values).describe() for split, values in numbers.items()})
        section.tables[f"numbers_{stem}"] = table.rename_axis(task).reset_index()
        train = numbers.get("train", targets[:0])
        if len(train) and train.min() == train.max():
            section.missing.append(f"{task}: all training samples have {train[0]:.6g}, so there is nothing to predict.")
        for split, values in numbers.items():
            outside = int(((values < train.min()) | (values > train.max())).sum()) if len(train) else 0
            if outside:
                section.missing.append(
                    f"{task}: {outside} of {len(values)} in {split} are outside of the range of train."
                )
    if not (section.figures or section.missing):
        section.missing.append("The data have no task whose target is a number.")
    return section


def size_section(stats: ImageStats) -> Section:
    """Widths, heights and shapes of the images."""
    widths, heights = stats.sizes.T
    same = len(np.unique(stats.sizes, axis=0)) == 1
    middle = f"{int(np.median(widths))} × {int(np.median(heights))}"
    if same:
        which = "All" if len(stats.rows) == stats.of else "All that were read"
        paragraphs = f"{which} are {middle} pixels ({stats.summary})."
    else:
        short_sides = stats.sizes.min(axis=1)
        paragraphs = (
            f"{stats.summary}: the median is {middle} pixels, short sides go from {short_sides.min()} to "
            f"{short_sides.max()}; an image size above most short sides enlarges images without any gain."
        )
    return Section("Image sizes", [paragraphs], {"sizes": size_figure(widths, heights)})


def caption_section(collection: Collection) -> Section:
    """How many words captions have."""
    if collection.captions is None:
        return Section("Captions", missing=["The data have no captions of their own."])
    lengths: dict[str, NDArray[np.int64]] = {}
    without = 0
    for split in SPLITS:
        rows = np.flatnonzero(collection.splits == split).astype(np.int64)
        captions = collection.captions(rows)
        words = [len(text.split()) for texts in captions for text in texts if text.strip()]
        without += sum(not any(text.strip() for text in texts) for texts in captions)
        if words:
            lengths[split] = np.array(words, np.int64)
    if not lengths:
        return Section("Captions", missing=["No caption has a word."])
    together = np.concatenate(list(lengths.values()))
    low, middle, high = np.percentile(together, [5, 50, 95]).round().astype(int)
    paragraphs = (
        f"{len(together):,} captions: median {middle} words, nine in ten have {low} to {high}, the longest "
        f"{together.max()}; a tokenizer's maximum length should not cut the long ones."
    )
    missing = [f"Samples without a caption: {without:,}."] if without else []
    return Section("Caption lengths", [paragraphs], {"captions": length_histogram(lengths)}, missing=missing)


def cooccurrence_section(collection: Collection) -> Section:
    """Which labels of different tasks occur together."""
    import pandas as pd

    tasks = list(collection.tasks)
    if len(tasks) < 2:
        return Section("Labels that go together", missing=["The data have no attributes next to the class."])
    strength = pd.DataFrame(np.eye(len(tasks)), index=tasks, columns=tasks)
    for place, first in enumerate(tasks):
        for second in tasks[place + 1 :]:
            value = cramers_v(contingency(collection, first, second))
            strength.loc[first, second] = strength.loc[second, first] = value
    figures = {"association": heatmap(strength, "Cramér's V, 0 independent, 1 one determines the other", highest=1.0)}
    main, missing = tasks[0], []
    if len(collection.tasks[main]) <= _MOST_CLASSES:
        for task in tasks[1:]:
            figures[f"{file_name(main)}_{file_name(task)}"] = heatmap(
                contingency(collection, main, task), f"{main} and {task}: samples"
            )
    else:
        missing.append(f"{main} has more than {_MOST_CLASSES} classes, so no tables of it with attributes are shown.")
    pairs = np.where(np.triu(np.ones(strength.shape, dtype=bool), k=1), strength.to_numpy(), np.nan)
    if np.isnan(pairs).all():
        missing.append("No two labels are known together with two values each, so nothing can go together.")
        return Section("Labels that go together", figures=figures, missing=missing)
    values = np.nan_to_num(pairs, nan=-1.0)
    one, other = divmod(int(values.argmax()), len(tasks))
    paragraphs = [
        f"{tasks[one]} and {tasks[other]} go together most (Cramér's V {values.max():.2f}). Where an attribute follows "
        "from the class, a model can predict it without the image; few groups make V large by chance."
    ]
    return Section("Labels that go together", paragraphs, figures, missing=missing)


def class_counts(collection: Collection, task: str, split: str) -> NDArray[np.int64]:
    """Samples of each class in a split, int64 ``(C,)``."""
    targets = collection.targets[task][collection.splits == split]
    return np.bincount(targets[targets != UNKNOWN], minlength=len(collection.tasks[task])).astype(np.int64)


def contingency(collection: Collection, first: str, second: str) -> pd.DataFrame:
    """Samples by class of two tasks, of those where both are known; int64, rows are classes of the first."""
    import pandas as pd

    one, other = collection.targets[first], collection.targets[second]
    known = (one != UNKNOWN) & (other != UNKNOWN)
    shape = len(collection.tasks[first]), len(collection.tasks[second])
    counts = np.bincount(one[known] * shape[1] + other[known], minlength=shape[0] * shape[1]).reshape(shape)
    return pd.DataFrame(counts, index=list(collection.tasks[first]), columns=list(collection.tasks[second]))


def cramers_v(table: pd.DataFrame) -> float:
    """Return Cramér's V, 0 to 1; NaN where one of the two has fewer than two values that occur."""
    from scipy.stats.contingency import association

    counts = table.to_numpy()
    counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    return float(association(counts, method="cramer")) if min(counts.shape) > 1 else float("nan")


def main_task(collection: Collection, wanted: str | None) -> str | None:
    """Return the task that colours and labels are shown for; None where the data have no labels.

    Raises:
        UserError: for a task that the data do not have.
    """
    if wanted in collection.others:
        raise UserError(
            f"--task {wanted}: has no single class for each image; name one of {', '.join(collection.tasks) or 'none'}"
        )
    if wanted is not None and wanted not in collection.tasks:
        raise UserError(
            f"--task {wanted}: the data have {', '.join(collection.tasks) or 'no labels'}; name one of them"
        )
    return wanted or (LABEL_TASK if LABEL_TASK in collection.tasks else next(iter(collection.tasks), None))


def _frequencies(task: str, train: pd.Series[int]) -> str:
    seen = train[train > 0]
    if seen.empty:
        return f"{task}: no training sample has a known value."
    share = seen.iloc[0] / seen.sum()
    return (
        f"{task}: {len(seen)} of {len(train)} classes occur in train, {seen.index[0]} most often ({share:.1%}, what "
        f"always predicting it would reach), {seen.index[-1]} most rarely ({seen.iloc[-1]:,})."
    )


def _counted(names: Sequence[str], one: str, many: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else many}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


SIDE, PIXELS, NEIGHBOURS = 128, 5_000, 8
"""Side that images are scaled to, pixels sampled of each, and neighbours of a class on the map."""

LEVELS = 256
SHOWN_CLASSES, IMAGES_OF_CLASS = 6, 60
"""Classes that are chosen by default, the most frequent ones, and images of each at most."""

COLOURLESS = 0.05
"""Saturation up to which a pixel has no hue: its number would be that of red."""


def hsv_pixels(image: NDArray[np.uint8], rng: np.random.Generator, side: int, count: int) -> NDArray[np.float64]:
    """Sample hue, saturation and value of an image's pixels.

    Args:
        image: uint8 ``(H, W, 3)``, RGB.
        rng: random generator.
        side: that the image is scaled to, in pixels.
        count: how many; all where there are no more.

    Returns:
        float64 ``(count, 3)``, 0 to 1.
    """
    scaled = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    pixels = np.asarray(scaled.convert("HSV"), np.float64).reshape(-1, 3) / 255
    return pixels if len(pixels) <= count else pixels[rng.choice(len(pixels), count, replace=False)]


def density(values: NDArray[np.float64], *, circular: bool = False) -> NDArray[np.float64]:
    """Return a Gaussian kernel density on 0 to 1, with Scott's bandwidth, from a fine histogram.

    The density stays inside: what a kernel would put beyond an end comes back from it, or at the other end where the
    values are circular.

    Returns:
        float64 ``(LEVELS,)`` at the middles of as many equal bins; its mean is 1, or 0 for no values.
    """
    from scipy.ndimage import gaussian_filter1d

    counts = np.histogram(values, LEVELS, (0, 1))[0].astype(np.float64)
    if not len(values):
        return counts
    # Scott, 1992; at least a bin, so that a single value is still a peak.
    bandwidth = max(float(values.std()) * len(values) ** -0.2, 1 / LEVELS)
    smooth = gaussian_filter1d(counts, bandwidth * LEVELS, mode="wrap" if circular else "reflect", truncate=6)
    result: NDArray[np.float64] = smooth * LEVELS / smooth.sum()
    return result


def class_densities(
    images: Iterable[NDArray[np.uint8]], rng: np.random.Generator, side: int = SIDE, count: int = PIXELS
) -> NDArray[np.float64]:
    """Return densities of the hue, saturation and value of some images, float64 ``(3, LEVELS)``.

    Pixels without colour are left out of the first row.
    """
    pixels: NDArray[Any] = np.concatenate([hsv_pixels(image, rng, side, count) for image in images])
    hue, saturation, value = pixels.T
    return np.stack([density(hue[saturation > COLOURLESS], circular=True), density(saturation), density(value)])


def density_section(
    collection: Collection,
    stats: ImageStats,
    task: str | None,
    chosen: Sequence[str] = (),
    *,
    side: int = SIDE,
    pixels: int = PIXELS,
    seed: int = 0,
) -> Section:
    """Densities of hue, saturation and value of some classes.

    Raises:
        UserError: for a class that the task does not have.
    """
    title = "Colours of classes"
    if task is None:
        return Section(
            title, missing=["The data have no labels, so there are no classes whose colours could be shown."]
        )
    names, targets = list(collection.tasks[task]), collection.targets[task][stats.rows]
    if strange := [name for name in chosen if name not in names]:
        raise UserError(f"--classes: {task} has no class {strange[0]!r}; it has {', '.join(names[:12])} …")
    counts = np.bincount(targets[targets != UNKNOWN], minlength=len(names))
    frequent = [names[code] for code in np.argsort(-counts, kind="stable")[:SHOWN_CLASSES] if counts[code]]
    shown = list(dict.fromkeys(chosen)) or frequent
    curves, missing = {}, []
    for name in shown:
        code = names.index(name)
        rows = stats.rows[targets == code][:IMAGES_OF_CLASS]
        if len(rows):
            images = (collection.read(row) for row in rows.tolist())
            curves[name] = class_densities(images, np.random.default_rng([seed, code]), side, pixels)
        else:
            missing.append(f"{name} has no image among {stats.summary}.")
    if not curves:
        return Section(title, missing=[*missing, "No image has a known class."])
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    paragraphs = [
        f"Kernel densities of {len(curves)} classes ({task}): up to {IMAGES_OF_CLASS} images each, scaled to "
        f"{side} × {side}, {pixels:,} pixels an image. Where curves differ, colour alone distinguishes classes. Pixels "
        f"without colour (saturation up to {COLOURLESS:g}) have no hue and are left out of the first panel."
    ]
    figure = density_curves(curves, levels, f"{task}: hue, saturation, value")
    return Section(title, paragraphs, {f"hsv_{file_name(task)}": figure}, missing=missing)


def centroid_section(
    collection: Collection, stats: ImageStats, task: str | None, *, neighbours: int = NEIGHBOURS
) -> Section:
    """Isomap of the classes by the mean colour of their images' centres, an image for each."""
    title = "Map of classes by colour"
    if task is None:
        return Section(title, missing=["The data have no labels, so there are no classes to be laid out."])
    targets = collection.targets[task][stats.rows]
    codes = np.unique(targets[targets != UNKNOWN])
    if len(codes) < 3:
        return Section(title, missing=[f"{task} has {len(codes)} classes with images; a map needs three at least."])
    centroids = np.stack([stats.centres[targets == code].mean(axis=0) for code in codes])
    places = project(centroids, "isomap", neighbours=neighbours)
    names = collection.tasks[task]
    tiles = [
        Tile(thumbnail(collection.read(_nearest(stats, targets, code, centre))), names[code])
        for code, centre in zip(codes.tolist(), centroids, strict=True)
    ]
    paragraphs = [
        f"Isomap of {len(codes)} classes with {min(neighbours, len(codes) - 1)} neighbours each. A class is the mean "
        "hue, saturation and value of the middle of its images; the image shown is the one nearest to that. "
        "Neighbours are easily confused by colour. Hue is averaged as a number, so reds may be far from each other."
    ]
    figure = image_map(places, tiles, f"{task}: classes by the colour of their centre")
    return Section(title, paragraphs, {f"isomap_{file_name(task)}": figure})


def _nearest(stats: ImageStats, targets: NDArray[np.int64], code: int, centre: NDArray[np.float64]) -> int:
    """Row of the class's image that is nearest to its centroid."""
    places = np.flatnonzero(targets == code)
    return int(stats.rows[places[((stats.centres[places] - centre) ** 2).sum(axis=1).argmin()]])
