"""Sections of a report with images: the worst mistakes, the map of embeddings and training curves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.dataset.projections import Projection, project
from evaluation.report.charts import Chart, line_chart, map_chart
from evaluation.report.page import ImageGrid, Section
from evaluation.tables.per_class import NO_PREDICTION
from vitrail.errors import UserError
from vitrail.predictions import LABEL_SEPARATOR, Predictions
from vitrail.runs import Run
from vitrail.trust import file_name
from vitrail.types import CLASS_KINDS, UNKNOWN, TaskKind

if TYPE_CHECKING:
    import pandas as pd

    from retrieval.gallery import Gallery


ReadImage = Callable[[str], NDArray[np.uint8] | None]
"""From the stable name of a sample to its image, uint8 ``(H, W, 3)``; None where it cannot be read."""

MAPS: dict[Projection, str] = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
MAPPED = 2_000
"""Images on a map at most; of more a sample."""


def mistakes_section(
    predictions: Predictions,
    temperatures: Mapping[str, float],
    split: str,
    count: int,
    read: ReadImage | None,
    why_not: str = "",
) -> Section:
    """Wrong predictions, the worst first, with the images of ``count`` of each task."""
    section = Section("Mistakes", missing=[why_not] if why_not else [])
    for task in predictions.tasks:
        if not len(predictions.known(task)):
            section.missing.append(f"Of {task!r} no target is known, so mistakes are not known.")
            continue
        table, sentence = mistakes_table(predictions, task, temperatures.get(task, 1.0))
        section.paragraphs.append(sentence)
        name = mistakes_name(task, split)
        if not len(table):
            continue
        if read is None:
            section.tables[name] = table
            continue
        facets, amount = _FACETS[predictions.kind(task)]
        section.files[name] = table
        rows = table.drop(columns=[one for one in _NOT_SHOWN if one in table])
        if predictions.kind(task) == "multi_label":
            rows = rows.drop(columns="predicted")
        section.grids.append(
            ImageGrid(
                name,
                f"{task}: {len(table):,} mistakes",
                rows,
                facets,
                amount,
                images_of(table, ["target", "predicted"], count, read),
                LABEL_SEPARATOR if predictions.kind(task) == "multi_label" else "",
            )
        )
    if section.grids or section.tables:
        section.paragraphs.append(_worst_first(predictions, bool(temperatures), split))
    return section


_FACETS: dict[TaskKind, tuple[dict[str, str], str]] = {
    "single_label": ({"target": "True class", "predicted": "Predicted class"}, "confidence"),
    "ordinal": ({"target": "True class", "predicted": "Predicted class"}, "confidence"),
    "multi_label": ({"missed": "Missed label", "wrongly predicted": "Wrong label"}, "cross-entropy"),
    "regression": ({}, "error"),
}
_NOT_SHOWN = ("group", "probability of the target")


def mistakes_name(task: str, split: str) -> str:
    """Return the name of a task's mistakes, as of their gallery and their CSV."""
    return f"mistakes_{split}_{file_name(task)}"


