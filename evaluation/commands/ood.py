"""``vitrail ood RUN``: recognise images that are unlike the training images.

Detectors are fitted on the training split and their threshold is chosen on validation. Images of other sets (``--ood``)
only show how well that works: nothing is chosen on them. One detector is kept in ``checkpoints/ood.safetensors``; from
then on ``predict``, ``Run.predict`` and the application mark unknown images.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import Estimate, Statistic, estimate, share_interval
from evaluation.tables.summary import with_interval
from vitrail.console import Table, tracked, without_nan
from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.ood import METHODS, OF_LOGITS, Detector, outputs_with_features, unit, write_detector
from vitrail.runs import Run, checkpoint_digest
from vitrail.runtime import check_device
from vitrail.trust import plain_name
from vitrail.types import UNKNOWN, InputOptions, TaskKind, kind_of

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule


_WORK = 2e8
"""Weights that the resamples of one interval may look at: a second or two."""


@dataclass(frozen=True)
class OodOutputs:
    """What a model outputs for N images.

    Attributes:
        logits: float ``(N, C)``, of the task that detectors use.
        features: float ``(N, D)``, of the image backbone.
        groups: object ``(N,)``.
        targets: int64 ``(N,)``, ``UNKNOWN`` where not known; empty where they are not needed.
    """

    logits: NDArray[np.float32]
    features: NDArray[np.float32]
    groups: NDArray[np.object_]
    targets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.features)


def methods_for(kind: TaskKind, *, has_prompts: bool) -> list[str]:
    """Return the methods that a model has the outputs for.

    Args:
        kind: of the task.
        has_prompts: whether its logits are scaled cosines.
    """
    left_out = {"multi_label": ("mcm", "vim"), "regression": (*OF_LOGITS, "vim")}.get(kind, ())
    return [one for one in METHODS if one not in left_out and (has_prompts or one != "mcm")]


def fit_detector(
    method: str,
    train: OodOutputs,
    *,
    head: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
    logit_scale: float = 1.0,
    neighbours: int = 0,
) -> dict[str, NDArray[np.float32]]:
    """Return what a method needs of the training images; see ``vitrail.ood`` for the methods.

    Args:
        method: one of ``METHODS``.
        train: of the training split.
        head: weights ``(C, D)`` and biases ``(C,)`` where one linear layer makes logits of features. ViM takes its
            origin from it, otherwise the mean of the features.
        logit_scale: what cosines were multiplied by.
        neighbours: k of ``knn``; 0 for a tenth of the images of an average class, 50 at most.

    Raises:
        UserError: there are too few training images.
    """
    features = train.features.astype(np.float64)
    if method not in OF_LOGITS and len(features) < 2:
        raise UserError(f"ood {method}: needs at least two training images; got {len(features)}")
    match method:
        case "mcm":
            found: dict[str, Any] = {"scale": logit_scale}
        case "mahalanobis":
            found = _mahalanobis(features, train.targets)
        case "knn":
            usual = max(1, min(50, len(features) // (10 * max(1, train.logits.shape[1]))))
            found = {"bank": unit(features), "neighbours": min(neighbours or usual, len(features))}
        case "vim":
            found = _vim(features, train.logits.astype(np.float64), head)
        case _:
            found = {}
    return {name: np.asarray(values, dtype=np.float32) for name, values in found.items()}


def _mahalanobis(features: NDArray[np.float64], targets: NDArray[np.int64]) -> dict[str, Any]:
    """Means of the classes and a map in which the covariance within them is the unit matrix.

    Images whose class is not known, and all where none is, are a class of their own.
    """
    from sklearn.covariance import LedoitWolf

    classes = targets if len(targets) == len(features) else np.full(len(features), UNKNOWN)
    names, index = np.unique(classes, return_inverse=True)
    means = np.stack([features[index == place].mean(axis=0) for place in range(len(names))])
    covariance = LedoitWolf(assume_centered=True).fit(features - means[index]).covariance_
    values, vectors = np.linalg.eigh(covariance)
    whitening = vectors / np.sqrt(np.maximum(values, values.max() * 1e-10))
    return {"whitening": whitening, "means": means @ whitening}


def _vim(
    features: NDArray[np.float64],
    logits: NDArray[np.float64],
    head: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
) -> dict[str, Any]:
    count, size = features.shape
    origin = features.mean(axis=0) if head is None else -np.linalg.pinv(head[0]) @ head[1]
    # The paper's numbers of principal directions; few images leave the others to no one.
    wanted = 1000 if size >= 2048 else 512 if size >= 768 else size // 2
    kept = min(wanted, max(1, count // 2), size - 1)
    centred = features - origin
    _, vectors = np.linalg.eigh(centred.T @ centred / count)
    outside = vectors[:, : size - kept]  # eigenvalues ascend
    length = float(np.linalg.norm(centred @ outside, axis=1).mean())
    scale = float(logits.max(axis=1).mean()) / max(length, 1e-12)
    return {"origin": origin, "outside": outside, "scale": scale}


def threshold_for(scores: NDArray[np.float64], rate: float) -> float:
    """Return the highest threshold that at least a share of the scores, ``(N,)``, reaches."""
    ordered = np.sort(scores)
    # Not one image more than the rate allows, whatever rounding does to the product.
    return float(ordered[min(len(scores) - 1, math.floor((1 - rate) * len(scores) + 1e-9))])


@dataclass(frozen=True)
class Separation:
    """How well the scores of a method separate images of the test split from others.

    Attributes:
        auroc: chance that an image of the test split has the higher score, equal scores counting half; 0 to 1, higher
            is better.
        fpr: share of the others that reach the threshold that 95 % of the test images reach; lower is better.
        kept: share of the test images that reach the saved threshold.
        unknown: share of the others that do not.
    """

    auroc: Estimate
    fpr: Estimate
    kept: Estimate
    unknown: Estimate


def separation(
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    groups: tuple[NDArray[np.object_], NDArray[np.object_]],
    threshold: float,
    n_resamples: int = 2_000,
) -> Separation:
    """Return how well scores separate two sets, with 95 % intervals over groups of both.

    Args:
        inside: ``(N,)``, of the test split.
        outside: ``(M,)``, of the other images.
        groups: of both.
        threshold: that was chosen on validation.
        n_resamples: at most.
    """
    scores = np.concatenate([inside, outside])
    is_inside = np.arange(len(scores)) < len(inside)
    names, own = np.unique(groups[0].astype(str), return_inverse=True)
    index = np.concatenate([own, len(names) + np.unique(groups[1].astype(str), return_inverse=True)[1]])
    count = int(np.clip(_WORK / max(len(scores), 1), 200, n_resamples))
    kept, found = inside >= threshold, outside < threshold
    return Separation(
        estimate(auroc_statistic(scores, is_inside), index, count),
        estimate(fpr_statistic(scores, is_inside), index, count, percentiles=True),
        Estimate(float(kept.mean()), share_interval(kept.astype(np.float64), groups[0])),
        Estimate(float(found.mean()), share_interval(found.astype(np.float64), groups[1])),
    )


def auroc_statistic(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> Statistic:
    """Return the area under the ROC curve as a function of sample weights; equal scores count half.

    Args:
        scores: ``(N,)``.
        positive: bool ``(N,)``, which should have the higher scores.
    """
    distinct, place = np.unique(scores, return_inverse=True)
    order = np.argsort(place, kind="stable")
    begins = np.searchsorted(place[order], np.arange(len(distinct)))

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        own = weights[:, order]
        inside, outside = (np.add.reduceat(own * mask[order], begins, axis=1) for mask in (positive, ~positive))
        below = outside.cumsum(axis=1) - outside / 2
        pairs = inside.sum(axis=1) * outside.sum(axis=1)
        return _ratio((inside * below).sum(axis=1), pairs)

    return statistic


def fpr_statistic(scores: NDArray[np.float64], positive: NDArray[np.bool_], rate: float = 0.95) -> Statistic:
    """Return the share of negatives at or above the threshold that a share of the positives reaches, by weights."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        own = weights[:, order]
        inside, outside = ((own * mask[order]).cumsum(axis=1)[:, ends] for mask in (positive, ~positive))
        reached = inside >= rate * inside[:, -1:] - 1e-9
        first = reached.argmax(axis=1)
        return _ratio(np.take_along_axis(outside, first[:, None], axis=1)[:, 0], outside[:, -1])

    return statistic


