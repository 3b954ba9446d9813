"""Sections of a report with images: the worst mistakes, the map of embeddings and training curves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.dataset.projections import Projection, project
from evaluation.report.figures import blank_figure, plain
from evaluation.report.page import Card, Section
from evaluation.tables.per_class import NO_PREDICTION
from vitrail.errors import UserError
from vitrail.predictions import LABEL_SEPARATOR, Predictions
from vitrail.runs import Run
from vitrail.trust import file_name
from vitrail.types import CLASS_KINDS, UNKNOWN, TaskKind

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from retrieval.gallery import Gallery


ReadImage = Callable[[str], NDArray[np.uint8] | None]
"""From the stable name of a sample to its image, uint8 ``(H, W, 3)``; None where it cannot be read."""

MAPS: dict[Projection, str] = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
MAPPED = 2_000
"""Images on a map at most; of more a sample."""

_COLOURS = 20  # of matplotlib's largest qualitative map; with more classes marks change as well
_MARKS = "os^Dv*Pxh<>"
_NAMED = 44  # classes in a legend


def mistakes_section(
    predictions: Predictions,
    temperatures: Mapping[str, float],
    split: str,
    count: int,
    read: ReadImage | None,
    why_not: str = "",
) -> Section:
    """Wrong predictions with their images, the worst first."""
    section = Section("Mistakes", missing=[why_not] if why_not else [])
    for task in predictions.tasks:
        if not len(predictions.known(task)):
            section.missing.append(f"Of {task!r} no target is known, so mistakes are not known.")
            continue
        table, sentence = mistakes_table(predictions, task, temperatures.get(task, 1.0))
        section.paragraphs.append(sentence)
        if not len(table):
            continue
        (section.tables if read is None else section.files)[f"mistakes_{split}_{file_name(task)}"] = table
        if read is None:
            continue
        shown = table.head(count)
        section.cards[f"{task}: the worst {len(shown)} of {len(table)}"] = [
            _mistake(f"mistake_{split}_{file_name(task)}_{place:02}", row, read)
            for place, row in enumerate(shown.to_dict("records"), start=1)
        ]
    if section.cards or section.tables:
        section.paragraphs.append(_worst_first(predictions, bool(temperatures), split))
    return section


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
    figures = {"embedding_map": map_figure(places, labels)} if places else {}
    return Section(
        "Embedding map", paragraphs=paragraphs, figures=figures, files={"embedding_map": table}, missing=missing
    )


def map_figure(places: Mapping[str, NDArray[np.float64]], labels: NDArray[Any]) -> Figure:
    """Draw one panel a projection."""
    from matplotlib import colormaps

    classes = sorted(set(map(str, labels)))
    columns = 3
    lines = -(-min(len(classes), _NAMED) // columns)
    figure = blank_figure(0.4 + 4.4 * len(places), 4.6 + 0.2 * lines)
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


def _mistake(stem: str, row: Mapping[Any, Any], read: ReadImage) -> Card:
    if "error" in row:
        lines = [f"true: {row['target']:.5g}", f"predicted: {row['predicted']:.5g}", f"error {row['error']:+.3g}"]
    elif "missed" in row:
        wrong = {"missed": row["missed"], "wrong": row["wrongly predicted"]}
        lines = [f"target: {row['target'] or '(none)'}", *(f"{name}: {text}" for name, text in wrong.items() if text)]
    else:
        lines = [f"target: {row['target']}", f"predicted: {row['predicted']}", f"confidence {row['confidence']:.3f}"]
    return Card(stem, small_image(row["name"], read), [*lines, str(row["name"])])


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
_CURVE_COLOURS = ("#3b75af", "#c8553d", "#4f8a5b", "#8a63a8", "#b08a2e", "#3c8f98", "#a3506f", "#6b6b6b")


def curves_section(files: Run) -> Section:
    """Loss, scores and learning rates over the epochs; which epoch was kept and where phases begin."""
    title = "Curves"
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
    figures = {}
    if panels or len(rates.columns) > 1:
        figures["curves"] = curves_figure(epochs, rates, panels, list(begins), best)
    return Section(title, paragraphs=paragraphs, figures=figures, files={"curves": epochs})


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


def curves_figure(
    epochs: pd.DataFrame, rates: pd.DataFrame, panels: Mapping[str, list[str]], begins: list[int], best: int | None
) -> Figure:
    """Draw a panel for each group of metrics and one of the learning rates."""
    own = [name for name in rates.columns if name != "done"]
    count = len(panels) + bool(own)
    figure = blank_figure(9, 2.9 * -(-count // 2))
    axes = figure.subplots(-(-count // 2), 2, squeeze=False).ravel()
    for place, (heading, names) in zip(axes, panels.items(), strict=False):
        _draw(place, heading, epochs["epoch"].to_numpy() + 1, epochs[names])
    if own:
        _draw(axes[count - 1], "learning rate", rates["done"].to_numpy(), rates[own].rename(columns=lambda n: n[3:]))
    last = float(epochs["epoch"].max()) + 1
    for place in axes[:count]:
        place.set_xlim(0, last)
        place.set_xlabel("epochs done")
        for begin in begins:
            place.axvspan(begin, max(last, begin), color="#3b75af", alpha=0.09, linewidth=0)
        if best is not None:
            place.axvline(best + 1, color="0.4", linestyle=":", linewidth=1)
    for place in axes[count:]:
        place.set_axis_off()
    return figure


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


def _draw(axes: Any, heading: str, done: Any, values: pd.DataFrame) -> None:
    stems = list(dict.fromkeys(name.partition("/")[2] or name for name in values.columns))
    for name in values.columns:
        stem = name.partition("/")[2] or name
        colour = _CURVE_COLOURS[stems.index(stem) % len(_CURVE_COLOURS)]
        known = values[name].notna().to_numpy()
        style = "--" if name.startswith("train/") else "-"
        axes.plot(
            done[known],
            values[name][known],
            style,
            color=colour,
            marker=".",
            markersize=3,
            label=plain(name),
            linewidth=1.3,
        )
    axes.set_title(plain(heading), fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=6.5, frameon=False)


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