def images_of(table: pd.DataFrame, columns: list[str], count: int, read: ReadImage) -> dict[str, bytes]:
    """Return images of a table's first rows, and of the first row of each combination of values, frequent ones first.

    Args:
        table: ``name`` and the given columns; the most important rows first.
        columns: whose combinations each get an image as far as ``count`` allows.
        count: images at most.
        read: of an image by its name.
    """
    worst = table.head(-(-count // 2)).index
    sizes = table.groupby(columns)["name"].transform("size")
    spread = sizes.sort_values(ascending=False, kind="stable").index
    spread = table.loc[spread].drop_duplicates(columns).index
    names = table.loc[list(dict.fromkeys([*worst, *spread, *table.head(count).index])), "name"].head(count)
    # In the order of the table, so that the first ones have theirs where a page has no room for all.
    found = {str(name): small_image(str(name), read) for name in table["name"][table["name"].isin(set(names))]}
    return {name: jpeg for name, jpeg in found.items() if jpeg is not None}


def _worst_first(predictions: Predictions, calibrated: bool, split: str) -> str:
    """How mistakes are ordered."""
    found: dict[tuple[TaskKind, ...], str] = {
        CLASS_KINDS: "Worst first: those whose target got the least probability. Confidence is the probability of the "
        f"prediction{', after temperature scaling' if calibrated else ''}.",
        ("multi_label",): "Of labels worst first: those with the largest mean cross-entropy of their known labels.",
        ("regression",): "Of numbers worst first: those with the largest error, either way.",
    }
    own = [text for kinds, text in found.items() if predictions.of_kinds(*kinds).tasks]
    return f"{' '.join(own)} All mistakes are in mistakes_{split}_….csv."


def mistakes_table(predictions: Predictions, task: str, temperature: float = 1.0) -> tuple[pd.DataFrame, str]:
    """Return the wrong predictions of a task, the worst first, and a sentence on how many there are.

    Columns are ``name``, ``group``, ``target``, ``predicted`` and, by kind, ``confidence`` and ``probability of the
    target``; ``missed``, ``wrongly predicted`` and ``cross-entropy``; ``error``. Every number counts as a mistake.
    """
    match predictions.kind(task):
        case "multi_label":
            return _wrong_labels(predictions, task)
        case "regression":
            return _largest_errors(predictions, task)
        case _:
            return _wrong_classes(predictions, task, temperature)


def _wrong_classes(predictions: Predictions, task: str, temperature: float) -> tuple[pd.DataFrame, str]:
    import pandas as pd

    from evaluation.saliency.overlays import worst_mistakes

    names, targets, predicted = predictions.tasks[task], predictions.targets[task], predictions.predicted(task)
    probability = predictions.probabilities(task, temperature)
    rows = worst_mistakes(predictions.logits[task], targets, len(predictions))
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
    return table, f"{task}: {len(rows)} of {int((targets >= 0).sum())} predictions are wrong."


def _wrong_labels(predictions: Predictions, task: str) -> tuple[pd.DataFrame, str]:
    import pandas as pd

    targets, marked, names = predictions.targets[task], predictions.predicted_labels(task), predictions.tasks[task]
    known, logits = targets != UNKNOWN, predictions.logits[task].astype(np.float64)
    losses = np.where(known, np.logaddexp(0.0, np.where(targets == 1, -logits, logits)), 0.0)
    loss = losses.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    rows = np.flatnonzero((known & (marked != (targets == 1))).any(axis=1))
    rows = rows[np.argsort(-loss[rows], kind="stable")]

    def texts(entries: NDArray[np.bool_]) -> list[str]:
        return [LABEL_SEPARATOR.join(itertools.compress(names, row)) for row in entries[rows].tolist()]

    table = pd.DataFrame(
        {
            "name": predictions.names[rows],
            "group": predictions.groups[rows],
            "target": texts(targets == 1),
            "predicted": texts(marked),
            "missed": texts((targets == 1) & ~marked),
            "wrongly predicted": texts((targets == 0) & marked),
            "cross-entropy": loss[rows],
        }
    )
    n = len(predictions.known(task))
    return table, f"{task}: {len(rows)} of {n} images have a wrong or missing label at the thresholds."


def _largest_errors(predictions: Predictions, task: str) -> tuple[pd.DataFrame, str]:
    import pandas as pd

    rows = predictions.known(task)
    targets, values = predictions.targets[task].astype(np.float64), predictions.values(task)
    rows = rows[np.argsort(-np.abs(values - targets)[rows], kind="stable")]
    table = pd.DataFrame(
        {
            "name": predictions.names[rows],
            "group": predictions.groups[rows],
            "target": targets[rows],
            "predicted": values[rows],
            "error": (values - targets)[rows],
        }
    )
    return table, f"{task}: the largest error of {len(rows)} predictions is {table['error'].iloc[0]:+.4g}."


def map_section(gallery: Gallery, split: str, task: str, seed: int = 0) -> Section:
    """Maps of a model's embeddings: PCA, t-SNE and UMAP of their vectors, coloured by class."""
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
    paragraphs = [
        f"{len(shown):,} of the {len(rows):,} images of {split_text(rows, split)}, coloured by "
        f"{column.replace('_', ' ')}; vectors of {gallery.identity.task} ({gallery.identity.run}).",
        "Distances between far clusters and the sizes of clusters mean nothing in t-SNE and UMAP.",
    ]
    table = shown[["id", *([column] if column in rows else [])]].copy()
    for name, place in places.items():
        table[f"{name} x"], table[f"{name} y"] = place[:, 0], place[:, 1]
    charts = {
        f"embedding_map_{file_name(name)}": map_chart(name, place, [*map(str, shown["id"])], [*map(str, labels)])
        for name, place in places.items()
    }
    return Section(
        "Embedding map", paragraphs=paragraphs, charts=charts, files={"embedding_map": table}, missing=missing
    )


def small_image(name: str, read: ReadImage | None) -> bytes | None:
    """Return a JPEG file's content; None where the image cannot be read."""
    from retrieval.commands.output import small_jpeg

    pixels = None if read is None else read(name)
    return None if pixels is None else small_jpeg(pixels)


def rows_of(gallery: Gallery, split: str) -> pd.DataFrame:
    """Return the gallery's columns of the split's images, of all where it has none of the split."""
    identity = gallery.identity
    columns = [f"label_{task}" for task in identity.labels] + [f"predicted_{task}" for task in identity.predicts]
    rows = gallery.table(["id", "split", "group", *columns]).to_pandas()
    own: pd.DataFrame = rows[rows["split"] == split]
    if len(own):
        return own
    every: pd.DataFrame = rows
    return every


def split_text(rows: pd.DataFrame, split: str) -> str:
    """Name the images that ``rows_of`` returned."""
    return split if (rows["split"] == split).all() else f"the whole gallery, which has none of {split}"


SHOWN = ("loss", "accuracy", "f1_macro", "mAP", "mean_recall", "mae", "r2", "quadratic_kappa")
"""Last parts of the names of metrics that are shown, and that of the monitored one; the table has all."""

_SINGLE = "loss of single tasks"


def curves_section(files: Run) -> Section:
    """Loss, scores and learning rates over the epochs; which epoch was kept and where phases begin."""
    title = "Training"
    epochs = epoch_table(files.metrics)
    if not len(epochs):
        why = [problem for problem in files.missing if problem.startswith(Run.METRICS)]
        trained = any(stage.get("stage") == "fit" for stage in files.stages)
        return Section(
            title, missing=why or ["No epoch was logged." if trained else "Nothing was trained in this run."]
        )
    begins = phase_begins(files.config)
    monitor, best = _best_epoch(files, epochs)
    paragraphs = [f"Up to epoch {epochs['epoch'].max():.0f}, counted from 0."]
    paragraphs += [
        f"From epoch {begin} on (shaded) the backbone is trained as well ({who})." for begin, who in begins.items()
    ]
    if best is not None:
        paragraphs.append(f"The dotted line is the best epoch by {monitor}: {best}.")
    if files.interrupted:
        paragraphs.append("Training did not end regularly: the curves are those of what was done.")
    panels = _panels(epochs, monitor)
    rates = learning_rates(files.metrics, epochs)
    charts = curve_charts(epochs, rates, panels, list(begins), best)
    return Section(title, paragraphs=paragraphs, charts=charts, files={"curves": epochs})


def epoch_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return one row an epoch with all that was logged once an epoch in training and validation.

    Columns are ``epoch``, counted from 0, ``step``, the last of the epoch, ``train/…`` and ``val/…``; float64.
    """
    import pandas as pd

    names = [
        name
        for name in metrics.columns
        if name.startswith(("train/", "val/")) and not name.endswith("_step") and metrics[name].notna().any()
    ]
    if "epoch" not in metrics or not names:
        return pd.DataFrame()
    rows = metrics[metrics["epoch"].notna() & metrics[names].notna().any(axis=1)]
    kept = [name for name in ("step", *names) if name in rows]
    # Of an epoch that was logged twice the later values hold.
    return rows.groupby("epoch")[kept].last().reset_index()


def learning_rates(metrics: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Return learning rates, over the number of epochs done (with fractions) in ``done``."""
    import pandas as pd

    names = [name for name in metrics.columns if name.startswith("lr-") and metrics[name].notna().any()]
    if not names or "step" not in metrics or "step" not in epochs:
        return pd.DataFrame({"done": []})
    rows = metrics.loc[metrics[names].notna().any(axis=1) & metrics["step"].notna(), ["step", *names]]
    ends = epochs[["step", "epoch"]].dropna()
    done = np.interp(rows["step"], [-1.0, *ends["step"]], [0.0, *(ends["epoch"] + 1)])
    return rows[names].assign(done=done)


def phase_begins(config: Mapping[str, Any]) -> dict[int, str]:
    """Return the first epochs of later phases by the configuration, each with its callback."""
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    found = {}
    for callback in callbacks if isinstance(callbacks, list) else []:
        arguments = callback.get("init_args") if isinstance(callback, dict) else None
        if not isinstance(arguments, dict):
            continue
        lengths = [phase.get("epochs") for phase in arguments.get("phases") or [] if isinstance(phase, dict)]
        lengths = [arguments.get("unfreeze_epoch"), *lengths]
        for begin in itertools.accumulate(length for length in lengths if isinstance(length, int)):
            found[begin] = str(callback.get("class_path", "")).rpartition(".")[2]
    return dict(sorted(found.items()))


def curve_charts(
    epochs: pd.DataFrame, rates: pd.DataFrame, panels: Mapping[str, list[str]], begins: list[int], best: int | None
) -> dict[str, Chart]:
    """Draw a chart for each group of metrics, training dashed, and one of the learning rates."""
    own = [name for name in rates.columns if name != "done"]
    done = epochs["epoch"].to_numpy(np.float64) + 1
    lines = {heading: {name: (done, epochs[name].to_numpy()) for name in names} for heading, names in panels.items()}
    if own:
        passed = rates["done"].to_numpy(np.float64)
        lines["learning rate"] = {name[3:]: (passed, rates[name].to_numpy()) for name in own}
    charts = {}
    for heading, series in lines.items():
        # Training and validation of one metric have one colour.
        stems = list(dict.fromkeys(name.partition("/")[2] or name for name in series))
        charts[f"curves_{file_name(heading)}"] = line_chart(
            heading,
            series,
            "epochs done",
            hues=[stems.index(name.partition("/")[2] or name) for name in series],
            dashed=[name for name in series if name.startswith("train/")],
            begins=begins,
            marked=None if best is None else best + 1,
        )
    return charts


def _panels(epochs: pd.DataFrame, monitor: str) -> dict[str, list[str]]:
    """Columns by last part of their name; losses of single tasks apart from the sum."""
    shown = [*SHOWN, monitor.rpartition("/")[2]] if monitor else list(SHOWN)
    panels: dict[str, list[str]] = {}
    for name in epochs.columns:
        split, _, rest = name.partition("/")
        last = rest.rpartition("/")[2]
        if split in ("train", "val") and last in shown:
            panels.setdefault(_SINGLE if last == "loss" != rest else last, []).append(name)
    order = ["loss", _SINGLE, *shown]
    return dict(sorted(panels.items(), key=lambda item: order.index(item[0])))


def _best_epoch(files: Run, epochs: pd.DataFrame) -> tuple[str, int | None]:
    """The monitored metric, and the epoch with the best recorded value."""
    fits = [
        stage["best"] for stage in files.stages if stage.get("stage") == "fit" and isinstance(stage.get("best"), dict)
    ]
    if not fits:
        return "", None
    monitor, score = str(fits[-1].get("monitor", "")), fits[-1].get("score")
    if monitor not in epochs or not isinstance(score, (int, float)):
        return monitor, None
    near = epochs.loc[np.isclose(epochs[monitor], score, rtol=1e-6, atol=1e-9), "epoch"]
    return monitor, int(near.iloc[0]) if len(near) else None