def _ratio(top: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.divide(top, below, out=np.full(len(top), math.nan), where=below > 0)
    return found


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ood``."""
    command.description = (
        "Fits scores of familiarity on the training split, chooses on validation the threshold that --rate of the "
        f"images reach, and keeps one in {Run.OOD}; predict and the application then mark images below it as unknown."
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    command.add_argument(
        "--ood",
        nargs="+",
        default=[],
        metavar="DATA",
        help="other images to be recognised, for the table: folder, table, experiment file, or a class such as Wares",
    )
    command.add_argument(
        "--ood-rows", nargs="+", default=[], metavar="COLUMN=VALUE", help="only these rows of a table in --ood"
    )
    command.add_argument(
        "--method", nargs="+", default=["all"], choices=("all", *METHODS), metavar="NAME", help=", ".join(METHODS)
    )
    command.add_argument(
        "--save",
        choices=METHODS,
        help="the method to keep (default: the only one of --method, otherwise mcm of dual encoders and knn of others)",
    )
    command.add_argument("--task", help="whose logits are used (default: the main task)")
    command.add_argument(
        "--rate", type=float, default=0.95, metavar="SHARE", help="of validation images that are kept (default: 0.95)"
    )
    command.add_argument(
        "--neighbours",
        type=int,
        default=0,
        metavar="K",
        help="of knn (default: a tenth of the images of a class, at most 50)",
    )
    command.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N images of each --ood")
    command.add_argument("--device", default="auto", help="such as cpu, cuda, cuda:1 or mps (default: auto)")
    command.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Fit, keep a detector, and print how well all of them recognise the other images.

    Raises:
        UserError: the model has no outputs for a method, or data cannot be read.
    """
    if not 0 < options.rate < 1:
        raise UserError(f"--rate: must be between 0 and 1; got {options.rate}")
    for name in ("limit", "neighbours"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name}: must be at least 1, or left out; got {getattr(options, name)}")
    if options.ood_rows and not any(_is_table(given) for given in options.ood):
        raise UserError("--ood-rows: are rows of a table, and none is in --ood; leave them out, or give --ood TABLE")
    opened = Run(options.run)
    model = opened.load_model(device=check_device(options.device))
    tasks = getattr(model, "tasks", {})
    task = options.task or next(iter(tasks), "")
    if task not in tasks:
        raise UserError(f"--task {task}: {opened.path} predicts {', '.join(tasks) or 'no task'}; name one of these")
    kind = kind_of(getattr(model, "task_kinds", {}), task)
    methods, saved = _methods(options, kind, has_prompts=hasattr(model, "class_embeddings"))
    data: ImageDataModule = opened.load_datamodule(rest)
    inputs: InputOptions = model.input_options
    data.image_options = {**inputs}
    data.prepare_data()
    data.setup("test")
    outputs = {split: _outputs(model, data, task, split) for split in ("train", "val", "test")}
    detectors = {
        method: _detector(method, model, task, kind, outputs, options, checkpoint_digest(opened.path))
        for method in methods
    }
    write_detector(opened.path / Run.OOD, detectors[saved])
    rows = []
    for given in options.ood:
        others = _outputs(model, _other(given, options, inputs), task, "test", options.limit)
        for method, detector in detectors.items():
            known, unknown = (detector.scores(one.logits, one.features) for one in (outputs["test"], others))
            found = separation(known, unknown, (outputs["test"].groups, others.groups), detector.threshold)
            rows.append((_name(given, options), method, detector, found, len(others)))
    _write_results(opened, rows, outputs)
    _show(options, opened, rows, outputs, detectors[saved])


def _methods(options: argparse.Namespace, kind: TaskKind, *, has_prompts: bool) -> tuple[list[str], str]:
    """The methods to fit, and which of them is kept."""
    possible = methods_for(kind, has_prompts=has_prompts)
    asked = possible if "all" in options.method else list(dict.fromkeys(options.method))
    saved = options.save or (asked[0] if len(asked) == 1 else "mcm" if "mcm" in asked else "knn")
    asked = asked if saved in asked else [*asked, saved]
    if lacking := [one for one in asked if one not in possible]:
        raise UserError(
            f"--method {lacking[0]}: is not for this model; it has the outputs for {', '.join(possible) or 'none'}"
        )
    return asked, saved


def _outputs(model: Any, data: ImageDataModule, task: str, split: str, limit: int = 0) -> OodOutputs:
    """Logits and features of a split with the evaluation transform."""
    import torch

    rows = data.split_indices(split)
    if not len(rows):
        raise UserError(
            f"{data.table.origin}: the {split} split is empty; vitrail ood needs train, val and test images"
        )
    loader = data.rows_dataloader(rows[:limit] if limit else rows)
    parts: list[tuple[Any, Any]] = []
    places: list[NDArray[np.int64]] = []
    for batch in tracked(loader, f"{split} images", len(loader)):
        moved = {name: batch[name].to(model.device) for name in ("image", "sample_id")}
        with torch.inference_mode():
            found, features = outputs_with_features(model, moved, features=True)
        parts.append((found["logits"][task].float().cpu().numpy(), features))
        places.append(batch["sample_id"].numpy())
    ids = np.concatenate(places)
    names = np.array(data.group_names(), dtype=object)
    targets = data.table.targets.get(task)
    return OodOutputs(
        np.concatenate([logits for logits, _ in parts]),
        np.concatenate([features for _, features in parts]),
        names[ids],
        targets[ids] if targets is not None and targets.dtype == np.int64 else np.full(len(ids), UNKNOWN),
    )


def _detector(
    method: str,
    model: Any,
    task: str,
    kind: TaskKind,
    outputs: Mapping[str, OodOutputs],
    options: argparse.Namespace,
    digest: str | None,
) -> Detector:
    scale = float(model.objective.logit_scale()[0].detach()) if method == "mcm" else 1.0
    arrays = fit_detector(
        method, outputs["train"], head=_head(model, kind), logit_scale=scale, neighbours=options.neighbours
    )
    facts = {
        "checkpoint_sha256": digest,
        "train": len(outputs["train"]),
        "val": len(outputs["val"]),
        "groups": len(set(outputs["val"].groups.tolist())),
    }
    fitted = Detector(method, task, kind, 0.0, options.rate, arrays, facts)
    threshold = threshold_for(fitted.scores(outputs["val"].logits, outputs["val"].features), options.rate)
    return Detector(method, task, kind, threshold, options.rate, arrays, facts)


def _head(model: Any, kind: TaskKind) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Weights and biases, where one linear layer makes the logits of features."""
    import torch

    layer = getattr(model, "head", None)
    if kind != "single_label" or not isinstance(layer, torch.nn.Linear) or layer.bias is None:
        return None
    return layer.weight.detach().cpu().double().numpy(), layer.bias.detach().cpu().double().numpy()


def _other(given: str, options: argparse.Namespace, inputs: InputOptions) -> ImageDataModule:
    """Other images, all of them in the test split, with the model's preprocessing."""
    from datamodules.cli import load_datamodule

    path = Path(given).expanduser()
    source: Any = given
    if _is_table(given):
        if wrong := [one for one in options.ood_rows if "=" not in one]:
            raise UserError(f"--ood-rows {wrong[0]}: must be COLUMN=VALUE, such as label=mug")
        wanted: dict[str, list[str]] = {}
        for name, value in (one.split("=", 1) for one in options.ood_rows):
            wanted.setdefault(name, []).append(value)
        columns = {"label": "", "split": "", "caption": ""}
        arguments = {"path": str(path), "columns": columns, "rows": wanted or None}
        source = {"data": {"class_path": "datamodules.Table", "init_args": arguments}}
    elif path.name != given and not path.exists():
        raise UserError(f"--ood {given}: no such folder or file")
    data = load_datamodule(source, (), "vitrail ood")
    data.image_options = {**inputs}
    data.as_test_set({})
    data.setup("test")
    return data


def _is_table(given: str) -> bool:
    from datamodules.table_file import SUFFIXES

    return Path(given).suffix.lower() in SUFFIXES


def _name(given: str, options: argparse.Namespace) -> str:
    path = Path(given).expanduser()
    name = (path.resolve().name if path.is_dir() else path.stem) or given
    values = [one.partition("=")[2] for one in options.ood_rows] if _is_table(given) else []
    return plain_name(f"{name} ({', '.join(values)})" if values and len(values) < 4 else name, "--ood")


Row = tuple[str, str, Detector, Separation, int]


def _write_results(opened: Run, rows: Sequence[Row], outputs: Mapping[str, OodOutputs]) -> None:
    if not rows:
        return
    values = [
        {
            "ood": name,
            "method": method,
            "threshold": detector.threshold,
            "rate": detector.rate,
            "test_images": len(outputs["test"]),
            "ood_images": count,
            **{
                score: {"value": one.value, "low": one.interval.low, "high": one.interval.high}
                for score, one in vars(found).items()
            },
        }
        for name, method, detector, found, count in rows
    ]
    text = json.dumps(without_nan(values), indent=2)
    write_text_atomically(opened.path / Run.REPORTS / "ood.json", text + "\n")


def _show(
    options: argparse.Namespace,
    opened: Run,
    rows: Sequence[Row],
    outputs: Mapping[str, OodOutputs],
    saved: Detector,
) -> None:
    columns = ["other images", "n", "method", "AUROC [95 %]", "FPR@95 [95 %]", "test kept [95 %]", "unknown [95 %]"]
    cells = [
        [name, str(count), method, *(with_interval(*one) for one in vars(found).values())]
        for name, method, _, found, count in rows
    ]
    if rows:
        Table(columns, cells, left=("other images", "method")).show(as_markdown=options.markdown)
    test, facts = outputs["test"], saved.facts
    lines = [
        f"Fitted on {facts['train']} training images; thresholds keep {saved.rate:.0%} of {facts['val']} validation "
        f"images of {facts['groups']} groups. Test: {len(test)} images of {len(set(test.groups.tolist()))} groups.",
        f"Kept for predict: {saved.method} from {saved.threshold:.6g} on ({Run.OOD}), not chosen on other images.",
    ]
    if rows:
        lines.append(
            "FPR@95: share of the other images that a threshold lets pass which keeps 95 % of the test images; test "
            "kept and unknown are by the threshold from validation."
        )
    sys.stdout.write("\n" if options.markdown and rows else "")
    sys.stdout.writelines(f"{'* ' if options.markdown else ''}{line}\n" for line in lines)
