"""Logistic regression on the features of a frozen backbone: the floor that a trained network has to beat.

Linear probing as in Alain & Bengio, Understanding intermediate layers using linear classifier probes, 2016. Features
are standardised by the train split; one multinomial regression per task, with scikit-learn's default penalty C = 1; of
multi-label tasks one binary regression for each label, and ridge regression (α = 1) of numbers. Ordered classes are
taken as classes. Nothing is chosen by looking at the validation split, so its figures are as honest as those of the
test split.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.commands.compare import add_forms
from evaluation.statistics.intervals import known
from evaluation.statistics.scores import TrainTargets
from evaluation.tables.summary import TaskSummary, show_summaries, summarise
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.runtime import check_device
from vitrail.types import TaskKind, batch_targets, kind_of

if TYPE_CHECKING:
    import torch

    from datamodules.base import ImageDataModule
    from lightning_modules.encoders.image import ImageEncoder

ABSENT_MARGIN = 10.0
"""How far below the lowest logit those classes lie that the train split does not have."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``linear-probe``."""
    command.description = (
        "Logistic regression on the features of a frozen backbone: the floor that training has to beat."
    )
    command.epilog = "The data can be changed by --data.init_args.KEY VALUE, as in an experiment."
    command.add_argument(
        "--config", action="append", required=True, help="experiment YAML; only its `data:` part is read; repeatable"
    )
    command.add_argument("--backbone", required=True, help="timm name, for example resnet18")
    command.add_argument("--pretrained", default="true", help="true (hub), false, or a local file of weights")
    command.add_argument("--image-size", type=int, default=224, help="side of the images in pixels (default: 224)")
    add_forms(command)


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Fit the probes and print the table."""
    from datamodules.cli import load_datamodule
    from lightning_modules.encoders.image import ImageEncoder

    datamodule = load_datamodule(options.config, rest, "python -m evaluation linear-probe")
    datamodule.image_options = {**datamodule.image_options, "size": options.image_size}
    pretrained = {"true": True, "false": False}.get(options.pretrained.lower(), options.pretrained)
    encoder = ImageEncoder(options.backbone, options.image_size, pretrained)
    encoder.load_pretrained()
    show_summaries(linear_probe(datamodule, encoder), as_markdown=options.markdown, as_json=options.json)


def linear_probe(datamodule: ImageDataModule, encoder: ImageEncoder) -> list[TaskSummary]:
    """Fit on the train split, without augmentation; summarise validation and test.

    Args:
        datamodule: images of the size that the encoder expects.
        encoder: with its weights loaded.

    Returns:
        For each task one row of the validation and one of the test split.

    Raises:
        UserError: a split is empty, or a task has fewer than two classes in the train split.
    """
    if encoder.own_inputs is not None:
        datamodule.adopt_image_options(encoder.own_inputs)
    datamodule.prepare_data()
    datamodule.setup("fit")
    encoder = encoder.to(check_device("auto")).eval()
    train_features, _, train_targets = extract_features(datamodule, encoder, "train")
    kinds, table = datamodule.task_kinds, datamodule.table
    probes = {
        task: _fitted(task, kind_of(kinds, task), train_features, targets, len(datamodule.tasks[task]))
        for task, targets in train_targets.items()
    }
    counts, numbers = datamodule.class_counts, (datamodule.target_stats, table.target_medians())
    train = {
        task: TrainTargets(own, len(train_features), *(one.get(task, [math.nan])[0] for one in numbers))
        for task, own in counts.items()
    }
    names, groups = datamodule.sample_names(), datamodule.group_names()
    rows = []
    for split in ("val", "test"):
        features, sample_id, targets = extract_features(datamodule, encoder, split)
        predictions = Predictions(
            sample_id=sample_id,
            names=np.array([names[index] for index in sample_id], dtype=object),
            groups=np.array([groups[index] for index in sample_id], dtype=object),
            tasks=datamodule.tasks,
            targets=targets,
            logits={task: probe(features) for task, probe in probes.items()},
            kinds=kinds,
        )
        rows += summarise(predictions, train, f"linear probe of {encoder.name}", split)
    return sorted(rows, key=lambda row: list(datamodule.tasks).index(row.task))


def extract_features(
    datamodule: ImageDataModule, encoder: ImageEncoder, split: str
) -> tuple[NDArray[np.float32], NDArray[np.int64], dict[str, NDArray[Any]]]:
    """Compute the features of a split under the evaluation transform.

    Returns:
        Features float32 ``(N, D)``, sample ids int64 ``(N,)`` and for each task targets (``vitrail.types.Batch``).

    Raises:
        UserError: the split is empty.
    """
    import torch

    device = next(encoder.parameters()).device
    features: list[torch.Tensor] = []
    sample_ids: list[torch.Tensor] = []
    targets: dict[str, list[torch.Tensor]] = {task: [] for task in datamodule.tasks}
    with torch.inference_mode():
        for batch in datamodule.eval_dataloader(split):
            features.append(encoder(batch["image"].to(device)).float().cpu())
            sample_ids.append(batch["sample_id"])
            for task, values in batch_targets(batch).items():
                targets[task].append(values)
    if not features:
        raise UserError(f"linear-probe: the {split} split is empty; give it samples")
    by_task = {task: torch.cat(values).numpy() for task, values in targets.items()}
    return torch.cat(features).numpy(), torch.cat(sample_ids).numpy(), by_task


def _fitted(
    task: str, kind: TaskKind, features: NDArray[np.float32], targets: NDArray[Any], num_classes: int
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Fit a task; return its outputs (``vitrail.types.Outputs``) as a function of features."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = known(targets)
    if kind == "multi_label":
        labels = [_fitted_label(features, targets[:, column]) for column in range(num_classes)]
        return lambda seen: np.stack([label(seen) for label in labels], axis=1).astype(np.float32)
    if kind == "regression":
        ridge = make_pipeline(StandardScaler(), Ridge()).fit(features[rows], targets[rows])
        return lambda seen: ridge.predict(seen)[:, None].astype(np.float32)
    if len(np.unique(targets[rows])) < 2:
        raise UserError(f"linear-probe: task '{task}' has fewer than two classes in the train split; leave it out")
    probe = _logistic().fit(features[rows], targets[rows])
    return lambda seen: _logits(probe, seen, num_classes)


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=5_000))


def _fitted_label(
    features: NDArray[np.float32], targets: NDArray[np.int8]
) -> Callable[[NDArray[np.float32]], NDArray[np.float64]]:
    """Fit one label; one that applies to all training images or to none is predicted as such."""
    rows = known(targets)
    seen = np.unique(targets[rows])
    if len(seen) < 2:
        constant = ABSENT_MARGIN if 1 in seen else -ABSENT_MARGIN
        return lambda features: np.full(len(features), constant)
    probe = _logistic().fit(features[rows], targets[rows])
    return lambda features: np.asarray(probe.decision_function(features), np.float64)


def _logits(probe: Any, features: NDArray[np.float32], num_classes: int) -> NDArray[np.float32]:
    """Logits float32 ``(N, C)``; classes that the train split lacks are never predicted."""
    decision = probe.decision_function(features)
    if decision.ndim == 1:
        # Of two classes scikit-learn gives the difference only.
        decision = np.stack([-decision / 2, decision / 2], axis=1)
    logits = np.repeat(decision.min(axis=1, keepdims=True) - ABSENT_MARGIN, num_classes, axis=1)
    logits[:, probe.classes_] = decision
    return logits.astype(np.float32)
