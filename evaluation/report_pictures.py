"""Sections of a report with pictures: the worst mistakes and the map of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.classification import NO_PREDICTION
from evaluation.figures import plain
from evaluation.html_page import Card, Section
from evaluation.projections import Projection, project
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.trust import file_name
from vitrail.types import UNKNOWN

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from retrieval.gallery import Gallery

ReadPicture = Callable[[str], NDArray[np.uint8] | None]
"""From the stable name of a sample to its picture, uint8 ``(H, W, 3)``; None where it cannot be read."""

MAPS: dict[Projection, str] = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
MAPPED = 2_000
"""Pictures on a map; of more so many are drawn evenly."""

_COLOURS = 20  # of matplotlib's largest qualitative map; with more classes marks change as well
_MARKS = "os^Dv*Pxh<>"
_NAMED = 44  # classes in a legend


def mistakes_section(
    predictions: Predictions,
    temperatures: Mapping[str, float],
    split: str,
    count: int,
    read: ReadPicture | None,
    why_not: str = "",
) -> Section:
    """Wrong answers with their pictures, those with the least probability of the right class first.

    Args:
        predictions: of the split.
        temperatures: confidences are taken with these, by task, where there are any.
        split: name of the split.
        count: pictures of a task at most.
        read: reads a picture; None where the data are not there.
        why_not: says why.
    """
    import pandas as pd

    from evaluation.explanations import worst_mistakes

    section = Section("Mistakes", missing=[why_not] if why_not else [])
    for task, names in predictions.tasks.items():
        targets, predicted = predictions.targets[task], predictions.predicted(task)
        if not (targets != UNKNOWN).any():
            section.missing.append(f"Of {task!r} no target is known, so mistakes cannot be told.")
            continue
        probability = predictions.probabilities(task, temperatures.get(task, 1.0))
        rows = worst_mistakes(predictions.logits[task], targets, len(predictions))
        section.says.append(f"{task}: {len(rows)} of {int((targets >= 0).sum())} answers are wrong.")
        if not len(rows):
            continue
        table = pd.DataFrame(
            {
                "name": predictions.names[rows],
                "group": predictions.groups[rows],
                "target": [names[label] for label in targets[rows]],
                "predicted": [NO_PREDICTION if label == UNKNOWN else names[label] for label in predicted[rows]],
                "confidence": probability[rows].max(axis=1),
                "probability of the target": probability[rows, targets[rows]],
            }
        )
        (section.tables if read is None else section.files)[f"mistakes_{split}_{file_name(task)}"] = table
        if read is None:
            continue
        shown = table.head(count)
        section.cards[f"{task}: the worst {len(shown)} of {len(rows)}"] = [
            _mistake(f"mistake_{split}_{file_name(task)}_{place:02}", row, read)
            for place, row in enumerate(shown.to_dict("records"), start=1)
        ]
    if section.cards or section.tables:
        section.says.append(
            "Worst first: those whose target got the least probability. Confidence is the probability of the answer"
            + (", after temperature scaling. " if temperatures else ". ")
            + f"All mistakes are in mistakes_{split}_….csv."
        )
    return section


def map_section(gallery: Gallery, split: str, task: str, seed: int = 0) -> Section:
    """Where a model puts pictures: PCA, t-SNE and UMAP of their vectors, coloured by class.

    Args:
        gallery: of the run.
        split: whose pictures are shown; all of the gallery where it has none of the split.
        task: that colours.
        seed: of what is drawn, and of the projections.
    """
    rows = rows_of(gallery, split)
    shown = rows
    if len(rows) > MAPPED:
        shown = rows.iloc[np.sort(np.random.default_rng(seed).choice(len(rows), MAPPED, replace=False))]
    column = f"label_{task}" if f"label_{task}" in rows else f"predicted_{task}"
    labels = shown[column].fillna("unknown").to_numpy() if column in rows else np.full(len(shown), "")
    places: dict[str, NDArray[np.float64]] = {}
    missing = []
    vectors = gallery.vectors([str(name) for name in shown["id"]])
    for method, name in MAPS.items():
        try:
            places[name] = project(vectors, method, seed=seed)
        except UserError as error:
            missing.append(f"{name}: {error}")
    says = [
        f"{len(shown):,} of the {len(rows):,} pictures of {told_split(rows, split)}, coloured by "
        f"{column.replace('_', ' ')}; vectors of {gallery.identity.task} ({gallery.identity.run}).",
        "Distances between far clusters and the sizes of clusters mean nothing in t-SNE and UMAP.",
    ]
    table = shown[["id", *([column] if column in rows else [])]].copy()
    for name, place in places.items():
        table[f"{name} x"], table[f"{name} y"] = place[:, 0], place[:, 1]
    figures = {"embedding_map": map_figure(places, labels)} if places else {}
    return Section("Embedding map", says=says, figures=figures, files={"embedding_map": table}, missing=missing)


def map_figure(places: Mapping[str, NDArray[np.float64]], labels: NDArray[Any]) -> Figure:
    """Draw one panel a projection.

    Args:
        places: float64 ``(N, 2)`` by name of the projection, at least one.
        labels: ``(N,)``, the class of each point.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = sorted(set(map(str, labels)))
    columns = 3
    lines = -(-min(len(classes), _NAMED) // columns)
    figure = Figure(
        figsize=(0.4 + 4.4 * len(places), 4.6 + 0.2 * lines), dpi=110, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(places), squeeze=False)[0]
    colours = colormaps["tab20" if len(classes) > 10 else "tab10"]
    for axes, (name, place) in zip(panels, places.items(), strict=True):
        for number, label in enumerate(classes):
            own = place[np.array([str(each) == label for each in labels])]
            mark = _MARKS[number // _COLOURS % len(_MARKS)]
            colour = colours(number % _COLOURS)
            axes.scatter(own[:, 0], own[:, 1], s=14, color=[colour], marker=mark, label=plain(label), linewidths=0.4)
        axes.set_title(plain(name), fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    if classes != [""]:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(
            handles[:_NAMED], names[:_NAMED], loc="outside lower center", ncols=columns, fontsize=7, frameon=False
        )
    return figure


def _mistake(stem: str, row: Mapping[Any, Any], read: ReadPicture) -> Card:
    says = [f"target: {row['target']}", f"predicted: {row['predicted']}", f"confidence {row['confidence']:.3f}"]
    return Card(stem, small_picture(row["name"], read), [*says, str(row["name"])])


def small_picture(name: str, read: ReadPicture | None) -> bytes | None:
    """A JPEG file's content; None where the picture cannot be read."""
    from retrieval.contact_sheet import small_jpeg

    pixels = None if read is None else read(name)
    return None if pixels is None else small_jpeg(pixels)


def rows_of(gallery: Gallery, split: str) -> pd.DataFrame:
    """What the gallery says of the split's pictures, of all where it has none of the split."""
    identity = gallery.identity
    columns = [f"label_{task}" for task in identity.labels] + [f"predicted_{task}" for task in identity.predicts]
    rows = gallery.table(["id", "split", "group", *columns]).to_pandas()
    own: pd.DataFrame = rows[rows["split"] == split]
    if len(own):
        return own
    every: pd.DataFrame = rows
    return every


def told_split(rows: pd.DataFrame, split: str) -> str:
    """Which pictures ``rows_of`` gave."""
    return split if (rows["split"] == split).all() else f"the whole gallery, which has none of {split}"
